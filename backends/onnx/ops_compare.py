"""Comparisons, logic, and choosing by a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand
from .table import row

Term: TypeAlias = Operand | Number

_COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
# ONNX Runtime compares these; smaller integers are widened.
_COMPARABLE = (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64)


def compare_dtype(x: Operand, other: Term, op: str = "") -> torch.dtype:
    """The type in which torch compares, widened to one that the runtime compares."""
    if isinstance(other, Operand):
        dtype = torch.result_type(x.form, other.form)
    elif isinstance(other, (torch.SymInt, torch.SymFloat)):
        dtype = torch.result_type(x.form, 1 if isinstance(other, torch.SymInt) else 1.0)
    else:
        dtype = torch.result_type(x.form, other)
    if dtype in _COMPARABLE or (dtype == torch.bool and op == "Equal"):
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32


def _comparison(name: str, op: str) -> Callable[[Emitter, Operand, Term], Value]:
    def emit(g: Emitter, x: Operand, other: Term) -> Value:
        dtype = compare_dtype(x, other, op)
        return g.op(op, g.cast(x, dtype), g.typed(other, dtype))

    emit.__doc__ = f"{op}, in the promoted type."
    emit.__qualname__ = emit.__name__ = name
    return emit


for _name, _op in _COMPARISONS.items():
    row(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(_name, _op))


@row("aten.ne.Tensor", "aten.ne.Scalar")
def ne(g: Emitter, x: Operand, other: Term) -> Value:
    dtype = compare_dtype(x, other, "Equal")
    return g.op("Not", g.op("Equal", g.cast(x, dtype), g.typed(other, dtype)))


_LOGIC = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
_BITWISE = {
    "bitwise_and": "And",
    "bitwise_or": "Or",
    "bitwise_xor": "Xor",
}


def _logic(name: str, op: str) -> Callable[[Emitter, Operand, Operand], Value]:
    def emit(g: Emitter, x: Operand, other: Operand) -> Value:
        return g.op(op, g.cast(x, torch.bool), g.cast(other, torch.bool))

    emit.__qualname__ = emit.__name__ = name
    return emit


def _bitwise(name: str, op: str) -> Callable[[Emitter, Operand, Term], Value]:
    def emit(g: Emitter, x: Operand, other: Term) -> Value:
        dtype = g.result.dtype
        name = op if dtype == torch.bool else f"Bitwise{op}"
        return g.op(name, g.cast(x, dtype), g.typed(other, dtype))

    emit.__qualname__ = emit.__name__ = name
    return emit


for _name, _op in _LOGIC.items():
    row(f"aten.{_name}.default")(_logic(_name, _op))
for _name, _op in _BITWISE.items():
    row(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_bitwise(_name, _op))


@row("aten.logical_not.default")
def logical_not(g: Emitter, x: Operand) -> Value:
    return g.op("Not", g.cast(x, torch.bool))


@row("aten.bitwise_not.default")
def bitwise_not(g: Emitter, x: Operand) -> Value:
    return g.op("Not" if x.dtype == torch.bool else "BitwiseNot", x)


@row("aten.isnan.default")
def isnan(g: Emitter, x: Operand) -> Value:
    return g.op("IsNaN", x)


@row("aten.isinf.default")
def isinf(g: Emitter, x: Operand) -> Value:
    return g.op("IsInf", x)


@row("aten.isfinite.default")
def isfinite(g: Emitter, x: Operand) -> Value:
    return g.op("Not", g.op("Or", g.op("IsNaN", x), g.op("IsInf", x)))


@row("aten.nan_to_num.default")
def nan_to_num(g: Emitter, x: Operand, nan: float | None, posinf: float | None, neginf: float | None) -> Value:
    """NaN by a number (0), infinities by numbers (the largest of the type)."""
    limits = torch.finfo(x.dtype)
    value = g.op("Where", g.op("IsNaN", x), g.scalar(nan or 0.0, x.dtype), x)
    for sign, number, limit in ((1, posinf, limits.max), (-1, neginf, limits.min)):
        infinite = g.op("IsInf", value, detect_positive=int(sign > 0), detect_negative=int(sign < 0))
        value = g.op("Where", infinite, g.scalar(limit if number is None else number, x.dtype), value)
    return value


# -- choice ---------------------------------------------------------------------------------------------------------


def choose(g: Emitter, condition: Operand | Value, a: Value, b: Value, dtype: torch.dtype) -> Value:
    """Where, also for booleans, which ONNX Runtime's kernel leaves out."""
    condition = g.value(condition)
    if dtype != torch.bool:
        return g.op("Where", condition, a, b)
    return g.op("Or", g.op("And", condition, a), g.op("And", g.op("Not", condition), b))


@row("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(g: Emitter, condition: Operand, x: Term, other: Term) -> Value:
    dtype = g.result.dtype
    return choose(g, g.cast(condition, torch.bool), g.typed(x, dtype), g.typed(other, dtype), dtype)


@row("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(g: Emitter, x: Operand, mask: Operand, value: Term) -> Value:
    dtype = g.result.dtype
    return choose(g, g.cast(mask, torch.bool), g.typed(value, dtype), g.cast(x, dtype), dtype)
