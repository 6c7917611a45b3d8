"""Cutting tensors apart and putting them together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Operand, positive
from .ops_shape import is_whole
from .sizes import Size
from .table import row


@row("aten.cat.default", "aten.concat.default")
def cat(g: Emitter, tensors: Sequence[Operand], dim: int) -> Value:
    """Concat in the promoted type. torch lets empty vectors through; they add nothing."""
    parts = [t for t in tensors if not (t.rank == 1 and g.result.ndim > 1)]
    values = [g.cast(t, g.result.dtype) for t in parts]
    return values[0] if len(values) == 1 else g.op("Concat", *values, axis=positive(dim, g.result.ndim))


@row("aten.hstack.default")
def hstack(g: Emitter, tensors: Sequence[Operand]) -> Value:
    return cat(g, tensors, 0 if g.result.ndim == 1 else 1)


@row("aten.stack.default")
def stack(g: Emitter, tensors: Sequence[Operand], dim: int) -> Value:
    axis = positive(dim, g.result.ndim)
    parts = [g.op("Unsqueeze", g.cast(t, g.result.dtype), g.ints([axis])) for t in tensors]
    return g.op("Concat", *parts, axis=axis)


@row(
    "aten.split.Tensor",
    "aten.split.default",
    "aten.split.sizes",
    "aten.split_with_sizes.default",
    "aten.chunk.default",
    "aten.tensor_split.sections",
    "aten.tensor_split.indices",
)
def split(
    g: Emitter,
    x: Operand,
    dim: int,
    split_size: object = None,
    split_sizes: object = None,
    chunks: object = None,
    sections: object = None,
    indices: object = None,
) -> list[Value]:
    """Split. However the pieces were asked for, the graph knows their sizes."""
    axis = positive(dim, x.rank)
    if len(g.results) == 1:
        return [x.value]
    pieces: list[Size] = [r.shape[axis] for r in g.results]
    return g.ops("Split", len(pieces), x, g.sizes(pieces), axis=axis)


@row("aten.unbind.int")
def unbind(g: Emitter, x: Operand, dim: int) -> list[Value]:
    """One Gather a piece: fewer nodes than Split and Squeeze."""
    axis = positive(dim, x.rank)
    return [g.op("Gather", x, g.scalar(i, torch.int64), axis=axis) for i in range(len(g.results))]


@row("aten.select.int")
def select(g: Emitter, x: Operand, dim: int, index: Size) -> Value:
    """Gather with a scalar index; negative ones count from the end in both."""
    return g.op("Gather", x, g.number(index, torch.int64), axis=positive(dim, x.rank))


@row("aten.slice.Tensor")
def slice_tensor(g: Emitter, x: Operand, dim: int, start: Size | None, end: Size | None, step: int) -> Value:
    """Slice; bounds beyond the dimension are clamped in both. Slices of several dims in a row are one node."""
    axis = positive(dim, x.rank)
    first, last = 0 if start is None else start, 2**63 - 1 if end is None else end
    if step == 1 and isinstance(first, int) and isinstance(last, int) and is_whole(first, last, x.shape[axis]):
        return x.value
    if not isinstance(first, int) or not isinstance(last, int):
        return g.op("Slice", x, g.size(first), g.size(last), g.ints([axis]), g.ints([step]))
    source, cuts = x.value.meta.get(_CUTS, (x.value, {}))
    if axis in cuts or not _only_reader(g):
        source, cuts = x.value, {}
    cuts = {**cuts, axis: (first, last, step)}
    firsts, lasts, steps = (g.ints(list(part)) for part in zip(*cuts.values()))
    value = g.op("Slice", source, firsts, lasts, g.ints(list(cuts)), steps)
    value.meta[_CUTS] = (source, cuts)
    return value


# On the output of a Slice: what it cuts from, and (first, last, step) by axis.
_CUTS = "fxpress.cuts"


def _only_reader(g: Emitter) -> bool:
    """Is the node being lowered the only one that reads its first argument?"""
    assert g.node is not None
    return len(g.node.all_input_nodes[0].users) == 1


@row("aten.narrow.default")
def narrow(g: Emitter, x: Operand, dim: int, start: Size, length: Size) -> Value:
    if isinstance(start, int) and start < 0:
        size = x.shape[dim]
        start = size + start
    return slice_tensor(g, x, dim, start, start + length, 1)


@row("aten.diagonal.default")
def diagonal(g: Emitter, x: Operand, offset: int, dim1: int, dim2: int) -> Value:
    """The diagonal of two dimensions, as the last one of the result."""
    a, b = positive(dim1, x.rank), positive(dim2, x.rank)
    rest = [d for d in range(x.rank) if d not in (a, b)]
    count = g.result.shape[-1]
    if not isinstance(count, int):
        raise g.reject("a diagonal of unknown length is not lowered", hint="give the matrix a fixed size")
    value = g.op("Transpose", x, perm=[a, b, *rest])
    rows = torch.arange(count) + max(-offset, 0)
    places = torch.stack([rows, torch.arange(count) + max(offset, 0)], dim=1)
    value = g.op("GatherND", value, g.constant(places))
    return g.op("Transpose", value, perm=[*range(1, len(rest) + 1), 0]) if rest else value


@row("aten.unfold.default")
def unfold(g: Emitter, x: Operand, dimension: int, size: int, step: int) -> Value:
    """Windows of one dimension, as a new last dimension: Gather by a table of positions."""
    axis = positive(dimension, x.rank)
    count = g.result.shape[axis]
    if not isinstance(count, int):
        raise g.reject("unfold of a dimension of unknown size is not lowered", hint="fix this size")
    table = torch.arange(count)[:, None] * step + torch.arange(size)
    value = g.op("Gather", x, g.constant(table), axis=axis)
    order = [d for d in range(x.rank + 1) if d != axis + 1]
    return g.op("Transpose", value, perm=[*order, axis + 1])


@row("aten.im2col.default")
def im2col(
    g: Emitter,
    x: Operand,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """[B, C, H, W] -> [B, C * kh * kw, places]: pad, gather rows, gather columns."""
    height, width = x.shape[-2:]
    if x.rank != 4 or not isinstance(height, int) or not isinstance(width, int):
        raise g.reject("unfolding an image needs [B, C, H, W] with known H and W", hint="fix these sizes")
    tables = [
        _window_table(size + 2 * p, k, d, s)
        for size, p, k, d, s in zip((height, width), padding, kernel_size, dilation, stride)
    ]
    pads = [0, 0, *padding]
    value = g.op("Pad", x, g.ints(pads + pads)) if any(padding) else x.value
    value = g.op("Gather", value, g.constant(tables[0]), axis=2)  # [B, C, kh, oh, W]
    value = g.op("Gather", value, g.constant(tables[1]), axis=4)  # [B, C, kh, oh, kw, ow]
    value = g.op("Transpose", value, perm=[0, 1, 2, 4, 3, 5])
    return g.op("Reshape", value, g.ints([-1, *[int(s) for s in g.result.shape[1:]]]))


@row("aten.col2im.default")
def col2im(
    g: Emitter,
    x: Operand,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """Col2Im: overlapping windows are summed."""
    if x.rank != 3:
        raise g.reject("folding without a batch dimension is not lowered", hint="add a batch dimension")
    return g.op(
        "Col2Im",
        x,
        g.ints(output_size),
        g.ints(kernel_size),
        dilations=list(dilation),
        pads=[*padding, *padding],
        strides=list(stride),
    )


def _window_table(size: int, kernel: int, dilation: int, stride: int) -> torch.Tensor:
    """[kernel, places]: which position the k-th tap of each window reads."""
    places = (size - dilation * (kernel - 1) - 1) // stride + 1
    return torch.arange(kernel)[:, None] * dilation + torch.arange(places) * stride


# -- writing a part -------------------------------------------------------------------------------------------------


@row("aten.slice_scatter.default")
def slice_scatter(
    g: Emitter, x: Operand, src: Operand, dim: int, start: Size | None, end: Size | None, step: int
) -> Value:
    """x with x[start:end] replaced: what lies before, the source, what lies after."""
    axis = positive(dim, x.rank)
    size, length = x.shape[axis], src.shape[axis]
    if step != 1:
        return _strided_scatter(g, x, src, axis, start, step)
    first = 0 if start is None else start
    if isinstance(first, int) and first < 0:
        first = size + first
    return _replaced(g, x, g.cast(src, x.dtype), axis, first, first + length)


def _replaced(g: Emitter, x: Operand, part: Value, axis: int, first: Size, after: Size) -> Value:
    size = x.shape[axis]
    axes = g.ints([axis])
    parts = [part]
    if not (isinstance(first, int) and first == 0):
        parts.insert(0, g.op("Slice", x, g.ints([0]), g.size(first), axes))
    if not (isinstance(after, int) and isinstance(size, int) and after >= size):
        parts.append(g.op("Slice", x, g.size(after), g.ints([2**63 - 1]), axes))
    return part if len(parts) == 1 else g.op("Concat", *parts, axis=axis)


def _strided_scatter(g: Emitter, x: Operand, src: Operand, axis: int, start: Size | None, step: int) -> Value:
    count, first = src.shape[axis], 0 if start is None else start
    if not isinstance(count, int) or not isinstance(first, int) or first < 0:
        raise g.reject("writing every n-th entry of an unknown size is not lowered", hint="fix this size")
    order = [axis, *[d for d in range(x.rank) if d != axis]]
    back = [order.index(d) for d in range(x.rank)]
    places = g.constant((torch.arange(count) * step + first)[:, None])
    values = g.op("Transpose", g.cast(src, x.dtype), perm=order)
    written = g.op("ScatterND", g.op("Transpose", x, perm=order), places, values)
    return g.op("Transpose", written, perm=back)


@row("aten.select_scatter.default")
def select_scatter(g: Emitter, x: Operand, src: Operand, dim: int, index: Size) -> Value:
    """x with x[index] replaced."""
    axis = positive(dim, x.rank)
    first = x.shape[axis] + index if isinstance(index, int) and index < 0 else index
    part = g.op("Unsqueeze", g.cast(src, x.dtype), g.ints([axis]))
    return _replaced(g, x, part, axis, first, first + 1)


@row("aten.diff.default")
def diff(g: Emitter, x: Operand, n: int, dim: int, prepend: Operand | None, append: Operand | None) -> Value:
    """x[1:] - x[:-1] along a dimension, after what is put before and behind."""
    if n != 1 or x.dtype is torch.bool:
        raise g.reject("only first differences of numbers are lowered")
    axis = positive(dim, x.rank)
    parts = [p for p in (prepend, x, append) if p is not None]
    value = x.value if len(parts) == 1 else g.op("Concat", *parts, axis=axis)
    ends = [g.op("Slice", value, g.ints([a]), g.ints([b]), g.ints([axis])) for a, b in ((1, 2**63 - 1), (0, -1))]
    return g.op("Sub", *ends)
