"""Arithmetic of two tensors, or of a tensor and a number, with torch's type promotion.

Operands are cast to the type that torch computes in. That is the result's type, except for true division and powers,
whose result type is already the promoted one.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand
from .table import row

Term: TypeAlias = Operand | Number


def _scaled(g: Emitter, other: Term, alpha: Number) -> Value:
    """other * alpha in the result's type."""
    dtype = g.result.dtype
    if isinstance(alpha, (int, float)) and alpha == 1:
        return g.typed(other, dtype)
    return g.op("Mul", g.typed(other, dtype), g.number(alpha, dtype))


def _is_bool(g: Emitter) -> bool:
    return g.result.dtype == torch.bool


@row("aten.add.Tensor", "aten.add.Scalar")
def add(g: Emitter, x: Term, other: Term, alpha: Number) -> Value:
    if _is_bool(g):
        return g.op("Or", g.typed(x, torch.bool), g.typed(other, torch.bool))
    return g.op("Add", g.typed(x, g.result.dtype), _scaled(g, other, alpha))


@row("aten.sub.Tensor", "aten.sub.Scalar")
def sub(g: Emitter, x: Term, other: Term, alpha: Number) -> Value:
    return g.op("Sub", g.typed(x, g.result.dtype), _scaled(g, other, alpha))


@row("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(g: Emitter, x: Operand, other: Term, alpha: Number) -> Value:
    """other - alpha * x."""
    return g.op("Sub", g.typed(other, g.result.dtype), _scaled(g, x, alpha))


@row("aten.mul.Tensor", "aten.mul.Scalar")
def mul(g: Emitter, x: Term, other: Term) -> Value:
    if _is_bool(g):
        return g.op("And", g.typed(x, torch.bool), g.typed(other, torch.bool))
    return g.op("Mul", g.typed(x, g.result.dtype), g.typed(other, g.result.dtype))


@row("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor")
def div(g: Emitter, x: Term, other: Term) -> Value:
    return g.op("Div", g.typed(x, g.result.dtype), g.typed(other, g.result.dtype))


@row("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def div_mode(g: Emitter, x: Term, other: Term, rounding_mode: str | None) -> Value:
    """Division rounded not at all, towards zero ("trunc") or down ("floor")."""
    if rounding_mode is None:
        return div(g, x, other)
    if rounding_mode == "floor":
        return floor_divide(g, x, other)
    if rounding_mode != "trunc":
        raise g.reject(f"rounding_mode={rounding_mode!r} is not lowered", hint="use None, 'trunc' or 'floor'")
    quotient = div(g, x, other)
    if not g.result.dtype.is_floating_point:
        return quotient  # ONNX integer division truncates
    return g.op("Mul", g.op("Sign", quotient), g.op("Floor", g.op("Abs", quotient)))


@row("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(g: Emitter, x: Term, other: Term) -> Value:
    """(x - x mod y) / y: exact for integers, and for floats what torch computes (1.0 // 0.1 is 9)."""
    a, b = g.typed(x, g.result.dtype), g.typed(other, g.result.dtype)
    quotient = g.op("Div", g.op("Sub", a, _modulo(g, a, b)), b)
    return g.op("Round", quotient) if g.result.dtype.is_floating_point else quotient


@row("aten.remainder.Tensor", "aten.remainder.Scalar")
def remainder(g: Emitter, x: Term, other: Term) -> Value:
    """The remainder with the sign of the divisor."""
    return _modulo(g, g.typed(x, g.result.dtype), g.typed(other, g.result.dtype))


def _modulo(g: Emitter, a: Value, b: Value) -> Value:
    """ONNX Mod has the divisor's sign for integers, the dividend's for floats: those are moved by one divisor."""
    if not g.result.dtype.is_floating_point:
        return g.op("Mod", a, b)
    m = g.op("Mod", a, b, fmod=1)
    opposite = g.op("Less", g.op("Mul", g.op("Sign", m), g.op("Sign", b)), g.scalar(0.0, g.result.dtype))
    return g.op("Where", opposite, g.op("Add", m, b), m)


@row("aten.fmod.Tensor", "aten.fmod.Scalar")
def fmod(g: Emitter, x: Term, other: Term) -> Value:
    """The remainder with the sign of the dividend."""
    return g.op("Mod", g.typed(x, g.result.dtype), g.typed(other, g.result.dtype), fmod=1)


@row("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def pow(g: Emitter, x: Term, exponent: Term) -> Value:
    """Powers; 2 and 1/2 as the cheaper Mul and Sqrt."""
    dtype = g.result.dtype
    base = g.typed(x, dtype)
    if isinstance(exponent, (int, float)) and exponent == 2:
        return g.op("Mul", base, base)
    if isinstance(exponent, (int, float)) and exponent == 0.5:
        return g.op("Sqrt", base)
    return g.op("Pow", base, g.typed(exponent, dtype))


@row("aten.maximum.default", "aten.max.other", "aten.fmax.default")
def maximum(g: Emitter, x: Operand, other: Operand) -> Value:
    return g.op("Max", g.cast(x, g.result.dtype), g.cast(other, g.result.dtype))


@row("aten.minimum.default", "aten.min.other", "aten.fmin.default")
def minimum(g: Emitter, x: Operand, other: Operand) -> Value:
    return g.op("Min", g.cast(x, g.result.dtype), g.cast(other, g.result.dtype))


@row("aten.clamp_min.Tensor")
def clamp_min_tensor(g: Emitter, x: Operand, min: Operand) -> Value:
    return maximum(g, x, min)


@row("aten.clamp_max.Tensor")
def clamp_max_tensor(g: Emitter, x: Operand, max: Operand) -> Value:
    return minimum(g, x, max)


@row("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(g: Emitter, x: Operand, end: Operand, weight: Term) -> Value:
    """x + weight * (end - x)."""
    return g.op("Add", x, g.op("Mul", g.typed(weight, x.dtype), g.op("Sub", end, x)))


@row("aten.addcmul.default")
def addcmul(g: Emitter, x: Operand, tensor1: Operand, tensor2: Operand, value: Number) -> Value:
    """x + value * tensor1 * tensor2."""
    dtype = g.result.dtype
    product = g.op("Mul", g.cast(tensor1, dtype), g.cast(tensor2, dtype))
    return g.op("Add", g.cast(x, dtype), _times(g, product, value))


@row("aten.addcdiv.default")
def addcdiv(g: Emitter, x: Operand, tensor1: Operand, tensor2: Operand, value: Number) -> Value:
    """x + value * tensor1 / tensor2."""
    dtype = g.result.dtype
    quotient = g.op("Div", g.cast(tensor1, dtype), g.cast(tensor2, dtype))
    return g.op("Add", g.cast(x, dtype), _times(g, quotient, value))


def _times(g: Emitter, product: Value, number: Number) -> Value:
    if isinstance(number, (int, float)) and number == 1:
        return product
    return g.op("Mul", product, g.number(number, g.result.dtype))


@row("aten.atan2.default")
def atan2(g: Emitter, x: Operand, other: Operand) -> Value:
    """atan(y / x), moved by pi where x is negative."""
    dtype = g.result.dtype
    zero, pi = g.scalar(0.0, dtype), g.scalar(torch.pi, dtype)
    base = g.op("Atan", g.op("Div", x, other))
    up = g.op("Where", g.op("Less", x, zero), g.op("Sub", base, pi), g.op("Add", base, pi))
    angle = g.op("Where", g.op("Less", other, zero), up, base)
    both_zero = g.op("And", g.op("Equal", x, zero), g.op("Equal", other, zero))
    return g.op("Where", both_zero, zero, angle)
