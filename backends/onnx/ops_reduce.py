"""Sums, means, extrema and their kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand, positive
from .sizes import Size
from .table import row

Dims = Sequence[int] | int | None


def _axes(g: Emitter, x: Operand, dim: Dims) -> list[int]:
    """Axes counted from the front; None and [] mean all."""
    given = [dim] if isinstance(dim, int) else list(dim or [])
    return sorted(positive(d, x.rank) for d in given) or list(range(x.rank))


def _reduce(g: Emitter, op: str, value: Value, axes: list[int], keepdim: bool) -> Value:
    return g.op(op, value, g.ints(axes), keepdims=int(keepdim)) if axes else value


# -- mean -----------------------------------------------------------------------------------------------------------


@row("aten.mean.dim", "aten.mean.default")
def mean(g: Emitter, x: Operand, dtype: torch.dtype | None, dim: Dims = None, keepdim: bool = False) -> Value:
    """GlobalAveragePool where all but the first two dimensions are averaged (it has an integer kernel)."""
    axes = _axes(g, x, dim)
    value = g.cast(x, g.result.dtype)
    if x.rank in (4, 5) and axes == list(range(2, x.rank)):
        pooled = g.op("GlobalAveragePool", value)
        ones: list[Size] = [1] * (x.rank - 2)
        return pooled if keepdim else g.reshape(pooled, [*x.shape[:2], *ones], g.result.shape)
    return _reduce(g, "ReduceMean", value, axes, keepdim)


# -- sums and norms -------------------------------------------------------------------------------------------------


@row("aten.sum.dim_IntList", "aten.sum.default")
def sum(g: Emitter, x: Operand, dtype: torch.dtype | None, dim: Dims = None, keepdim: bool = False) -> Value:
    """ReduceSum; integers and booleans are summed as int64."""
    return _reduce(g, "ReduceSum", g.cast(x, g.result.dtype), _axes(g, x, dim), keepdim)


@row("aten.prod.dim_int", "aten.prod.default")
def prod(g: Emitter, x: Operand, dtype: torch.dtype | None, dim: Dims = None, keepdim: bool = False) -> Value:
    return _reduce(g, "ReduceProd", g.cast(x, g.result.dtype), _axes(g, x, dim), keepdim)


@row("aten.logsumexp.default")
def logsumexp(g: Emitter, x: Operand, dim: Dims, keepdim: bool) -> Value:
    return _reduce(g, "ReduceLogSumExp", x.value, _axes(g, x, dim), keepdim)


@row("aten.linalg_vector_norm.default")
def vector_norm(g: Emitter, x: Operand, ord: Number, dim: Dims, keepdim: bool, dtype: torch.dtype | None) -> Value:
    """The 1-, 2-, infinity- and p-norms."""
    axes, value = _axes(g, x, dim), g.cast(x, g.result.dtype)
    if ord == 2:
        return _reduce(g, "ReduceL2", value, axes, keepdim)
    if ord == 1:
        return _reduce(g, "ReduceL1", value, axes, keepdim)
    if isinstance(ord, float) and abs(ord) == float("inf"):
        return _reduce(g, "ReduceMax" if ord > 0 else "ReduceMin", g.op("Abs", value), axes, keepdim)
    if ord == 0:
        raise g.reject("the 0-norm is not lowered", hint="write (x != 0).sum()")
    power = g.op("Pow", g.op("Abs", value), g.number(ord, g.result.dtype))
    total = _reduce(g, "ReduceSum", power, axes, keepdim)
    return g.op("Pow", total, g.scalar(1 / float(ord), g.result.dtype))


@row("aten.norm.ScalarOpt_dim", "aten.norm.Scalar")
def norm(g: Emitter, x: Operand, p: Number | None, dim: Dims = None, keepdim: bool = False) -> Value:
    return vector_norm(g, x, 2 if p is None else p, dim, keepdim, None)


# -- variance -------------------------------------------------------------------------------------------------------


def _variance(g: Emitter, x: Operand, axes: list[int], correction: Number, keepdim: bool) -> tuple[Value, Value]:
    """(variance, mean): sum of squared differences over n - correction."""
    center = _reduce(g, "ReduceMean", x.value, axes, True)
    difference = g.op("Sub", x, center)
    total = _reduce(g, "ReduceSum", g.op("Mul", difference, difference), axes, keepdim)
    count: Size = 1
    for axis in axes:
        count = count * x.shape[axis]
    if isinstance(count, int):
        divisor = g.scalar(max(count - float(correction), 0.0), x.dtype)
    else:
        divisor = g.op("Sub", g.number(count, x.dtype), g.number(correction, x.dtype))
    average = center if keepdim else _reduce(g, "ReduceMean", x.value, axes, False)
    return g.op("Div", total, divisor), average


def _correction(correction: Number | None, unbiased: bool) -> Number:
    return (1 if unbiased else 0) if correction is None else correction


@row("aten.var.correction", "aten.var.dim", "aten.var.default")
def var(
    g: Emitter,
    x: Operand,
    dim: Dims = None,
    correction: Number | None = None,
    keepdim: bool = False,
    unbiased: bool = True,
) -> Value:
    return _variance(g, x, _axes(g, x, dim), _correction(correction, unbiased), keepdim)[0]


@row("aten.std.correction", "aten.std.dim", "aten.std.default")
def std(
    g: Emitter,
    x: Operand,
    dim: Dims = None,
    correction: Number | None = None,
    keepdim: bool = False,
    unbiased: bool = True,
) -> Value:
    return g.op("Sqrt", var(g, x, dim, correction, keepdim, unbiased))


# -- extrema --------------------------------------------------------------------------------------------------------


def _extremum(name: str, op: str) -> Callable[..., Value]:
    def emit(g: Emitter, x: Operand, dim: Dims = None, keepdim: bool = False) -> Value:
        return _reduce(g, op, x.value, _axes(g, x, dim), keepdim)

    emit.__doc__ = f"{op}."
    emit.__qualname__ = emit.__name__ = name
    return emit


row("aten.amax.default", "aten.max.default")(_extremum("amax", "ReduceMax"))
row("aten.amin.default", "aten.min.default")(_extremum("amin", "ReduceMin"))


def _extremum_with_place(name: str, op: str, arg: str) -> Callable[..., tuple[Value, Value]]:
    def emit(g: Emitter, x: Operand, dim: int, keepdim: bool) -> tuple[Value, Value]:
        axis = positive(dim, x.rank)
        return _reduce(g, op, x.value, [axis], keepdim), g.op(arg, x, axis=axis, keepdims=int(keepdim))

    emit.__doc__ = f"{op} and {arg}."
    emit.__qualname__ = emit.__name__ = name
    return emit


row("aten.max.dim")(_extremum_with_place("max_dim", "ReduceMax", "ArgMax"))
row("aten.min.dim")(_extremum_with_place("min_dim", "ReduceMin", "ArgMin"))


def _place(name: str, op: str) -> Callable[..., Value]:
    def emit(g: Emitter, x: Operand, dim: int | None, keepdim: bool) -> Value:
        if dim is not None:
            return g.op(op, x, axis=positive(dim, x.rank), keepdims=int(keepdim))
        flat = g.op("Reshape", x, g.ints([-1]))
        place = g.op(op, flat, axis=0, keepdims=0)
        return g.reshape(place, [], [1] * x.rank) if keepdim else place

    emit.__doc__ = f"{op}; without dim over the flattened tensor."
    emit.__qualname__ = emit.__name__ = name
    return emit


row("aten.argmax.default")(_place("argmax", "ArgMax"))
row("aten.argmin.default")(_place("argmin", "ArgMin"))


def _truth(name: str, op: str) -> Callable[..., Value]:
    def emit(g: Emitter, x: Operand, dim: Dims = None, keepdim: bool = False) -> Value:
        number = g.cast_value(g.cast(x, torch.bool), torch.int32)
        return g.cast_value(_reduce(g, op, number, _axes(g, x, dim), keepdim), torch.bool)

    emit.__doc__ = f"{op} of 0 and 1."
    emit.__qualname__ = emit.__name__ = name
    return emit


row("aten.any.default", "aten.any.dim", "aten.any.dims")(_truth("any", "ReduceMax"))
row("aten.all.default", "aten.all.dim", "aten.all.dims")(_truth("all", "ReduceMin"))


@row("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")
def count_nonzero(g: Emitter, x: Operand, dim: Dims = None) -> Value:
    return _reduce(g, "ReduceSum", g.cast_value(g.cast(x, torch.bool), torch.int64), _axes(g, x, dim), False)


@row("aten.topk.default")
def topk(g: Emitter, x: Operand, k: Size, dim: int, largest: bool, sorted: bool) -> list[Value]:
    return g.ops("TopK", 2, x, g.size(k), axis=positive(dim, x.rank), largest=int(largest), sorted=int(sorted))


@row("aten.sort.default", "aten.sort.stable")
def sort(g: Emitter, x: Operand, dim: int, descending: bool, stable: bool = False) -> list[Value]:
    """TopK of all; ONNX puts the lower index first among equals, as a stable sort does."""
    axis = positive(dim, x.rank)
    return g.ops("TopK", 2, x, g.size(x.shape[axis]), axis=axis, largest=int(descending), sorted=1)


@row("aten.argsort.default", "aten.argsort.stable")
def argsort(g: Emitter, x: Operand, dim: int, descending: bool, stable: bool = False) -> Value:
    return sort(g, x, dim, descending, stable)[1]


@row("aten.cumsum.default")
def cumsum(g: Emitter, x: Operand, dim: int, dtype: torch.dtype | None) -> Value:
    return g.op("CumSum", g.cast(x, g.result.dtype), g.scalar(positive(dim, x.rank), torch.int64))
