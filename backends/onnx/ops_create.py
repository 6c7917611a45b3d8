"""Tensors made from nothing but sizes. With fixed sizes they are constants and never come here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand
from .sizes import Size
from .table import row

Dtype: TypeAlias = torch.dtype | None


@row("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(g: Emitter, end: Number, dtype: Dtype, start: Number = 0, step: Number = 1) -> Value:
    """Range in the result's type.

    One that falls is start less one that rises: ONNX Runtime 1.31 makes a Slice of a Gather by a Range, where an end of
    -1 would mean the last element.
    """
    kind = g.result.dtype
    first, last = g.number(start, kind), g.number(end, kind)
    if not isinstance(step, (int, float)) or step > 0:
        return g.op("Range", first, last, g.number(step, kind))
    return g.op("Sub", first, g.op("Range", g.number(0, kind), g.op("Sub", first, last), g.number(-step, kind)))


@row("aten.full.default")
def full(g: Emitter, size: Sequence[Size], fill_value: Number, dtype: Dtype) -> Value:
    return _filled(g, fill_value)


@row("aten.new_full.default")
def new_full(g: Emitter, x: Operand, size: Sequence[Size], fill_value: Number, dtype: Dtype) -> Value:
    return _filled(g, fill_value)


@row("aten.full_like.default")
def full_like(g: Emitter, x: Operand, fill_value: Number, dtype: Dtype) -> Value:
    return _filled(g, fill_value)


@row("aten.fill.Scalar", "aten.fill.Tensor")
def fill(g: Emitter, x: Operand, value: Number | Operand) -> Value:
    if isinstance(value, Operand):
        return g.expand(g.cast(value, g.result.dtype), value.shape, g.result.shape)
    return _filled(g, value)


# Empty tensors have no defined contents, so zeros are as right as any.
@row("aten.zeros.default", "aten.empty.memory_format")
def zeros(g: Emitter, size: Sequence[Size], dtype: Dtype) -> Value:
    return _filled(g, 0)


@row("aten.zeros_like.default", "aten.empty_like.default", "aten.zero.default")
def zeros_like(g: Emitter, x: Operand, dtype: Dtype = None) -> Value:
    return _filled(g, 0)


@row("aten.new_zeros.default", "aten.new_empty.default")
def new_zeros(g: Emitter, x: Operand, size: Sequence[Size], dtype: Dtype) -> Value:
    return _filled(g, 0)


@row("aten.ones.default")
def ones(g: Emitter, size: Sequence[Size], dtype: Dtype) -> Value:
    return _filled(g, 1)


@row("aten.ones_like.default")
def ones_like(g: Emitter, x: Operand, dtype: Dtype) -> Value:
    return _filled(g, 1)


@row("aten.new_ones.default")
def new_ones(g: Emitter, x: Operand, size: Sequence[Size], dtype: Dtype) -> Value:
    return _filled(g, 1)


@row("aten.scalar_tensor.default")
def scalar_tensor(g: Emitter, s: Number, dtype: Dtype) -> Value:
    return g.number(s, g.result.dtype)


def _filled(g: Emitter, number: Number) -> Value:
    return g.filled(number, g.result.dtype, tuple(g.result.shape))
