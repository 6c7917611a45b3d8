"""Rules of ops that reorder, merge, split or repeat whole dimensions: view, permute, squeeze, expand, pixel shuffle."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ...rewrite import argument
from ..analysis import Analysis, concrete, op_name, rows, shape_of
from ..axes import Axes, Vector


def reshape(analysis: Analysis, node: fx.Node) -> Axes:
    """Row-major matching: between common boundaries, input dimensions are merged and split into output dimensions."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axes = analysis.axes(source)
    before, after = source.meta["val"], node.meta["val"]
    if before.dtype != after.dtype or 0 in shape_of(source):
        analysis.pin(axes, node, f"{op_name(node)} reads the memory in another way")
        return analysis.fixed(node)
    ins = [part for vector, size in zip(axes, before.shape) for part in _cut(analysis, node, vector, _parts(size))]
    outs = [_parts(size) for size in after.shape]
    found = _matched(analysis, node, ins, [part for parts in outs for part in parts])
    return tuple(analysis.atoms.merge(*(next(found) for _ in parts)) for parts in outs)


def reshape_like(analysis: Analysis, node: fx.Node) -> Axes:
    """Reshaped to the sizes of another tensor, which must stay those of this one."""
    axes = reshape(analysis, node)
    for mine, theirs in zip(axes, analysis.axes(node.args[1])):
        analysis.same(mine, theirs, node)
    return axes


@dataclass(frozen=True)
class _Part:
    """A factor of a dimension. `size` is that of the example; `label` stands for the true size, and differs between
    sizes that only happen to be equal in the example."""

    size: int
    label: int
    dynamic: bool


