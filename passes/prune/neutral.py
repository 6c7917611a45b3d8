"""Norms in the oracle: the same norm on tensors of the original size, with the statistics of the kept positions only.

    mean = E[x m] / E[m]      variance = E[(x - mean)^2 m] / E[m]      y = (x - mean) / sqrt(variance + eps) * w + b

with E over the normalized dimensions and m the mask of what is kept. A pruned norm must equal this.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

from ...frontend.cost import op_name
from ...frontend.program import Program
from ..rewrite import argument, argument_names, aten, call_before, put_constant, replace
from .analysis import Statistics, rows, sizes_of
from .slicing import Cut, compensated_gain


def neutralize(cut: Cut) -> int:
    """Write anew every norm whose statistics run over removed positions, in place. Returns how many."""
    affected = [s for s in cut.analysis.statistics if any(cut.changed(s.axes[d]) for d in s.dims)]
    for statistics in affected:
        _Norm(cut, statistics).rewrite()
    return len(affected)


class _Norm:
    """One norm that is being written anew, before its node."""

    def __init__(self, cut: Cut, statistics: Statistics) -> None:
        self.program: Program = cut.analysis.program
        self.node, self.cut = statistics.node, cut
        self.shape, self.dims = sizes_of(statistics.axes), list(statistics.dims)
        masked = [d for d in self.dims if cut.changed(statistics.axes[d])]
        masks = [torch.from_numpy(cut.mask(statistics.axes[d])) for d in masked]
        self.share = prod(float(m.double().mean()) for m in masks)
        self.kept = prod(cut.size(statistics.axes[d]) if d in masked else self.shape[d] for d in self.dims)
        self.mask = self._constant(masked, masks)

    def rewrite(self) -> None:
        """Replace the node."""
        replace(self.node, _WRITERS[op_name(self.node)](self))

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A node before the norm."""
        return call_before(self.node, target, *args)

    def mean(self, x: fx.Node) -> fx.Node:
        """The mean over the kept positions."""
        total = self.call(aten.mean.dim, self.call(aten.mul.Tensor, x, self.mask), self.dims, True)
        return self.call(aten.mul.Tensor, total, 1 / self.share)

    def standardized(self, x: fx.Node, centred: bool = True) -> fx.Node:
        """x with mean 0 and variance 1 over the kept positions; only scaled where not `centred`."""
        x = self.call(aten.sub.Tensor, x, self.mean(x)) if centred else x
        return self.call(aten.mul.Tensor, x, self.call(aten.rsqrt.default, self._with_epsilon(self.square(x))))

    def square(self, x: fx.Node) -> fx.Node:
        """The mean square over the kept positions."""
        return self.mean(self.call(aten.mul.Tensor, x, x))

    def affine(self, x: fx.Node, channel: int | None) -> fx.Node:
        """x * weight + bias; along dimension `channel`, or along the last dimensions where it is None."""
        names = argument_names(self.node)
        for name, target in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
            given = argument(self.node, name) if name in names else None
            if given is not None and channel is not None:
                rank = self.node.meta["val"].ndim
                given = self.call(aten.reshape.default, given, [-1 if d == channel else 1 for d in range(rank)])
            x = x if given is None else self.call(target, x, given)
        return x

    def _with_epsilon(self, x: fx.Node) -> fx.Node:
        given = argument(self.node, "eps")
        return self.call(aten.add.Tensor, x, torch.finfo(_dtype(self.node)).eps if given is None else given)

    def _constant(self, dims: list[int], masks: list[torch.Tensor]) -> fx.Node:
        whole = torch.ones(())
        for dim, mask in zip(dims, masks):
            whole = whole * mask.reshape([-1 if d == dim else 1 for d in range(len(self.shape))])
        return put_constant(self.program, f"{self.node.name}_keep", whole.to(_dtype(self.node)), self.node)


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    return (value[0] if isinstance(value, (tuple, list)) else value).dtype


def _layer_norm(norm: _Norm) -> fx.Node:
    return norm.affine(norm.standardized(argument(norm.node, "input")), None)


def _rms_norm(norm: _Norm) -> fx.Node:
    return norm.affine(norm.standardized(argument(norm.node, "input"), centred=False), None)


def _batch_norm(norm: _Norm) -> fx.Node:
    return norm.affine(norm.standardized(argument(norm.node, "input")), 1)


def _group_norm(norm: _Norm) -> fx.Node:
    x = argument(norm.node, "input")
    groups = argument(norm.node, "num_groups")
    apart = norm.call(aten.unflatten.int, x, 1, [groups, -1])
    return norm.affine(norm.call(aten.flatten.using_ints, norm.standardized(apart), 1, 2), 1)


def _weight_norm(norm: _Norm) -> fx.Node:
    """v * g / |v| with the norm of what is kept, and the gain that makes up for it."""
    v = argument(norm.node, "v")
    squares = norm.call(aten.mul.Tensor, norm.call(aten.mul.Tensor, v, v), norm.mask)
    scale = norm.call(aten.rsqrt.default, norm.call(aten.sum.dim_IntList, squares, norm.dims, True))
    gain = put_constant(norm.program, f"{norm.node.name}_gain", compensated_gain(norm.cut, norm.node), norm.node)
    return norm.call(aten.mul.Tensor, v, norm.call(aten.mul.Tensor, gain, scale))


def _variance(norm: _Norm) -> fx.Node:
    """`var` and `std` with a correction, which counts kept positions."""
    node = norm.node
    x = argument(node, "self")
    centred = norm.call(aten.sub.Tensor, x, norm.mean(x))
    result = norm.call(aten.mul.Tensor, norm.square(centred), norm.kept / (norm.kept - correction(node)))
    if not argument(node, "keepdim"):
        result = norm.call(aten.squeeze.dims, result, norm.dims)
    return norm.call(aten.sqrt.default, result) if op_name(node) == "aten.std" else result


def correction(node: fx.Node) -> float:
    """What `var` or `std` subtracts from the count."""
    names = argument_names(node)
    if "unbiased" in names:
        return float(argument(node, "unbiased"))
    given = argument(node, "correction")
    return 1.0 if given is None else float(given)


_WRITERS: dict[str, Callable[[_Norm], fx.Node]] = {
    **rows("layer_norm", _layer_norm),
    **rows("rms_norm", _rms_norm),
    **rows("batch_norm", _batch_norm),
    **rows("group_norm", _group_norm),
    **rows("_weight_norm", _weight_norm),
    **rows("var std", _variance),
}
