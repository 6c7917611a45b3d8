"""Rules of ops that reduce dimensions or work along them: sums, means, softmax, pooling, resampling."""

from __future__ import annotations

from functools import partial

from torch import fx

from ...rewrite import argument, argument_names
from ..analysis import Analysis, Value, concrete, op_name, rows
from ..axes import Axes
from .elementwise import elementwise
from .layers import slide


def reduced_dims(node: fx.Node, rank: int) -> list[int]:
    """The dimensions that a reduction runs over, all where it names none."""
    names = argument_names(node)
    given = argument(node, "dim") if "dim" in names else None
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    return sorted(d % rank for d in dims) if rank else []


def reduce(analysis: Analysis, node: fx.Node, neutral: bool) -> Axes:
    """`neutral`: positions that are zero add nothing (a mean's count is made explicit); else all positions stay."""
    (name, axes) = _first(analysis, node)
    dims = reduced_dims(node, len(axes))
    for dim in dims:
        if neutral:
            analysis.contract(node, name, dim)
        else:
            analysis.pin(axes[dim], node, f"{op_name(node)} runs over this dimension")
    return without(analysis, node, axes, dims)


def variance(analysis: Analysis, node: fx.Node) -> Axes:
    """`var` and `std`: of what is kept, where the number of values does not depend on the input."""
    (name, axes) = _first(analysis, node)
    dims = reduced_dims(node, len(axes))
    if not all(isinstance(node.all_input_nodes[0].meta["val"].shape[d], int) for d in dims):
        return reduce(analysis, node, neutral=False)
    analysis.normalize(node, name, axes, tuple(dims))
    return without(analysis, node, axes, dims)


def vector_norm(analysis: Analysis, node: fx.Node) -> Axes:
    """Zeros do not change a p-norm with finite p > 0."""
    names = argument_names(node)
    order = argument(node, "ord" if "ord" in names else "p")
    neutral = order is None or (isinstance(order, (int, float)) and 0 < order < float("inf"))
    return reduce(analysis, node, neutral)


def without(analysis: Analysis, node: fx.Node, axes: Axes, dims: list[int]) -> Axes:
    """The axes that a reduction leaves, with 1 for the reduced ones where it keeps them."""
    names = argument_names(node)
    if "keepdim" in names and argument(node, "keepdim"):
        return tuple(analysis.atoms.fixed(1) if i in dims else v for i, v in enumerate(axes))
    return tuple(v for i, v in enumerate(axes) if i not in dims)


def along(analysis: Analysis, node: fx.Node) -> Axes:
    """Every position along `dim` depends on the others: softmax, cumulative sums, sorting."""
    _, axes = _first(analysis, node)
    dim = argument(node, "dim")
    if axes:
        analysis.pin(axes[dim], node, f"{op_name(node)} runs along this dimension")
    return axes


def extreme(analysis: Analysis, node: fx.Node) -> Value:
    """`max` and `min`: of two tensors, over everything, or along `dim` with the positions."""
    names = argument_names(node)
    if "other" in names:
        return elementwise(analysis, node)
    axes = reduce(analysis, node, neutral=False)
    return [axes, axes] if "dim" in names else axes


def ordering(analysis: Analysis, node: fx.Node) -> Value:
    """`sort`, `topk` and friends: values and positions along a dimension whose positions all stay."""
    value = node.meta["val"]
    names = argument_names(node)
    if "dim" not in names:
        return reduce(analysis, node, neutral=False)
    axes, dim = list(_first(analysis, node)[1]), argument(node, "dim")
    shape = (value[0] if isinstance(value, (tuple, list)) else value).shape
    if axes:
        analysis.pin(axes[dim], node, f"{op_name(node)} runs along this dimension")
        rest = [analysis.atoms.fixed(concrete(shape[dim]))] if len(shape) == len(axes) else []
        axes[dim % len(axes) : dim % len(axes) + 1] = rest
    return [tuple(axes)] * len(value) if isinstance(value, (tuple, list)) else tuple(axes)


def spatial(analysis: Analysis, node: fx.Node, count: int) -> Axes:
    """The last `count` dimensions are space; all before them pass."""
    _, axes = _first(analysis, node)
    slide(analysis, node, axes[-count:])
    return (*axes[:-count], *analysis.fixed(node)[-count:])


def pooling_with_indices(analysis: Analysis, node: fx.Node, count: int) -> list[Axes]:
    """Values and positions."""
    _, axes = _first(analysis, node)
    slide(analysis, node, axes[-count:])
    tail = tuple(analysis.atoms.fixed(concrete(s)) for s in node.meta["val"][0].shape[-count:])
    return [(*axes[:-count], *tail)] * 2


def _first(analysis: Analysis, node: fx.Node) -> tuple[str, Axes]:
    name = next(iter(argument_names(node)))
    return name, analysis.need(node, name)


_SPATIAL_1D = """avg_pool1d max_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d
replication_pad1d"""
_SPATIAL_2D = """avg_pool2d max_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d
upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad2d
replication_pad2d"""
_SPATIAL_3D = """avg_pool3d max_pool3d adaptive_avg_pool3d upsample_nearest3d upsample_trilinear3d reflection_pad3d
replication_pad3d"""

REDUCE_RULES = {
    **rows("sum mean", partial(reduce, neutral=True)),
    **rows("amax amin argmax argmin prod all any logsumexp", partial(reduce, neutral=False)),
    **rows("var std", variance),
    **rows("linalg_vector_norm norm", vector_norm),
    **rows("max min", extreme),
    **rows("sort topk kthvalue median mode argsort cummax cummin", ordering),
    **rows("softmax _softmax log_softmax cumsum cumprod logcumsumexp", along),
    **rows(_SPATIAL_1D, partial(spatial, count=1)),
    **rows(_SPATIAL_2D, partial(spatial, count=2)),
    **rows(_SPATIAL_3D, partial(spatial, count=3)),
    **rows("max_pool1d_with_indices adaptive_max_pool1d", partial(pooling_with_indices, count=1)),
    **rows("max_pool2d_with_indices adaptive_max_pool2d", partial(pooling_with_indices, count=2)),
    **rows("max_pool3d_with_indices adaptive_max_pool3d", partial(pooling_with_indices, count=3)),
}
