"""Layers whose input is quantized at run time (frontend/dynamic.py).

A linear layer is standard ONNX, which ONNX Runtime fuses into one kernel (DynamicQuantizeMatMul) on two dims or more,
2.7 to 5 times as fast as in float (docs/results.md). For an LSTM standard ONNX has no integer form: DynamicQuantizeLSTM
is an operator of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Operand
from .ops_recurrent import LSTM_GATES, in_gate_order, merge_directions, slice_layers
from .table import row

_CONTRIB = "com.microsoft"


@row("fxpress.dynamic_linear.default")
def dynamic_linear(g: Emitter, x: Operand, weight: Operand, scale: Operand, bias: Operand | None) -> Value:
    """DynamicQuantizeLinear, MatMulInteger, and the scales."""
    q, x_scale, zero = g.ops("DynamicQuantizeLinear", 3, x)
    product = g.cast_value(g.op("MatMulInteger", q, g.transposed(weight), zero), torch.float32)
    scaled = g.op("Mul", product, g.op("Mul", x_scale, scale))
    return scaled if bias is None else g.op("Add", scaled, bias)


@row("fxpress.dynamic_lstm.default")
def dynamic_lstm(
    g: Emitter,
    x: Operand,
    hx: Sequence[Operand],
    weights: Sequence[Operand],
    scales: Sequence[Operand],
    biases: Sequence[Operand],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Value]:
    """(output, h_n, c_n)."""
    directions = 2 if bidirectional else 1
    value = g.op("Transpose", x, perm=[1, 0, 2]) if batch_first else x.value
    finals = []
    for layer in range(num_layers):
        own = slice(layer * directions * 2, (layer + 1) * directions * 2)
        start = [slice_layers(g, s, layer * directions, directions, num_layers) for s in hx]
        value, *final = _layer(g, value, start, weights[own], scales[own], biases[own], directions)
        finals.append(final)
    outputs = [g.op("Transpose", value, perm=[1, 0, 2]) if batch_first else value]
    return [*outputs, *(p[0] if num_layers == 1 else g.op("Concat", *p, axis=0) for p in zip(*finals))]


def _layer(
    g: Emitter,
    x: Value,
    states: list[Value],
    weights: Sequence[Operand],
    scales: Sequence[Operand],
    biases: Sequence[Operand],
    directions: int,
) -> list[Value]:
    """x [T, B, in] -> (y [T, B, directions * hidden], final states). Weights are [directions, in, 4 hidden] there."""
    hidden = int(weights[1].shape[-1])
    inputs: list[Value] = []
    quantities: list[Value | None] = []
    for part in (0, 1):
        ordered = [in_gate_order(LSTM_GATES, w) for w in weights[part::2]]
        inputs.append(g.constant(torch.stack([w.t() for w in ordered]).contiguous()))
        scale = torch.stack([in_gate_order(LSTM_GATES, s) for s in scales[part::2]])
        quantities += [g.constant(scale), g.initializer("zero", torch.zeros(scale.shape, dtype=torch.int8))]
    bias = None
    if biases:
        both = [torch.cat([in_gate_order(LSTM_GATES, b) for b in biases[2 * d : 2 * d + 2]]) for d in range(directions)]
        bias = g.constant(torch.stack(both))
    y, *final = g.ops(
        "DynamicQuantizeLSTM",
        3,
        x,
        *inputs,
        bias,
        None,
        *states,
        None,
        *quantities,
        domain=_CONTRIB,
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
    )
    return [merge_directions(g, y, directions, hidden), *final]
