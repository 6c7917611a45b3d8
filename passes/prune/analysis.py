"""What is known about the dimensions of one program: the axes of every tensor, and what pruning needs beside them.

The walk in `rules.py` fills an `Analysis`, rule by rule. It records where a dimension is contracted (a removed
position must count as zero there), where statistics are taken over one (a removed position must not count at all), what
work depends on which axes, how a data movement maps positions, and which factor a group count stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from ...errors import PruningError
from ...frontend.cost import concrete, op_name
from ...frontend.program import Program, get_attribute
from ..rewrite import argument
from .axes import Atoms, Axes, Reason, Vector, movable

Value = Axes | list[Axes]  # of a tensor, or of an op with several outputs


@dataclass(frozen=True)
class Contraction:
    """Dimension `dim` of the tensor given as `argument` to `node` is summed over.

    `position`: which one, where the argument is a list of tensors.
    """

    node: fx.Node
    argument: str
    dim: int
    position: int | None = None

    @property
    def operand(self) -> fx.Node:
        """The node that gives the tensor."""
        given = argument(self.node, self.argument)
        found = given if self.position is None else given[self.position]
        assert isinstance(found, fx.Node)
        return found


@dataclass(frozen=True)
class Statistics:
    """`node` normalizes `argument` by mean and variance over the dimensions `dims`: those of what is kept.

    The argument is read as having the shape of `axes` (a group_norm sees groups and channels per group).
    """

    node: fx.Node
    argument: str
    axes: Axes
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """A share of a node's MACs that is proportional to the kept positions of these axes."""

    node: fx.Node
    axes: tuple[Vector, ...]
    share: float = 1.0


@dataclass(frozen=True)
class IndexMap:
    """Position i along `dim` of a node's output is position `index[i]` of its input."""

    dim: int
    index: Vector


@dataclass
class Analysis:
    """The axes of one program. `rules.analyze` makes it; names of parameters are those of the program."""

    program: Program
    atoms: Atoms = field(default_factory=Atoms)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[str, Axes] = field(default_factory=dict)  # parameters and buffers, by name
    contractions: list[Contraction] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    maps: dict[fx.Node, IndexMap] = field(default_factory=dict)
    factors: dict[fx.Node, Vector] = field(default_factory=dict)  # what the `groups` literal of a node counts
    integers: list[str] = field(default_factory=list)  # names of tensors that hold no floating-point numbers
    _by_identity: dict[int, Axes] = field(default_factory=dict)
    _named: dict[str, Any] = field(default_factory=dict, repr=False)

    # -- what rules read ----------------------------------------------------------------------------------------

    def axes(self, node: Any) -> Axes:
        """The axes of a node that gives one tensor."""
        value = self.values[node]
        assert isinstance(value, tuple)
        return value

    def of(self, node: fx.Node, name: str) -> Axes | None:
        """The axes of an argument of `node` by its schema name; None when it is no tensor."""
        value = argument(node, name)
        return self.values.get(value) if isinstance(value, fx.Node) else None  # type: ignore[return-value]

    def need(self, node: fx.Node, name: str) -> Axes:
        """As `of`, for an argument that the op requires."""
        found = self.of(node, name)
        assert found is not None
        return found

    def contracted(self, place: Contraction) -> Vector:
        """The dimension that is summed over."""
        return self.axes(place.operand)[place.dim]

    # -- what rules say -----------------------------------------------------------------------------------------

    def same(self, first: Vector, second: Vector, node: fx.Node, text: str | None = None) -> None:
        """Both dimensions are indexed together in `node`."""
        if self.atoms.adopt(first, second):
            return
        self.atoms.unify(first, second, Reason(text or f"{op_name(node)} meets a dimension that cannot change", node))

    def pin(self, axes: Vector | Axes, node: fx.Node, text: str) -> None:
        """These dimensions keep all their positions, because of `node`."""
        moving = [v for v in axes if movable(v)] if isinstance(axes, tuple) else [axes]
        if moving:
            self.atoms.pin(np.concatenate(moving) if len(moving) > 1 else moving[0], Reason(text, node))

    def contract(self, node: fx.Node, name: str, dim: int, position: int | None = None) -> None:
        """`node` sums over dimension `dim` of its argument `name` (of the tensor at `position` of a list)."""
        operand = argument(node, name)
        axes = self.axes(operand if position is None else operand[position])
        if movable(axes[dim]):
            self.contractions.append(Contraction(node, name, dim % len(axes), position))

    def normalize(self, node: fx.Node, name: str, axes: Axes, dims: tuple[int, ...]) -> None:
        """`node` takes mean and variance over `dims` of its argument `name`, read with these axes."""
        if any(movable(axes[d]) for d in dims):
            self.statistics.append(Statistics(node, name, axes, tuple(d % len(axes) for d in dims)))

    def costs(self, node: fx.Node, *axes: Vector, share: float = 1.0) -> None:
        """The MACs of `node` are proportional to the sizes of these axes."""
        self.work.append(Work(node, tuple(axes), share))

    def fixed(self, node: fx.Node, dims: slice = slice(None)) -> Axes:
        """Axes of a node's output that cannot change."""
        return tuple(self.atoms.fixed(n) for n in shape_of(node)[dims])

    def holds_tensor(self, name: str) -> bool:
        """Is there a tensor under this name, and no subgraph?"""
        return isinstance(self._attribute(name), torch.Tensor)

    def _attribute(self, name: str) -> Any:
        """What lies under a dotted name. Looking up all tensors at once is cheaper than path by path."""
        if not self._named:
            _collect(self.program.graph_module, "", self._named)
        found = self._named.get(name)
        return found if found is not None else get_attribute(self.program.graph_module, name)

    def tensor_axes(self, name: str) -> Axes:
        """The axes of a parameter or buffer; one that is known under two names has the same axes under both."""
        if name not in self.tensors:
            tensor = self._attribute(name)
            if not isinstance(tensor, torch.Tensor):
                raise PruningError(f"{name} is no tensor", hint="control flow in the graph cannot be pruned")
            if id(tensor) not in self._by_identity:
                self._by_identity[id(tensor)] = tuple(map(self.atoms.fresh, tensor.shape))
            self.tensors[name] = self._by_identity[id(tensor)]
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self.integers.append(name)
        return self.tensors[name]


def rows(names: str, rule: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Rows of a rule table: the same rule for several ATen ops."""
    return {f"aten.{name}": rule for name in names.split()}


def _collect(module: torch.nn.Module, prefix: str, found: dict[str, Any]) -> None:
    """Parameters and buffers under all their names (`named_modules` takes five times as long)."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        found[prefix + name] = tensor
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", found)


# -- reading nodes ------------------------------------------------------------------------------------------------


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The concrete shape of a node that gives one tensor."""
    return tuple(concrete(s) for s in node.meta["val"].shape)


def sizes_of(axes: Axes) -> tuple[int, ...]:
    """The shape that axes stand for."""
    return tuple(len(v) for v in axes)


def flat_axes(value: Value) -> list[Axes]:
    """The axes of all outputs of a node."""
    return value if isinstance(value, list) else [value]
