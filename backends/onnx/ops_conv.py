"""Convolutions of one, two and three dimensions, and transposed ones."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_ir import Value

from .emit import Emitter, Operand, spread
from .float_layers import float_input
from .table import row


@row("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
def conv(
    g: Emitter,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    """Conv with the same padding on both sides."""
    pads = spread(padding, weight.rank - 2)
    return _conv(g, x, weight, bias, stride, pads + pads, dilation, groups)


@row("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
def conv_named_padding(
    g: Emitter,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    groups: int,
) -> Value:
    """padding="same" puts the odd one at the end, "valid" puts none."""
    spatial = weight.rank - 2
    if padding not in ("same", "valid"):
        raise g.reject(f"padding={padding!r} is not lowered", hint="use 'same', 'valid' or numbers")
    steps = spread(dilation, spatial)
    totals = [d * (int(k) - 1) if padding == "same" else 0 for d, k in zip(steps, weight.shape[2:])]
    pads = [t // 2 for t in totals] + [t - t // 2 for t in totals]
    return _conv(g, x, weight, bias, stride, pads, dilation, groups)


def _conv(
    g: Emitter,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    pads: list[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    spatial = weight.rank - 2
    result = g.op(
        "Conv",
        _batched(g, x, weight),
        weight,
        bias,
        kernel_shape=[int(k) for k in weight.shape[2:]],
        strides=spread(stride, spatial),
        pads=pads,
        dilations=spread(dilation, spatial),
        group=groups,
    )
    return _unbatched(g, x, weight, result)


@row("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def conv_transpose(
    g: Emitter,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Value:
    """ConvTranspose; the weights are [in, out / groups, ...] in both."""
    spatial = weight.rank - 2
    pads = spread(padding, spatial)
    result = g.op(
        "ConvTranspose",
        _batched(g, x, weight),
        weight,
        bias,
        kernel_shape=[int(k) for k in weight.shape[2:]],
        strides=spread(stride, spatial),
        pads=pads + pads,
        output_padding=spread(output_padding, spatial),
        dilations=spread(dilation, spatial),
        group=groups,
    )
    return _unbatched(g, x, weight, result)


@row("aten.convolution.default")
def convolution(
    g: Emitter,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    """The form that decomposed programs have."""
    if transposed:
        return conv_transpose(g, x, weight, bias, stride, padding, output_padding, groups, dilation)
    if any(output_padding):
        raise g.reject("output_padding without transposed has no meaning")
    return conv(g, x, weight, bias, stride, padding, dilation, groups)


def _batched(g: Emitter, x: Operand, weight: Operand) -> Value:
    """ONNX wants a batch dimension; torch takes a single example too."""
    return float_input(g, x, weight) if x.rank == weight.rank else g.op("Unsqueeze", x, g.ints([0]))


def _unbatched(g: Emitter, x: Operand, weight: Operand, result: Value) -> Value:
    return result if x.rank == weight.rank else g.op("Squeeze", result, g.ints([0]))
