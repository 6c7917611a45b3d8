"""Cut the removed positions out of a program: shorter weights, and literals that carry sizes written anew.

After the rewriting, shapes are propagated through the whole graph and compared with what the axes say: a rewrite that
is missing or wrong is an error here, not a surprise at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ...errors import PruningError
from ...frontend.cost import concrete, op_name
from ...frontend.program import get_attribute, set_attribute, source_of
from ..rewrite import argument, argument_names, aten, call_after, constant, put_constant, set_argument
from ..verify import refresh_values
from .analysis import Analysis, flat_axes, rows
from .axes import Axes, Vector
from .rules.reduce import reduced_dims
from .rules.shape import squeezed_dims


@dataclass(frozen=True)
class Cut:
    """An analysis together with the mask of atoms that are kept."""

    analysis: Analysis
    keep: Vector

    def mask(self, vector: Vector) -> Vector:
        """Which positions are kept."""
        return self.keep[self.analysis.atoms.resolve(vector)].all(axis=0)

    def size(self, vector: Vector) -> int:
        """How many positions are kept."""
        return int(self.mask(vector).sum())

    def changed(self, vector: Vector) -> bool:
        """Is any position removed?"""
        return bool(vector.any()) and not bool(self.mask(vector).all())

    def sizes(self, axes: Axes) -> tuple[int, ...]:
        """The shape that is left."""
        return tuple(self.size(v) if v.any() else len(v) for v in axes)


def slice_program(cut: Cut) -> None:
    """Remove what `cut` does not keep from the program of its analysis, in place."""
    analysis = cut.analysis
    for node in list(analysis.values):
        rewrite = REWRITES.get(op_name(node))
        if rewrite is not None and _is_affected(cut, node):
            rewrite(cut, node)
    _slice_tensors(cut)
    analysis.program.graph.lint()
    analysis.program.graph_module.recompile()
    refresh_values(analysis.program, "prune")
    _check_shapes(cut)


def _is_affected(cut: Cut, node: fx.Node) -> bool:
    touched = [n for n in (node, *node.all_input_nodes) if n in cut.analysis.values]
    return any(cut.changed(v) for n in touched for axes in flat_axes(cut.analysis.values[n]) for v in axes)


def _slice_tensors(cut: Cut) -> None:
    """Replace every parameter and buffer that lost positions; one with two names stays one tensor."""
    module = cut.analysis.program.graph_module
    replaced: dict[int, torch.Tensor] = {}
    for name, axes in cut.analysis.tensors.items():
        if not any(cut.changed(v) for v in axes):
            continue
        old = get_attribute(module, name)
        if id(old) not in replaced:
            replaced[id(old)] = _sliced(cut, old, axes)
        owner, _, leaf = name.rpartition(".")
        setattr(get_attribute(module, owner) if owner else module, leaf, replaced[id(old)])


def _sliced(cut: Cut, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
    new = tensor.detach()
    for dim, vector in enumerate(axes):
        if cut.changed(vector):
            new = new.index_select(dim, torch.from_numpy(np.flatnonzero(cut.mask(vector))).to(new.device))
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(new.contiguous(), requires_grad=tensor.requires_grad)
    return new.contiguous()


def _check_shapes(cut: Cut) -> None:
    """Every tensor of the graph has the shape that the axes predict."""
    for node, value in cut.analysis.values.items():
        given = node.meta["val"]
        tensors = list(given) if isinstance(given, (tuple, list)) else [given]
        for tensor, axes in zip(tensors, flat_axes(value)):
            if isinstance(tensor, torch.Tensor) and tuple(map(concrete, tensor.shape)) != cut.sizes(axes):
                raise PruningError(
                    f"after pruning, {node.name} ({op_name(node)}) has shape {tuple(tensor.shape)} where "
                    f"{cut.sizes(axes)} was planned",
                    where=source_of(node),
                    hint="this is a bug in fxpress: a size literal was not rewritten; exclude this layer",
                )


# -- rewrites of literals -----------------------------------------------------------------------------------------


def _tensor_axes(cut: Cut, node: Any) -> Axes:
    return cut.analysis.axes(node)


def _new_sizes(cut: Cut, literals: Any, axes: Axes) -> list[Any]:
    """Size literals, where they are numbers, by the kept sizes of `axes`.

    A dynamic size that counts removed positions too (batch * heads) becomes -1, and a -1 for a known size that size.
    """
    hidden = [not isinstance(n, int) and cut.changed(v) for n, v in zip(literals, axes)]
    sizes = [cut.size(v) if isinstance(n, int) and (n >= 0 or any(hidden)) else n for n, v in zip(literals, axes)]
    return [-1 if h else n for h, n in zip(hidden, sizes)]


def _rewrite_sizes(cut: Cut, node: fx.Node) -> None:
    """view(x, sizes), expand(x, sizes), zeros(sizes): sizes of the output. For `reshape` they are called shape."""
    name = "shape" if op_name(node) == "aten.reshape" else "size"
    names = argument_names(node)
    if name in names:
        set_argument(node, name, _new_sizes(cut, argument(node, name), _tensor_axes(cut, node)))


def _rewrite_unflatten(cut: Cut, node: fx.Node) -> None:
    literals, before = argument(node, "sizes"), _tensor_axes(cut, node.args[0])
    dim = argument(node, "dim") % len(before)
    set_argument(node, "sizes", _new_sizes(cut, literals, _tensor_axes(cut, node)[dim : dim + len(literals)]))


def _rewrite_split(cut: Cut, node: fx.Node) -> None:
    """Any split becomes one by explicit sizes."""
    dim = argument(node, "dim")
    sizes = [cut.size(axes[dim]) for axes in flat_axes(cut.analysis.values[node])]
    source = node.args[0]
    node.target, node.kwargs = aten.split_with_sizes.default, {}
    node.args = (source, sizes, dim)


def _rewrite_gather(cut: Cut, node: fx.Node) -> None:
    """A slice stays one where the kept positions are evenly spaced, else constant indices are used."""
    index_map, source = cut.analysis.maps.get(node), node.args[0]
    if index_map is None or not cut.changed(_tensor_axes(cut, source)[index_map.dim]):
        return
    assert isinstance(source, fx.Node)
    kept = cut.mask(cut.analysis.axes(source)[index_map.dim])
    number = np.cumsum(kept) - 1  # new number of every kept position
    new = number[index_map.index[kept[index_map.index]]]
    node.kwargs = {}
    steps = np.unique(np.diff(new))
    if len(steps) <= 1 and (len(steps) == 0 or steps[0] > 0):
        step = int(steps[0]) if len(steps) else 1
        node.target = aten.slice.Tensor
        node.args = (source, index_map.dim, int(new[0]), int(new[-1]) + 1, step)
        return
    indices = put_constant(cut.analysis.program, f"{node.name}_index", torch.from_numpy(new), node)
    node.target, node.args = aten.index_select.default, (source, index_map.dim, indices)


def _rewrite_roll(cut: Cut, node: fx.Node) -> None:
    """The shift of a pruned dimension is the number of kept positions that wrap around."""
    index_map = cut.analysis.maps.get(node)
    if index_map is None or not cut.changed(_tensor_axes(cut, node)[index_map.dim]):
        return
    axes, shifts = _tensor_axes(cut, node), list(argument(node, "shifts"))
    for i, dim in enumerate(argument(node, "dims")):
        if dim % len(axes) == index_map.dim:
            wrapped = shifts[i] % len(axes[dim])
            shifts[i] = int(cut.mask(axes[dim])[:wrapped].sum())
    set_argument(node, "shifts", shifts)


def _rewrite_pad(cut: Cut, node: fx.Node) -> None:
    """Padded positions may have been removed."""
    before, after, widths = _tensor_axes(cut, node.args[0]), _tensor_axes(cut, node), list(argument(node, "pad"))
    for i in range(len(widths) // 2):
        dim = len(before) - 1 - i
        if after[dim].any():
            mask = cut.mask(after[dim])
            widths[2 * i] = int(mask[: widths[2 * i]].sum())
            widths[2 * i + 1] = int(mask[len(mask) - widths[2 * i + 1] :].sum())
    set_argument(node, "pad", widths)


def _rewrite_groups(cut: Cut, node: fx.Node) -> None:
    factor = cut.analysis.factors.get(node)
    if factor is not None:
        names = argument_names(node)
        set_argument(node, "groups" if "groups" in names else "num_groups", cut.size(factor))


def _rewrite_normalized_shape(cut: Cut, node: fx.Node) -> None:
    """The size that the statistics run over; a default epsilon follows the dtype and is made explicit."""
    count, axes = len(argument(node, "normalized_shape")), _tensor_axes(cut, node)
    set_argument(node, "normalized_shape", list(cut.sizes(axes[-count:])))
    if argument(node, "eps") is None:
        set_argument(node, "eps", torch.finfo(node.meta["val"].dtype).eps)


def _rewrite_mean(cut: Cut, node: fx.Node) -> None:
    """A mean over positions of which some were zero: its original count is made explicit."""
    axes = _tensor_axes(cut, node.args[0])
    factor = math.prod(cut.size(axes[d]) / len(axes[d]) for d in reduced_dims(node, len(axes)) if axes[d].any())
    if factor != 1:
        scaled = call_after(node, aten.mul.Tensor, node, factor)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _rewrite_weight_norm(cut: Cut, node: fx.Node) -> None:
    gain = compensated_gain(cut, node)
    path = str(argument(node, "g").target)
    set_attribute(cut.analysis.program.graph_module, path, torch.nn.Parameter(gain))


def compensated_gain(cut: Cut, node: fx.Node) -> torch.Tensor:
    """Of a weight_norm: g * |v kept| / |v|, so that the weights that are kept do not change. Full size along `dim`."""
    v, g = (constant(cut.analysis.program, argument(node, name)).detach() for name in "vg")  # type: ignore[union-attr]
    dims = [d for d in range(v.ndim) if d != argument(node, "dim") % v.ndim]
    kept = v
    for d in dims:
        kept = kept.index_select(d, torch.from_numpy(np.flatnonzero(cut.mask(cut.analysis.need(node, "v")[d]))))
    whole, part = (torch.linalg.vector_norm(t.double(), dim=dims, keepdim=True) for t in (v, kept))
    return (g * torch.where(whole > 0, part / whole, torch.ones_like(whole))).to(g.dtype)


def _rewrite_attention(cut: Cut, node: fx.Node) -> None:
    """The default scale depends on the size of the features, so it is made explicit."""
    query = cut.analysis.need(node, "query")
    if argument(node, "scale") is None:
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(len(query[-1]))}


def _rewrite_squeeze(cut: Cut, node: fx.Node) -> None:
    """Name the dimensions that vanish: another one may have size 1 now."""
    source = node.args[0]
    node.target, node.kwargs = aten.squeeze.dims, {}
    node.args = (source, squeezed_dims(node, _tensor_axes(cut, source)))


def _rewrite_interleave(cut: Cut, node: fx.Node) -> None:
    if argument(node, "output_size") is not None:
        axes = _tensor_axes(cut, node)
        node.kwargs = {**node.kwargs, "output_size": cut.size(axes[argument(node, "dim")])}


_CONVOLUTIONS = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"

REWRITES: dict[str, Callable[[Cut, fx.Node], None]] = {
    **rows("view reshape _unsafe_view expand full new_full new_ones new_zeros ones zeros", _rewrite_sizes),
    **rows("unflatten", _rewrite_unflatten),
    **rows("split split_with_sizes chunk tensor_split", _rewrite_split),
    **rows("slice narrow index_select index", _rewrite_gather),
    **rows("roll", _rewrite_roll),
    **rows("pad constant_pad_nd", _rewrite_pad),
    **rows(f"{_CONVOLUTIONS} group_norm channel_shuffle", _rewrite_groups),
    **rows("layer_norm rms_norm", _rewrite_normalized_shape),
    **rows("mean", _rewrite_mean),
    **rows("_weight_norm", _rewrite_weight_norm),
    **rows("scaled_dot_product_attention", _rewrite_attention),
    **rows("squeeze", _rewrite_squeeze),
    **rows("repeat_interleave", _rewrite_interleave),
}
