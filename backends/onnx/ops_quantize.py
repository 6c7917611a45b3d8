"""The operators of quantized programs (frontend/operators.py) as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import torch
from onnx_ir import Value

from .emit import Emitter, Operand, positive
from .sizes import Size
from .table import row

_QUANTIZED = (torch.int8, torch.uint8, torch.int16, torch.uint16)
_DEQUANTIZED = (*_QUANTIZED, torch.int32)


@row("fxpress.quantize.default")
def quantize(g: Emitter, x: Operand, scale: float, zero_point: int, dtype: torch.dtype) -> Value:
    """QuantizeLinear with a float32 scale and a zero point of the storage type."""
    if dtype not in _QUANTIZED:
        raise g.reject(f"quantization to {dtype} is not lowered", hint=f"use one of {_QUANTIZED}")
    return g.op("QuantizeLinear", g.cast(x, torch.float32), g.scalar(scale, torch.float32), g.scalar(zero_point, dtype))


@row("fxpress.dequantize.default")
def dequantize(g: Emitter, q: Operand, scale: float, zero_point: int) -> Value:
    """DequantizeLinear, one scale."""
    _check(g, q)
    zero = torch.tensor(zero_point, dtype=q.dtype)
    return g.op("DequantizeLinear", q, g.scalar(scale, torch.float32), _zero_points(g, q, zero))


@row("fxpress.dequantize_channel.default")
def dequantize_channel(g: Emitter, q: Operand, scale: Operand, axis: int) -> Value:
    """DequantizeLinear with one scale per index of `axis`, zero point 0."""
    _check(g, q)
    zeros = torch.zeros(tuple(scale.form.shape), dtype=q.dtype)
    return g.op("DequantizeLinear", q, scale, _zero_points(g, q, zeros), axis=positive(axis, q.rank))


def _zero_points(g: Emitter, q: Operand, zeros: torch.Tensor) -> Value:
    """Each weight has its own: ONNX Runtime (1.31) refuses files in which two weights that it makes unsigned share one,
    as it does without VNNI where its option `session.x64quantprecision` is set."""
    return g.initializer("zero", zeros) if q.contents is not None and q.dtype == torch.int8 else g.constant(zeros)


def _check(g: Emitter, q: Operand) -> None:
    if q.dtype not in _DEQUANTIZED:
        raise g.reject(f"dequantization of {q.dtype} is not lowered", hint=f"use one of {_DEQUANTIZED}")


@row("fxpress.pixel_blocks.default")
def pixel_blocks(g: Emitter, x: Operand, block: int) -> Value:
    """Rows of a block become channels, then channels go last, where columns of a block are channels already.

    The last Transpose meets the one that ONNX Runtime puts before an integer convolution, and both go. On three
    channels of 224×224 this takes 50 µs, SpaceToDepth with the Transpose behind it 85.
    """
    n, c, h, w = x.shape
    h, rows, columns = h // block, block, w // block
    value = g.reshape(x, x.shape, [n, c, h, rows, w])
    value = g.op("Transpose", value, perm=[0, 3, 1, 2, 4])
    value = g.reshape(value, [n, rows, c, h, w], [n, rows * c, h, w])
    value = g.op("Transpose", value, perm=[0, 2, 3, 1])
    value = g.reshape(value, [n, h, w, rows * c], [n, h, columns, block * rows * c])
    return g.op("Transpose", value, perm=[0, 3, 1, 2])


@row("fxpress.columns_together.default")
def columns_together(g: Emitter, x: Operand, count: int) -> Value:
    """A Reshape with channels last; the transposes around it meet those of ONNX Runtime, and go."""
    n, c, h, w = x.shape
    return _channels_last(g, x, [n, h, w, c], [n, h, w // count, count * c])


@row("fxpress.columns_apart.default")
def columns_apart(g: Emitter, x: Operand, count: int) -> Value:
    """The inverse."""
    n, c, h, w = x.shape
    return _channels_last(g, x, [n, h, w, c], [n, h, w * count, c // count])


def _channels_last(g: Emitter, x: Operand, before: list[Size], after: list[Size]) -> Value:
    last = g.op("Transpose", x, perm=[0, 2, 3, 1])
    return g.op("Transpose", g.reshape(last, before, after), perm=[0, 3, 1, 2])
