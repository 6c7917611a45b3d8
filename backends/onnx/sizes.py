"""Sizes that are known only at run time, as ONNX integer arithmetic.

`meta["val"]` holds each size as an int or as a `torch.SymInt`: an expression over the symbols of the inputs' dims. So a
symbolic size needs no row of its own: whatever the graph computed it from, its expression over `Shape(input)` is the
same value. Sizes are one-dimensional int64 tensors of one element, ready to be concatenated to a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ...errors import LoweringError

if TYPE_CHECKING:
    import onnx_ir as ir

    from .emit import Emitter

Size: TypeAlias = int | torch.SymInt


def same_size(a: Size, b: Size) -> bool:
    """Are two sizes the same for every input? (== on SymInts would add a guard.)"""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, int) or isinstance(b, int):
        return False
    return bool(a.node.expr == b.node.expr)


def same_shape(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    """Are two shapes the same for every input?"""
    return len(a) == len(b) and all(map(same_size, a, b))


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def emit_expression(g: Emitter, expression: Any) -> ir.Value:
    """An integer sympy expression over the inputs' symbols, as an int64 tensor of shape [1]."""
    key = str(expression)
    if key not in g.size_cache:
        g.size_cache[key] = _emit(g, expression)
    return g.size_cache[key]


def _emit(g: Emitter, expression: Any) -> ir.Value:
    if expression.is_Integer:
        return g.ints([int(expression)])
    if expression.is_Symbol:
        return g.symbol(str(expression))
    name = type(expression).__name__
    if name not in _FUNCTIONS:
        raise LoweringError(
            f"the size {expression} uses {name}, which is not lowered", hint="add it to backends/onnx/sizes.py"
        )
    return _FUNCTIONS[name](g, *expression.args)


def _fold(op: str) -> Callable[..., ir.Value]:
    """An n-ary function as a chain of binary ONNX ops."""

    def emit(g: Emitter, first: Any, *rest: Any) -> ir.Value:
        value = emit_expression(g, first)
        for item in rest:
            value = g.op(op, value, emit_expression(g, item))
        return value

    return emit


def _floor_divide(g: Emitter, a: Any, b: Any) -> ir.Value:
    """ONNX integer division truncates; (a - a mod b) / b is exact, and Mod has the sign of the divisor."""
    top, bottom = emit_expression(g, a), emit_expression(g, b)
    return g.op("Div", g.op("Sub", top, g.op("Mod", top, bottom)), bottom)


def _ceil_divide(g: Emitter, a: Any, b: Any) -> ir.Value:
    return g.op("Neg", _floor_divide(g, -a, b))


def _power(g: Emitter, base: Any, exponent: Any) -> ir.Value:
    if not (exponent.is_Integer and int(exponent) >= 0):
        raise LoweringError(f"the size {base}**{exponent} is not lowered", hint="rewrite the model with whole sizes")
    return g.op("Pow", emit_expression(g, base), g.ints([int(exponent)]))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": _fold("Add"),
    "Mul": _fold("Mul"),
    "Max": _fold("Max"),
    "Min": _fold("Min"),
    "Mod": _fold("Mod"),
    "PythonMod": _fold("Mod"),
    "FloorDiv": _floor_divide,
    "CleanDiv": _floor_divide,
    "CeilDiv": _ceil_divide,
    "CeilToInt": lambda g, x: _rounded(g, x, "Ceil"),
    "FloorToInt": lambda g, x: _rounded(g, x, "Floor"),
    "TruncToInt": lambda g, x: _truncated(g, x),
    "Pow": _power,
    "PowByNatural": _power,
}


# -- symbolic floats (batch / 2): rare, as scalars of type double ----------------------------------------------------


def emit_float(g: Emitter, expression: Any) -> ir.Value:
    """A real sympy expression over the inputs' symbols, as a double tensor of shape [1]."""
    name = type(expression).__name__
    if expression.is_Symbol or (expression.is_integer and name in _FUNCTIONS):
        return g.cast_value(emit_expression(g, expression), torch.float64)
    if expression.is_number:
        return g.constant(torch.tensor([float(expression)], dtype=torch.float64))
    if name in ("ToFloat", "Identity"):
        return emit_float(g, expression.args[0])
    if name not in _FLOAT_OPS:
        raise LoweringError(
            f"the value {expression} uses {name}, which is not lowered", hint="add it to backends/onnx/sizes.py"
        )
    first, *rest = (emit_float(g, a) for a in expression.args)
    for item in rest:
        first = g.op(_FLOAT_OPS[name], first, item)
    return first


_FLOAT_OPS = {
    "Add": "Add",
    "Mul": "Mul",
    "IntTrueDiv": "Div",
    "FloatTrueDiv": "Div",
    "Pow": "Pow",
    "FloatPow": "Pow",
    "OpaqueUnaryFn_sqrt": "Sqrt",
    "Max": "Max",
    "Min": "Min",
}


def _rounded(g: Emitter, x: Any, op: str) -> ir.Value:
    return g.cast_value(g.op(op, emit_float(g, x)), torch.int64)


def _truncated(g: Emitter, x: Any) -> ir.Value:
    return g.cast_value(emit_float(g, x), torch.int64)
