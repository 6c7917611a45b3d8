"""Rules of ops that move positions: cat, split, slice, flip, roll, gather by constant indices, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ....frontend.program import get_attribute
from ...rewrite import argument, argument_names
from ..analysis import Analysis, IndexMap, concrete, op_name, rows, shape_of
from ..axes import Axes, Vector


def cat(analysis: Analysis, node: fx.Node) -> Axes:
    """The sum of axes along one dimension; the others are shared."""
    every = [analysis.axes(n) for n in node.args[0]]  # type: ignore[union-attr]
    parts = [axes for axes in every if axes and len(axes[0])]
    dim = argument(node, "dim") % len(parts[0])
    for axes in parts[1:]:
        for i, (mine, first) in enumerate(zip(axes, parts[0])):
            if i != dim and mine is not first:
                analysis.same(first, mine, node)
    result = list(parts[0])
    result[dim] = np.concatenate([axes[dim] for axes in parts])
    return tuple(result)


def stack(analysis: Analysis, node: fx.Node) -> Axes:
    """A new dimension whose positions stay."""
    parts: list[Axes] = [analysis.axes(n) for n in node.args[0]]  # type: ignore[union-attr]
    for axes in parts[1:]:
        for mine, first in zip(axes, parts[0]):
            analysis.same(first, mine, node)
    dim = argument(node, "dim") % (len(parts[0]) + 1)
    return (*parts[0][:dim], analysis.atoms.fixed(len(parts)), *parts[0][dim:])


def split(analysis: Analysis, node: fx.Node) -> list[Axes]:
    """Consecutive pieces of one dimension, of the sizes that the node's value has."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim")
    sizes = [concrete(value.shape[dim]) for value in node.meta["val"]]
    starts = np.cumsum([0, *sizes])
    return [_replaced(axes, dim, axes[dim][a : a + n]) for a, n in zip(starts, sizes)]


def unbind(analysis: Analysis, node: fx.Node) -> list[Axes]:
    """One output for each position, so all of them stay."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim") % len(analysis.axes(node.args[0]))
    analysis.pin(axes[dim], node, "unbind gives one output for each position")
    return [axes[:dim] + axes[dim + 1 :]] * len(axes[dim])


def select(analysis: Analysis, node: fx.Node) -> Axes:
    """One position, by its number."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim") % len(analysis.axes(node.args[0]))
    analysis.pin(axes[dim], node, "select takes a position by its number")
    return axes[:dim] + axes[dim + 1 :]


def getitem(analysis: Analysis, node: fx.Node) -> Axes:
    """An output of an op that has several."""
    value = analysis.values[node.args[0]]  # type: ignore[index]
    assert isinstance(value, list)
    return value[node.args[1]]  # type: ignore[index]


def slice_(analysis: Analysis, node: fx.Node) -> Axes:
    """start:end:step along one dimension."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim")
    bounds = [argument(node, n) for n in ("start", "end", "step")]
    return _slice(analysis, node, axes, dim, bounds)


def narrow(analysis: Analysis, node: fx.Node) -> Axes:
    """`length` positions from `start` on."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim")
    start, length = argument(node, "start"), argument(node, "length")
    plain = isinstance(start, int) and isinstance(length, int)
    first = start % len(axes[dim]) if plain and start < 0 else start
    return _slice(analysis, node, axes, dim, [first, first + length if plain else None, 1 if plain else length])


def _slice(analysis: Analysis, node: fx.Node, axes: Axes, dim: int, bounds: list[Any]) -> Axes:
    if not axes[dim].any() or not all(b is None or isinstance(b, int) for b in bounds):
        analysis.pin(axes[dim], node, "sliced at a dynamic position")
        return _replaced(axes, dim, analysis.fixed(node)[dim])
    return _gather(analysis, node, axes, dim, np.arange(len(axes[dim]))[slice(*bounds)])


def flip(analysis: Analysis, node: fx.Node) -> Axes:
    """Reversed dimensions; what is kept is reversed with them, so no literal depends on it."""
    axes = list(analysis.axes(node.args[0]))
    for dim in argument(node, "dims"):
        axes[dim] = axes[dim][::-1]
    return tuple(axes)


def roll(analysis: Analysis, node: fx.Node) -> Axes:
    """Rotated dimensions. One that is rotated may be pruned: its shift is rewritten."""
    axes = analysis.axes(node.args[0])
    shifts, dims = argument(node, "shifts"), argument(node, "dims")
    moving = [d % len(axes) for d in dims if axes[d].any()]
    if not dims or len(moving) > 1 or not all(isinstance(s, int) for s in shifts):
        analysis.pin(axes if not dims else tuple(axes[d] for d in dims), node, "roll over several dimensions at once")
        return axes
    for shift, dim in zip(shifts, dims):
        if dim % len(axes) in moving:
            return _gather(analysis, node, axes, dim, np.roll(np.arange(len(axes[dim])), shift))
    return axes


