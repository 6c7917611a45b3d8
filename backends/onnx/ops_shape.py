"""Views, permutations and casts. Most reshapes need nothing but the result's shape, which the graph knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Operand, positive
from .sizes import Size, is_one, same_size
from .table import row


def _reshape_to_result(g: Emitter, x: Operand) -> Value:
    return g.reshape(x, x.shape, g.result.shape)


@row("aten.reshape.default", "aten.view.default", "aten._unsafe_view.default")
def reshape(g: Emitter, x: Operand, shape: Sequence[Size] = (), size: Sequence[Size] = ()) -> Value:
    """Reshape; view calls the shape a size."""
    return _reshape_to_result(g, x)


@row("aten.view_as.default", "aten.reshape_as.default")
def view_as(g: Emitter, x: Operand, other: Operand) -> Value:
    return _reshape_to_result(g, x)


@row("aten.flatten.using_ints")
def flatten(g: Emitter, x: Operand, start_dim: int, end_dim: int) -> Value:
    return _reshape_to_result(g, x)


@row("aten.unflatten.int")
def unflatten(g: Emitter, x: Operand, dim: int, sizes: Sequence[Size]) -> Value:
    return _reshape_to_result(g, x)


@row("aten.unsqueeze.default")
def unsqueeze(g: Emitter, x: Operand, dim: int) -> Value:
    return g.op("Unsqueeze", x, g.ints([positive(dim, x.rank + 1)]))


@row("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(g: Emitter, x: Operand, dim: int | Sequence[int]) -> Value:
    """Only dimensions of size 1 go; a symbolic size is never 1."""
    dims = [positive(d, x.rank) for d in ([dim] if isinstance(dim, int) else dim)]
    gone = [d for d in dims if x.rank and is_one(x.shape[d])]
    return g.op("Squeeze", x, g.ints(gone)) if gone else x.value


@row("aten.squeeze.default")
def squeeze_all(g: Emitter, x: Operand) -> Value:
    return squeeze(g, x, list(range(x.rank)))


# -- permutations ---------------------------------------------------------------------------------------------------


def _permute(g: Emitter, x: Operand, perm: list[int]) -> Value:
    return x.value if perm == list(range(x.rank)) else g.op("Transpose", x, perm=perm)


@row("aten.permute.default")
def permute(g: Emitter, x: Operand, dims: Sequence[int]) -> Value:
    return _permute(g, x, [positive(d, x.rank) for d in dims])


@row("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(
    g: Emitter, x: Operand, dim0: int | None = None, dim1: int | None = None,
    axis0: int | None = None, axis1: int | None = None,
) -> Value:  # fmt: skip
    """Swap two dimensions; swapaxes names them otherwise."""
    a, b = (positive(int(d), x.rank) for d in (dim0, axis0, dim1, axis1) if d is not None)
    perm = list(range(x.rank))
    if perm:
        perm[a], perm[b] = b, a
    return _permute(g, x, perm)


@row("aten.t.default", "aten.numpy_T.default")
def reverse_axes(g: Emitter, x: Operand) -> Value:
    return _permute(g, x, list(range(x.rank))[::-1])


@row("aten.mT.default", "aten.adjoint.default")
def matrix_transpose(g: Emitter, x: Operand) -> Value:
    return _permute(g, x, [*range(x.rank - 2), x.rank - 1, x.rank - 2])


@row("aten.movedim.int", "aten.movedim.intlist")
def movedim(g: Emitter, x: Operand, source: int | Sequence[int], destination: int | Sequence[int]) -> Value:
    sources = [positive(d, x.rank) for d in ([source] if isinstance(source, int) else source)]
    targets = [positive(d, x.rank) for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(d for d in range(x.rank) if d not in sources)
    placed = dict(zip(targets, sources))
    return _permute(g, x, [placed[i] if i in placed else next(rest) for i in range(x.rank)])


@row("aten.flip.default")
def flip(g: Emitter, x: Operand, dims: Sequence[int]) -> Value:
    """Slice backwards."""
    count = len(dims)
    return g.op("Slice", x, g.ints([-1] * count), g.ints([-(2**63)] * count), g.ints(dims), g.ints([-1] * count))


@row("aten.roll.default")
def roll(g: Emitter, x: Operand, shifts: Sequence[int], dims: Sequence[int]) -> Value:
    """The last `shift` entries come first; without dims the tensor is rolled as one vector."""
    if not dims:
        flat = g.op("Reshape", x, g.ints([-1]))
        return g.reshape(_rolled(g, flat, shifts[0], 0, _count(g, x)), [-1], x.shape)
    value = x.value
    for shift, dim in zip(shifts, dims):
        value = _rolled(g, value, shift, positive(dim, x.rank), x.shape[dim])
    return value


def _count(g: Emitter, x: Operand) -> Size:
    count: Size = 1
    for size in x.shape:
        count = count * size
    return count


def _rolled(g: Emitter, value: Value, shift: int, dim: int, size: Size) -> Value:
    """A symbolic size is not needed as long as the shift is less than it: slices count from the end."""
    cut = -(shift % size) if isinstance(size, int) else -shift
    if cut == 0:
        return value
    axes = g.ints([dim])
    tail = g.op("Slice", value, g.ints([cut]), g.ints([2**63 - 1]), axes)
    head = g.op("Slice", value, g.ints([0]), g.ints([cut]), axes)
    return g.op("Concat", tail, head, axis=dim)


# -- repetition -----------------------------------------------------------------------------------------------------


@row("aten.expand.default")
def expand(g: Emitter, x: Operand, size: Sequence[Size]) -> Value:
    return g.expand(x, x.shape, g.result.shape)


@row("aten.expand_as.default", "aten.broadcast_to.default")
def expand_as(g: Emitter, x: Operand, other: Operand | None = None, size: Sequence[Size] = ()) -> Value:
    return g.expand(x, x.shape, g.result.shape)


@row("aten.repeat.default", "aten.tile.default")
def repeat(g: Emitter, x: Operand, repeats: Sequence[Size] = (), dims: Sequence[Size] = ()) -> Value:
    """Tile, after dimensions of size 1 are put in front."""
    counts = list(repeats or dims)
    rank = max(len(counts), x.rank)
    counts = [1] * (rank - len(counts)) + counts
    value = g.reshape(x, x.shape, [1] * (rank - x.rank) + list(x.shape))
    return value if all(is_one(c) for c in counts) else g.op("Tile", value, g.sizes(counts))


@row("aten.repeat_interleave.self_int")
def repeat_interleave(g: Emitter, x: Operand, repeats: int, dim: int | None) -> Value:
    """[.., n, ..] -> [.., n, 1, ..] -> [.., n, r, ..] -> [.., n * r, ..]."""
    value, shape = x.value, list(x.shape)
    if dim is None:
        value, shape = g.op("Reshape", x, g.ints([-1])), [_count(g, x)]
    axis = positive(dim or 0, len(shape))
    value = g.op("Unsqueeze", value, g.ints([axis + 1]))
    counts: list[Size] = [1] * (len(shape) + 1)
    counts[axis + 1] = repeats
    value = g.op("Expand", value, g.sizes(counts))
    expanded = [*shape[: axis + 1], repeats, *shape[axis + 1 :]]
    return g.reshape(value, expanded, g.result.shape)


# -- copies and casts -----------------------------------------------------------------------------------------------


@row("aten.contiguous.default", "aten.clone.default", "aten.alias.default", "aten.detach.default")
def same(g: Emitter, x: Operand) -> Value:
    return g.cast(x, g.result.dtype)


@row("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device")
def to_dtype(g: Emitter, x: Operand, dtype: torch.dtype | None = None) -> Value:
    return g.cast(x, g.result.dtype)


@row("aten.type_as.default", "aten.to.other")
def type_as(g: Emitter, x: Operand, other: Operand) -> Value:
    return g.cast(x, g.result.dtype)


@row("aten.copy.default")
def copy(g: Emitter, x: Operand, src: Operand) -> Value:
    """The source in the form of x."""
    return g.expand(g.cast(src, x.dtype), src.shape, x.shape)


def is_whole(start: int, stop: int, size: Size) -> bool:
    """Does [start, stop) cover a dimension?"""
    return start == 0 and (stop >= 2**63 - 1 or same_size(stop, size) or (isinstance(size, int) and stop >= size))
