"""Keep in float what the program keeps in float.

ONNX Runtime's `WeightBiasQuantization` quantizes the float weights of a Conv, ConvTranspose or Gemm by itself, to 8 bit
per tensor, wherever the layer reads a tensor that is dequantized with a single scale. A layer that was left in float
for accuracy, or for speed, would be neither. It leaves alone what is dequantized channel by channel, which takes the
same time; so that is how a float layer reads integers: with the same scale for every channel.
"""

from __future__ import annotations

import torch
from onnx_ir import Node, Value

from .emit import Emitter, Operand

_CHANNELS = 1
# The runtime moves a DequantizeLinear behind these.
_MOVES = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def float_input(g: Emitter, x: Operand, weight: Operand) -> Value:
    """What a layer reads for `x`: `x` as it is, unless its weights are float constants and `x` is dequantized."""
    producer = x.value.producer()
    if weight.contents is None or producer is None or not _on_integers(producer):
        return x.value
    channels = x.shape[_CHANNELS] if x.rank > _CHANNELS else 1
    if producer.op_type != "DequantizeLinear" or not isinstance(channels, int) or channels == 1:
        return _apart(g, x)
    scale, zero_point = (_repeated(g, v, channels) for v in producer.inputs[1:3])
    return g.op("DequantizeLinear", producer.inputs[0], scale, zero_point, axis=_CHANNELS)


def undivided(g: Emitter, x: Operand) -> Value:
    """`x` as a pattern of several nodes reads it that the runtime fuses to one kernel.

    ONNX Runtime gives every reader a DequantizeLinear of its own, and no longer sees that they read the same: SiLU
    would take four kernels, and five times as long.
    """
    producer = x.value.producer()
    return x.value if producer is None or not _on_integers(producer) else _apart(g, x)


def _apart(g: Emitter, x: Operand) -> Value:
    """max(x, lowest float): changes nothing, and hides where `x` comes from."""
    return g.op("Max", x, g.scalar(torch.finfo(torch.float32).min, torch.float32))


def _on_integers(producer: Node) -> bool:
    """Does an activation come from a DequantizeLinear with one scale, directly or through moves?"""
    node: Node | None = producer
    while node is not None and node.op_type in _MOVES:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or "axis" in node.attributes:
        return False
    return all(v is not None and v.const_value is not None for v in node.inputs[1:3])


def _repeated(g: Emitter, value: Value | None, channels: int) -> Value:
    assert value is not None
    assert value.const_value is not None
    return g.constant(torch.from_numpy(value.const_value.numpy().reshape(1).copy()).repeat(channels))