def index_select(analysis: Analysis, node: fx.Node) -> Axes:
    """Positions by constant indices; by indices that depend on data, all positions stay."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim")
    indices = _constant_indices(analysis, argument(node, "index"), len(axes[dim]))
    if indices is None:
        analysis.pin(axes[dim], node, "indexed by values that are not constant")
        return _replaced(axes, dim, analysis.fixed(node)[dim])
    return _gather(analysis, node, axes, dim, indices)


def index(analysis: Analysis, node: fx.Node) -> Axes:
    """x[:, indices]: a gather where one dimension has constant indices, else the indexed dimensions stay."""
    axes, given = analysis.axes(node.args[0]), list(argument(node, "indices"))
    used = [i for i, n in enumerate(given) if n is not None]
    values = [_constant_indices(analysis, given[i], len(axes[i])) for i in used]
    if len(used) == 1 and values[0] is not None and values[0].ndim == 1:
        return _gather(analysis, node, axes, used[0], values[0])
    analysis.pin(tuple(axes[i] for i in used), node, "indexed by values that are not one constant vector")
    for i in used:
        analysis.pin(analysis.values.get(given[i], ()), node, "used as indices")  # type: ignore[arg-type]
    if any(given[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in used):
        analysis.pin(axes, node, "indexed by a mask")
        return analysis.fixed(node)
    return _indexed_axes(analysis, node, axes, used)


def _indexed_axes(analysis: Analysis, node: fx.Node, axes: Axes, used: list[int]) -> Axes:
    """Adjacent indices put their dimensions in the place of the first, others in front (as numpy has it)."""
    rest = [v for i, v in enumerate(axes) if i not in used]
    count = len(shape_of(node)) - len(rest)
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return (*rest[:place], *analysis.fixed(node, slice(place, place + count)), *rest[place:])


def diagonal_mask(analysis: Analysis, node: fx.Node) -> Axes:
    """`tril` and `triu`: which values stay depends on the positions in the last two dimensions."""
    axes = analysis.axes(node.args[0])
    analysis.pin(axes[-2:], node, f"{op_name(node)} compares positions of it")
    return axes


def gather(analysis: Analysis, node: fx.Node) -> Axes:
    """Positions along `dim` by indices, for each position of the other dimensions by itself."""
    axes, index = analysis.axes(node.args[0]), analysis.need(node, "index")
    _beside(analysis, node, axes, index, argument(node, "dim"))
    return index


def scatter(analysis: Analysis, node: fx.Node) -> Axes:
    """Values are written or added at positions along `dim`; `index_add` and friends have one vector of positions."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dim")
    names = argument_names(node)
    for name in ("index", "src", "source"):
        other = analysis.of(node, name) if name in names else None
        if other is not None:
            _beside(analysis, node, axes, other, dim)
    return axes


def _beside(analysis: Analysis, node: fx.Node, axes: Axes, other: Axes, dim: int) -> None:
    """`other` has the dimensions of `axes`, but for `dim`, where positions are taken by their numbers."""
    if len(other) != len(axes):
        analysis.pin((*other, axes[dim]), node, f"{op_name(node)} takes positions of it")
        return
    for i, (mine, its) in enumerate(zip(axes, other)):
        if i != dim % len(axes) and len(mine) == len(its):
            analysis.same(mine, its, node)
        else:
            analysis.pin((mine, its), node, f"{op_name(node)} takes positions of it")


def index_put(analysis: Analysis, node: fx.Node) -> Axes:
    """x[indices] = values: the indexed dimensions stay, and so does what the values have."""
    axes, given = analysis.axes(node.args[0]), argument(node, "indices")
    for i, used in enumerate(given):
        if used is not None:
            analysis.pin(axes[i], node, "index_put writes at positions of it")
            analysis.pin(analysis.axes(used), node, "used as indices")
    values = analysis.need(node, "values")
    if any(v.any() for v in values) or any(n is not None and n.meta["val"].dtype in _MASKS for n in given):
        analysis.pin((*values, *axes), node, "index_put writes values that have dimensions of their own")
    return axes


_MASKS = (torch.bool, torch.uint8)


