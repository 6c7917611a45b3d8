"""What the output of a layer is asked to match: its own value in the reference, or that of a sum that it flows into.

From a layer on, the value is followed through ops that change it in a known, affine way, as long as nobody else reads
it: BatchNorm, addition of another branch, scaling by constants, dropout in evaluation, moves. At a sum, the target of
the layer is the reference's sum minus the other branch of the pruned network, so that the layer may also mend what the
stream already carries. The residual there is taken back to the layer by undoing the ops one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....frontend.program import Program, get_attribute
from ...rewrite import argument, aten, is_constant
from .linear_layers import statistics, uses_statistics

_IDENTITY = {aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default}
_DROPOUT = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
# Each position of the output is one of the input, at most once: the transpose of such an op undoes it.
_MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.roll.default,
    aten.slice.Tensor,
}
Values = Mapping[fx.Node, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """The node whose value is matched, the ops from the layer (left out) to it, and the other branches that join."""

    layer: fx.Node
    path: tuple[fx.Node, ...] = ()

    @property
    def node(self) -> fx.Node:
        return self.path[-1] if self.path else self.layer

    @property
    def joining(self) -> list[fx.Node]:
        """The operands of sums on the path that come from elsewhere."""
        own = {self.layer, *self.path}
        return [n for p in self.path if p.target in _SUMS for n in p.all_input_nodes if n not in own]

    @property
    def norm(self) -> fx.Node | None:
        """The BatchNorm that takes the layer's output, or None."""
        first = next((n for n in self.path if n.target not in _IDENTITY), None)
        return first if first is not None and first.target is aten.batch_norm.default else None

    @property
    def needed(self) -> list[fx.Node]:
        """The nodes whose values `take_back` reads."""
        steps = zip((self.layer, *self.path), self.path)
        return [n for before, move in steps if move.target in _MOVES for n in (before, *move.all_input_nodes)]

    def take_back(self, program: Program, residual: torch.Tensor, values: Values) -> torch.Tensor:
        """What must be added to the layer's output so that `residual` is added to the target."""
        for before, node in reversed(list(zip((self.layer, *self.path), self.path))):
            residual = _undo(program, before, node, residual, values)
        return residual


def targets(layer: fx.Node) -> list[Target]:
    """What the layer may be asked to match, the farthest first, its own output last."""
    found, path, node = [Target(layer)], [], layer
    while len(node.users) == 1:
        (user,) = node.users
        if not _passes(node, user):
            break
        path.append(user)
        node = user
        if user.target in _SUMS or user.target is aten.batch_norm.default:
            found.append(Target(layer, tuple(path)))
    return found[::-1]


def _passes(node: fx.Node, user: fx.Node) -> bool:
    """Does the value of `node` go through `user` in a way that can be undone?"""
    if user.op != "call_function" or (user.args[0] is not node and user.target not in _SUMS | {aten.mul.Tensor}):
        return False
    if user.target in _SUMS:
        operands = user.all_input_nodes
        return len(operands) == 2 and argument(user, "alpha") == 1 and _same_shape(node, user)
    if user.target in _DROPOUT:
        return argument(user, "train") is False
    if user.target is aten.batch_norm.default:
        return uses_statistics(user) and all(
            argument(user, n) is None or is_constant(argument(user, n)) for n in ("weight", "bias")
        )
    if user.target is aten.mul.Tensor:
        return _factor(node, user) is not None and _same_shape(node, user)
    return user.target in _IDENTITY or user.target in _MOVES


def _same_shape(node: fx.Node, user: fx.Node) -> bool:
    return node.meta["val"].shape == user.meta["val"].shape


def _factor(node: fx.Node, user: fx.Node) -> Any:
    """The constant by which `user` multiplies `node`: a number, the node that reads a tensor, or None."""
    other = user.args[1] if user.args[0] is node else user.args[0]
    return other if isinstance(other, (int, float)) or (is_constant(other) and other is not node) else None


def _undo(program: Program, before: fx.Node, node: fx.Node, residual: torch.Tensor, values: Values) -> torch.Tensor:
    """From what must be added to `node` to what must be added to `before`, its operand."""
    if node.target is aten.batch_norm.default:
        return _divided(residual, _norm_scale(program, node, residual.ndim))
    if node.target is aten.mul.Tensor:
        factor = _factor(before, node)
        return _divided(residual, get_attribute(program.graph_module, factor.target) if is_constant(factor) else factor)
    if node.target is aten.sub.Tensor and node.args[1] is before:
        return -residual
    if node.target in _MOVES:
        return _transposed_move(before, node, residual, values)
    return residual


def _divided(residual: torch.Tensor, scale: Any) -> torch.Tensor:
    """Where the scale is 0 nothing can be mended."""
    scale = torch.as_tensor(scale, dtype=residual.dtype)
    return torch.where(scale == 0, 0.0, residual / torch.where(scale == 0, 1.0, scale))


def _norm_scale(program: Program, norm: fx.Node, dims: int) -> torch.Tensor:
    return norm_scale(program, norm).reshape(-1, *[1] * (dims - 2))


def norm_scale(program: Program, norm: fx.Node) -> torch.Tensor:
    """weight / sqrt(var + eps) of a BatchNorm, float64 [channels]."""
    _, deviation = statistics(program, norm)
    weight = argument(norm, "weight")
    return (1.0 if weight is None else get_attribute(program.graph_module, str(weight.target)).double()) / deviation


def _transposed_move(before: fx.Node, node: fx.Node, residual: torch.Tensor, values: Values) -> torch.Tensor:
    with torch.enable_grad():
        start = torch.zeros_like(values[before], dtype=residual.dtype, requires_grad=True)
        given = {**values, before: start}
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        moved = node.target(*args, **kwargs)  # type: ignore[operator]
        (result,) = torch.autograd.grad(moved, start, residual)
    return result
