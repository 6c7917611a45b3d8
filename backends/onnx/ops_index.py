"""Reading and writing by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand, positive
from .ops_linear import broadcast_shapes
from .sizes import Size
from .table import row

Indices = Sequence[Operand | None]


@row("aten.index_select.default")
def index_select(g: Emitter, x: Operand, dim: int, index: Operand) -> Value:
    return g.op("Gather", x, index, axis=positive(dim, x.rank))


@row("aten.gather.default")
def gather(g: Emitter, x: Operand, dim: int, index: Operand, sparse_grad: bool) -> Value:
    """GatherElements."""
    return g.op("GatherElements", x, index, axis=positive(dim, x.rank))


@row("aten.index.Tensor")
def index(g: Emitter, x: Operand, indices: Indices) -> Value:
    """x[i, j, ...]: Gather for one index tensor, GatherND for several."""
    places = _integer_indices(g, indices)
    axes = list(places)
    if len(axes) == 1:
        return g.op("Gather", x, places[axes[0]], axis=axes[0])
    rest = [d for d in range(x.rank) if d not in axes]
    value = x.value if axes == list(range(len(axes))) else g.op("Transpose", x, perm=axes + rest)
    table, count = _index_table(g, list(places.values()))
    return _indices_in_place(g, g.op("GatherND", value, table), axes, rest, count)


def _integer_indices(g: Emitter, indices: Indices) -> dict[int, Operand]:
    """Axis -> index tensor. A mask is only possible where its contents are known now."""
    places: dict[int, Operand] = {}
    axis = 0
    for item in indices:
        if item is None:
            axis += 1
        elif item.dtype in (torch.bool, torch.uint8):
            for part in _mask_positions(g, item):
                places[axis] = part
                axis += 1
        else:
            places[axis] = item
            axis += 1
    return places


def _mask_positions(g: Emitter, mask: Operand) -> list[Operand]:
    if mask.contents is None:
        raise g.reject(
            "indexing by a mask gives a size that depends on data", hint="use torch.where or multiply by the mask"
        )
    return [Operand(g.constant(p), p, p) for p in mask.contents.nonzero(as_tuple=True)]


def _index_table(g: Emitter, places: list[Operand]) -> tuple[Value, int]:
    """Index tensors, broadcast and stacked as the last dimension; and the rank they broadcast to."""
    shape = broadcast_shapes(*[p.shape for p in places])
    last = g.ints([len(shape)])
    parts = [g.op("Unsqueeze", g.expand(g.cast(p, torch.int64), p.shape, shape), last) for p in places]
    return g.op("Concat", *parts, axis=len(shape)), len(shape)


def _indices_in_place(g: Emitter, value: Value, axes: list[int], rest: list[int], count: int) -> Value:
    """The dimensions of the indices stand in front; torch leaves them where adjacent index tensors stood."""
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    before = sum(d < axes[0] for d in rest) if adjacent else 0
    if before == 0:
        return value
    total = count + len(rest)
    perm = [*range(count, count + before), *range(count), *range(count + before, total)]
    return g.op("Transpose", value, perm=perm)


@row("aten.index_put.default")
def index_put(g: Emitter, x: Operand, indices: Indices, values: Operand, accumulate: bool) -> Value:
    """ScatterND; a mask with one value is Where."""
    first = indices[0]
    if len(indices) == 1 and first is not None and first.dtype == torch.bool and first.contents is None:
        return _masked_put(g, x, first, values, accumulate)
    places = _integer_indices(g, indices)
    axes = list(places)
    if axes != list(range(len(axes))):
        raise g.reject("writing by index tensors past the first dimensions is not lowered", hint="permute first")
    table, _ = _index_table(g, list(places.values()))
    shape = [*broadcast_shapes(*[p.shape for p in places.values()]), *x.shape[len(axes) :]]
    updates = g.expand(g.cast(values, x.dtype), values.shape, shape)
    return g.op("ScatterND", x, table, updates, reduction="add" if accumulate else None)


def _masked_put(g: Emitter, x: Operand, mask: Operand, values: Operand, accumulate: bool) -> Value:
    if values.form.numel() != 1 or accumulate:
        raise g.reject("writing several values by a mask is not lowered", hint="use torch.where")
    wide = g.reshape(mask, mask.shape, [*mask.shape, *[1] * (x.rank - mask.rank)])
    return g.op("Where", wide, g.op("Squeeze", g.cast(values, x.dtype)), x)


@row("aten.scatter.src", "aten.scatter.value")
def scatter(g: Emitter, x: Operand, dim: int, index: Operand, src: Operand | None = None, value: Number = 0) -> Value:
    """ScatterElements; torch reads as much of the source as the index has."""
    updates = g.filled(value, x.dtype, index.shape) if src is None else _as_large_as(g, src, index, x.dtype)
    return g.op("ScatterElements", x, index, updates, axis=positive(dim, x.rank))


@row("aten.scatter_add.default")
def scatter_add(g: Emitter, x: Operand, dim: int, index: Operand, src: Operand) -> Value:
    updates = _as_large_as(g, src, index, x.dtype)
    return g.op("ScatterElements", x, index, updates, axis=positive(dim, x.rank), reduction="add")


def _as_large_as(g: Emitter, src: Operand, index: Operand, dtype: torch.dtype) -> Value:
    value = g.cast(src, dtype)
    larger = [i for i in range(index.rank) if str(src.shape[i]) != str(index.shape[i])]
    if not larger:
        return value
    ends: list[Size] = [index.shape[i] for i in larger]
    return g.op("Slice", value, g.ints([0] * len(larger)), g.sizes(ends), g.ints(larger))


@row("aten.one_hot.default")
def one_hot(g: Emitter, x: Operand, num_classes: int) -> Value:
    if num_classes < 0:
        raise g.reject("one_hot without num_classes depends on data", hint="give num_classes")
    return g.op("OneHot", x, g.scalar(num_classes, torch.int64), g.constant(torch.tensor([0, 1])), axis=-1)


@row("aten.tril.default", "aten.triu.default")
def triangle(g: Emitter, x: Operand, diagonal: int) -> Value:
    """Trilu."""
    upper = "triu" in str(g.node.target)  # type: ignore[union-attr]
    k = g.scalar(diagonal, torch.int64)
    if x.dtype != torch.bool:
        return g.op("Trilu", x, k, upper=int(upper))
    wide = replace(x, value=g.cast(x, torch.int64))
    return g.cast_value(g.op("Trilu", wide, k, upper=int(upper)), torch.bool)
