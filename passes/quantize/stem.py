"""The first layer as a convolution over 2x2 blocks of pixels.

A stem reads few channels (3) with stride 2, which integer convolution kernels are slow at. Moving each 2x2 block of
pixels into channels turns it into a stride-1 convolution with four times the channels and about half the
kernel size. With k - p = 2 q + r for kernel position k, padding p and r in {0, 1}:

    y[i] = sum_k w[k] x[2 i + k - p] = sum_q sum_r w[2 q + r + p] x2[i + q, r]

The weights are the same integers in another order, filled up with zeros, so the result is the same to the last bit.
Measured on ONNX Runtime (docs/results.md): the 3x3 stem of MobileNetV2 and the 7x7 stem of ResNet both gain.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ...frontend.program import Program
from ..rewrite import argument, aten, call_before, constant, find, is_op, put_constant, replace

_MOST_CHANNELS = 4


def blocks_for_stems(program: Program) -> int:
    """Rewrite all quantized stems in place. Returns how many there were."""
    return sum(_rewrite(program, node) for node in find(program, aten.conv2d.default))


def _rewrite(program: Program, conv: fx.Node) -> bool:
    real, weight = conv.args[0], conv.args[1]
    if not is_op(real, torch.ops.fxpress.dequantize.default) or not _is_stem(conv):
        return False
    assert isinstance(real, fx.Node)
    assert isinstance(weight, fx.Node)
    integers = constant(program, weight.args[0])
    assert integers is not None
    blocks, before, after = _blocks_of(integers, conv)
    name = str(weight.args[0].target)  # type: ignore[union-attr]
    stored = put_constant(program, f"{name}_blocks", blocks, conv)
    new_weight = call_before(conv, torch.ops.fxpress.dequantize_channel.default, stored, *weight.args[1:])
    moved = call_before(conv, torch.ops.fxpress.pixel_blocks.default, real.args[0], 2)
    back = call_before(conv, torch.ops.fxpress.dequantize.default, moved, *real.args[1:])
    margins = [before[1], after[1], before[0], after[0]]
    padded = call_before(conv, aten.constant_pad_nd.default, back, margins, 0.0) if any(margins) else back
    new = call_before(conv, aten.conv2d.default, padded, new_weight, argument(conv, "bias"))
    new.meta["custom"] = {**new.meta.get("custom", {}), "float_name": conv.name}
    replace(conv, new)
    return True


def blocked_weight(weight: torch.Tensor, conv: fx.Node) -> torch.Tensor:
    """The weights of the stem `conv` in the order that its form over blocks has."""
    return _blocks_of(weight, conv)[0]


def _blocks_of(weight: torch.Tensor, conv: fx.Node) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    pads = [int(p) for p in argument(conv, "padding")]
    return block_weights(weight, (pads[0], pads[-1]), _sizes(conv.args[0]), _sizes(conv))


def _is_stem(conv: fx.Node) -> bool:
    """Few channels, stride 2, no groups or dilation, quantized weights, even and known height and width."""
    weight = conv.args[1]
    if not is_op(weight, torch.ops.fxpress.dequantize_channel.default) or isinstance(argument(conv, "padding"), str):
        return False
    stride, dilation = argument(conv, "stride"), argument(conv, "dilation")
    sizes = (*conv.args[0].meta["val"].shape[2:], *conv.meta["val"].shape[2:])  # type: ignore[union-attr]
    return (
        weight.meta["val"].shape[1] <= _MOST_CHANNELS  # type: ignore[union-attr]
        and argument(conv, "groups") == 1
        and set(stride) == {2}
        and set(dilation) == {1}
        and all(isinstance(s, int) for s in sizes)
        and all(s % 2 == 0 for s in sizes[:2])
    )


def _sizes(node: object) -> tuple[int, int]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape[2:])  # type: ignore[return-value]


def block_weights(
    weight: torch.Tensor, pads: tuple[int, int], size: tuple[int, int], out: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Weights [O, C, K, L] for stride 2 and padding `pads` as weights [O, 4 C, K', L'] over blocks.

    `size` and `out` are (height, width) of input and output. Returns the weights and the padding of the blocks
    (before, after) in height and width, after being what the output size asks for.
    """
    firsts = [math.floor(-p / 2) for p in pads]
    lasts = [math.floor((k - 1 - p) / 2) for k, p in zip(weight.shape[2:], pads)]
    count = [last - first + 1 for first, last in zip(firsts, lasts)]
    blocks = weight.new_zeros((weight.shape[0], weight.shape[1], 2, 2, *count))
    for k in range(weight.shape[2]):
        for m in range(weight.shape[3]):
            row, column = k - pads[0], m - pads[1]
            at = (row // 2 - firsts[0], column // 2 - firsts[1])
            blocks[:, :, row % 2, column % 2, at[0], at[1]] = weight[:, :, k, m]
    before = (-firsts[0], -firsts[1])
    after = tuple(o + n - 1 - s // 2 - b for o, n, s, b in zip(out, count, size, before))
    # Channels in the order of pixel_blocks: column in the block, row in the block, channel.
    return blocks.permute(0, 3, 2, 1, 4, 5).flatten(1, 3).contiguous(), before, (after[0], after[1])