def _parts(size: Any) -> list[_Part]:
    """A dynamic size k * s is read as s times k: batch and heads in one dimension are still batch and heads."""
    if isinstance(size, int):
        return [_Part(size, size, False)]
    label, count = _read(size.node.expr)
    if count > 1:
        return [_Part(concrete(size) // count, label // count, True), _Part(count, count, False)]
    return [_Part(concrete(size), label, True)]


@functools.cache
def _read(expression: Any) -> tuple[int, int]:
    """Of a symbolic size: its label, and k where it is k * s."""
    label = int(expression.subs({s: _label(str(s)) for s in expression.free_symbols}))
    count = expression.as_coeff_Mul()[0]
    return label, int(count) if count.is_Integer else 1


def _label(symbol: str) -> int:
    """A number for each symbol that no static size, product of sizes or other symbol is likely to have."""
    return (1 << 32) + zlib.crc32(symbol.encode())


def _cut(analysis: Analysis, node: fx.Node, vector: Vector, parts: list[_Part]) -> list[tuple[_Part, Vector]]:
    """An input dimension as its parts; the dynamic one has no positions of its own."""
    if len(parts) == 1:
        return [(parts[0], vector)]
    outer, inner = analysis.atoms.split(vector, parts[0].size, parts[1].size)
    analysis.pin(outer, node, f"{op_name(node)} of a dynamic dimension")
    return [(parts[0], analysis.atoms.fixed(parts[0].size)), (parts[1], inner)]


def _matched(
    analysis: Analysis, node: fx.Node, ins: list[tuple[_Part, Vector]], outs: list[_Part]
) -> Iterator[Vector]:
    """The vectors of the output's parts."""
    before, after = [p for p, _ in ins], outs
    for these, those in _blocks([p.label for p in before], [p.label for p in after]):
        merged = tuple(vector for _, vector in ins[these])
        if not _batch_is_outermost(before[these], after[those]):
            analysis.pin(merged, node, f"{op_name(node)} mixes it with a dynamic dimension")
            merged = tuple(analysis.atoms.fixed(len(v)) for v in merged)
        yield from _regroup(analysis, merged, tuple(p.size for p in after[those]))


def _regroup(analysis: Analysis, axes: Axes, sizes: tuple[int, ...]) -> list[Vector]:
    """Merge `axes` and split the result into `sizes`."""
    if len(axes) == len(sizes) == 1:
        return list(axes)
    if not any(v.any() for v in axes):
        return [analysis.atoms.fixed(n) for n in sizes]
    rest = analysis.atoms.merge(*axes) if axes else analysis.atoms.fixed(1)
    result = []
    for size in sizes[:-1]:
        outer, rest = analysis.atoms.split(rest, size, len(rest) // size)
        result.append(outer)
    return [*result, rest] if sizes else []


def _blocks(ins: list[int], outs: list[int]) -> Iterator[tuple[slice, slice]]:
    """The finest runs of input and output dimensions with equal numbers of elements."""
    i = j = 0
    while i < len(ins) or j < len(outs):
        first_i, first_j, p, q = i, j, 1, 1
        if i < len(ins):
            p, i = ins[i], i + 1
        if j < len(outs):
            q, j = outs[j], j + 1
        while p != q:
            if p < q:
                p, i = p * ins[i], i + 1
            else:
                q, j = q * outs[j], j + 1
        yield slice(first_i, i), slice(first_j, j)


def _batch_is_outermost(ins: list[_Part], outs: list[_Part]) -> bool:
    """The regrouping read off at the example's batch holds at every batch if dynamic sizes come first in it."""
    if len(ins) == len(outs) == 1:
        return True
    dynamic = [[p.dynamic for p in parts if p.dynamic or p.size != 1] for parts in (ins, outs)]
    return not any(any(flags[1:]) for flags in dynamic) and (not any(map(any, dynamic)) or all(map(any, dynamic)))


def permute(analysis: Analysis, node: fx.Node) -> Axes:
    """Any op that reorders dimensions; the order is found by running it on a tensor whose sizes all differ."""
    source = node.args[0]
    axes = analysis.axes(source)
    label = torch.empty(tuple(range(2, 2 + len(axes))), device="meta")
    moved = node.target(label, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(axes[n - 2] for n in moved.shape)


def squeeze(analysis: Analysis, node: fx.Node) -> Axes:
    """Dimensions of size 1 vanish: all, or those that are named."""
    axes = analysis.axes(node.args[0])
    dims = squeezed_dims(node, axes)
    return tuple(v for i, v in enumerate(axes) if i not in dims)


def squeezed_dims(node: fx.Node, axes: Axes) -> list[int]:
    """Which dimensions of the input this squeeze takes away."""
    given: Any = node.args[1] if len(node.args) > 1 else range(len(axes))
    dims = [given] if isinstance(given, int) else list(given)
    return sorted({d % len(axes) for d in dims if len(axes[d]) == 1}) if axes else []


def unsqueeze(analysis: Analysis, node: fx.Node) -> Axes:
    """A new dimension of size 1."""
    axes = analysis.axes(node.args[0])
    dim = argument(node, "dim") % (len(axes) + 1)
    return (*axes[:dim], analysis.atoms.fixed(1), *axes[dim:])


def expand(analysis: Analysis, node: fx.Node) -> Axes:
    """A repeated dimension holds equal values, so it may be pruned by itself; its size literal is rewritten."""
    axes, shape = analysis.axes(node.args[0]), shape_of(node)
    sizes = argument(node, "size")
    padded = [analysis.atoms.fixed(1)] * (len(shape) - len(axes)) + list(axes)
    return tuple(
        v if len(v) == n else analysis.atoms.fresh(n) if isinstance(literal, int) else analysis.atoms.fixed(n)
        for v, n, literal in zip(padded, shape, sizes)
    )


def expand_as(analysis: Analysis, node: fx.Node) -> Axes:
    """As wide as another tensor."""
    axes, other = analysis.axes(node.args[0]), analysis.need(node, "other")
    for mine, its in zip(reversed(axes), reversed(other)):
        if len(mine) == len(its):
            analysis.same(mine, its, node)
    return other


def repeat(analysis: Analysis, node: fx.Node) -> Axes:
    """Tiles: position i of a dimension is position i mod size of the input."""
    axes, shape = analysis.axes(node.args[0]), shape_of(node)
    padded = [analysis.atoms.fixed(1)] * (len(shape) - len(axes)) + list(axes)
    return tuple(np.tile(v, n // len(v)) for v, n in zip(padded, shape))


def repeat_interleave(analysis: Analysis, node: fx.Node) -> Axes:
    """Each position several times in a row, the same number of times for all."""
    axes, dim, repeats = list(analysis.axes(node.args[0])), argument(node, "dim"), argument(node, "repeats")
    if dim is None or not isinstance(repeats, int):
        analysis.pin(tuple(axes), node, "repeat_interleave over all dimensions or by a tensor of counts")
        return analysis.fixed(node)
    axes[dim] = np.repeat(axes[dim], repeats)
    return tuple(axes)


def pixel_shuffle(analysis: Analysis, node: fx.Node) -> Axes:
    """[C r r, H, W] -> [C, H r, W r]."""
    axes, factor = analysis.axes(node.args[0]), argument(node, "upscale_factor")
    channels, cells = analysis.atoms.split(axes[-3], len(axes[-3]) // factor**2, factor**2)
    analysis.pin((cells, *axes[-2:]), node, "pixel_shuffle moves it into space")
    return (*axes[:-3], channels, *analysis.fixed(node)[-2:])


def pixel_unshuffle(analysis: Analysis, node: fx.Node) -> Axes:
    """[C, H r, W r] -> [C r r, H, W]."""
    axes, factor = analysis.axes(node.args[0]), argument(node, "downscale_factor")
    analysis.pin(axes[-2:], node, "pixel_unshuffle moves space into channels")
    return (*axes[:-3], np.repeat(axes[-3], factor**2), *analysis.fixed(node)[-2:])


def channel_shuffle(analysis: Analysis, node: fx.Node) -> Axes:
    """Channels (groups, rest) are transposed to (rest, groups)."""
    axes, groups = list(analysis.axes(node.args[0])), argument(node, "groups")
    outer, inner = analysis.atoms.split(axes[1], groups, len(axes[1]) // groups)
    analysis.factors[node] = outer
    axes[1] = analysis.atoms.merge(inner, outer)
    return tuple(axes)


SHAPE_RULES = {
    **rows("view reshape _unsafe_view flatten unflatten ravel", reshape),
    **rows("view_as reshape_as", reshape_like),
    **rows("permute transpose t movedim moveaxis swapaxes swapdims numpy_T mT matrix_H adjoint", permute),
    **rows("squeeze", squeeze),
    **rows("unsqueeze", unsqueeze),
    **rows("expand", expand),
    **rows("expand_as", expand_as),
    **rows("repeat tile", repeat),
    **rows("repeat_interleave", repeat_interleave),
    **rows("pixel_shuffle", pixel_shuffle),
    **rows("pixel_unshuffle", pixel_unshuffle),
    **rows("channel_shuffle", channel_shuffle),
}