def windows(analysis: Analysis, node: fx.Node) -> Axes:
    """Tensor.unfold: windows of one dimension, put last."""
    axes, dim = analysis.axes(node.args[0]), argument(node, "dimension")
    analysis.pin(axes[dim], node, "unfold cuts windows out of it")
    fixed = analysis.fixed(node)
    return (*_replaced(axes, dim, fixed[dim % len(axes)]), fixed[-1])


def im2col(analysis: Analysis, node: fx.Node) -> Axes:
    """[N, C, H, W] -> [N, C x window, places]: each channel once for every cell of the window."""
    axes, kernel = analysis.axes(node.args[0]), argument(node, "kernel_size")
    analysis.pin(axes[-2:], node, "im2col slides a window over it")
    return (*axes[:-3], np.repeat(axes[-3], kernel[0] * kernel[1]), analysis.fixed(node)[-1])


def col2im(analysis: Analysis, node: fx.Node) -> Axes:
    """[N, C x window, places] -> [N, C, H, W]."""
    axes, kernel = analysis.axes(node.args[0]), argument(node, "kernel_size")
    window = kernel[0] * kernel[1]
    channels, cells = analysis.atoms.split(axes[-2], len(axes[-2]) // window, window)
    analysis.pin((cells, axes[-1]), node, "col2im adds it up in space")
    return (*axes[:-2], channels, *analysis.fixed(node)[-2:])


def slice_scatter(analysis: Analysis, node: fx.Node) -> Axes:
    """A copy of x with a slice replaced: the sliced dimension stays, the others are shared."""
    axes, source = analysis.axes(node.args[0]), analysis.need(node, "src")
    dim = argument(node, "dim") % len(axes)
    for i, (mine, its) in enumerate(zip(axes, source)):
        if i == dim:
            analysis.pin((mine, its), node, "slice_scatter writes at positions of it")
        else:
            analysis.same(mine, its, node)
    return axes


def pad(analysis: Analysis, node: fx.Node) -> Axes:
    """Constant padding adds positions that may be removed like others; other modes read the neighbours."""
    axes = list(analysis.axes(node.args[0]))
    widths = argument(node, "pad")
    mode = argument(node, "mode") if op_name(node) == "aten.pad" else "constant"
    for i in range(len(widths) // 2):
        dim, low, high = len(axes) - 1 - i, widths[2 * i], widths[2 * i + 1]
        if low == 0 and high == 0:
            continue
        plain = mode == "constant" and isinstance(low, int) and isinstance(high, int) and min(low, high) >= 0
        if plain and axes[dim].any():
            axes[dim] = np.concatenate([_padding(analysis, low), axes[dim], _padding(analysis, high)])
        else:
            analysis.pin(axes[dim], node, f"padded in mode {mode!r} or by negative or dynamic widths")
            axes[dim] = analysis.fixed(node)[dim]
    return tuple(axes)


def _padding(analysis: Analysis, width: int) -> Vector:
    """Free positions, even a single one: unlike a dimension of size 1, it is not all there is."""
    return analysis.atoms.fresh(width + 1)[:width]


def _gather(analysis: Analysis, node: fx.Node, axes: Axes, dim: int, indices: Vector) -> Axes:
    if axes[dim].any():
        analysis.maps[node] = IndexMap(dim % len(axes), indices)
    return _replaced(axes, dim, axes[dim][indices])


def _replaced(axes: Axes, dim: int, vector: Vector) -> Axes:
    result = list(axes)
    result[dim] = vector
    return tuple(result)


def _constant_indices(analysis: Analysis, node: Any, size: int) -> Vector | None:
    """The values of an index buffer, counted from the front, or None for indices computed from inputs."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    tensor = get_attribute(analysis.program.graph_module, str(node.target))
    if tensor.dtype not in (torch.int64, torch.int32):
        return None
    return tensor.cpu().numpy().astype(np.int64) % size


MOVEMENT_RULES = {
    "getitem": getitem,
    **rows("cat concat concatenate", cat),
    **rows("stack", stack),
    **rows("split split_with_sizes chunk tensor_split", split),
    **rows("unbind", unbind),
    **rows("select", select),
    **rows("slice", slice_),
    **rows("narrow", narrow),
    **rows("flip", flip),
    **rows("roll", roll),
    **rows("index_select", index_select),
    **rows("index", index),
    **rows("slice_scatter", slice_scatter),
    **rows("gather", gather),
    **rows("scatter scatter_add scatter_reduce index_add index_copy index_fill", scatter),
    **rows("index_put", index_put),
    **rows("tril triu", diagonal_mask),
    **rows("unfold", windows),
    **rows("im2col", im2col),
    **rows("col2im", col2im),
    **rows("constant_pad_nd pad", pad),
}
