"""Groups: literals that occur in exactly the same dimensions of the same parameters, and so compete with one another.

Removing a literal shortens every place of its group by as many positions as it has there. `find_groups` is one pass
over all parameter dimensions: each place adds its random 64-bit number to the signature of the literals that occur in
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...frontend.program import get_attribute, layer_name
from .analysis import Analysis, flat_axes
from .axes import Reason, Vector


@dataclass(frozen=True, order=True)
class Place:
    """Dimension `dim` of the parameter or buffer `name`."""

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


@dataclass(frozen=True)
class Group:
    """Literals that are removed alike. `multiplicity[i]`: positions of one literal in `places[i]` (its mean)."""

    analysis: Analysis
    literals: Vector
    places: tuple[Place, ...]
    multiplicity: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.literals)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers whose outputs the group runs through, in graph order."""
        found: dict[str, None] = {}
        for node, value in self.analysis.values.items():
            if node.op == "call_function" and any(self._touches(v) for axes in flat_axes(value) for v in axes):
                found[layer_name(node)] = None
        return list(found)

    def _touches(self, vector: Vector) -> bool:
        return bool(vector.any()) and bool(np.isin(self.analysis.atoms.resolve(vector), self.literals).any())

    def __str__(self) -> str:
        lines = [f"group of {len(self)}: {self.places[0]} and {len(self.places) - 1} more places"]
        lines += [f"  {place!s:48} x {count:g}" for place, count in zip(self.places, self.multiplicity)]
        return "\n".join([*lines, f"  through {', '.join(self.layers)}"])


@dataclass(frozen=True)
class Pinned:
    """A parameter dimension with positions that can never be removed: how many of its size, and why."""

    place: Place
    size: int
    positions: int
    reason: Reason


def places(analysis: Analysis) -> Iterator[tuple[Place, Vector]]:
    """Every dimension of every parameter and buffer with its vector; a tensor with two names comes once."""
    seen: set[int] = set()
    for name, axes in analysis.tensors.items():
        if id(axes) not in seen:
            seen.add(id(axes))
            yield from ((Place(name, dim), vector) for dim, vector in enumerate(axes))


def find_groups(analysis: Analysis) -> list[Group]:
    """All groups of literals that may be removed, by their first place."""
    signature = np.zeros(analysis.atoms.count, dtype=np.uint64)
    numbers = np.random.default_rng(0)
    found: list[tuple[Place, Vector, Vector]] = []  # place, its free literals, how often each occurs
    for place, vector in places(analysis):
        literals, counts = np.unique(analysis.atoms.resolve(vector), return_counts=True)
        free = ~analysis.atoms.pinned(literals)
        literals, counts = literals[free], counts[free]
        if len(literals):
            signature[literals] += numbers.integers(1, 2**63, dtype=np.uint64)
            found.append((place, literals, counts))
    if not found:
        return []
    everything = np.unique(np.concatenate([literals for _, literals, _ in found]))
    return _collect(analysis, found, everything, signature)


def _collect(
    analysis: Analysis, found: list[tuple[Place, Vector, Vector]], everything: Vector, signature: Vector
) -> list[Group]:
    _, index = np.unique(signature[everything], return_inverse=True)
    number = np.full(analysis.atoms.count, -1)
    number[everything] = index
    members: list[list[tuple[Place, float]]] = [[] for _ in range(index.max() + 1)]
    for place, literals, counts in found:
        groups = number[literals]
        for group in np.unique(groups):
            members[group].append((place, float(counts[groups == group].mean())))
    result = [
        Group(analysis, everything[index == i], tuple(p for p, _ in places_), tuple(c for _, c in places_))
        for i, places_ in enumerate(members)
    ]
    order = {place: i for i, (place, _, _) in enumerate(found)}
    return sorted(result, key=lambda g: (order[g.places[0]], int(g.literals[0])))


def find_pinned(analysis: Analysis) -> list[Pinned]:
    """Every parameter dimension of more than one position of which some can never go, with the first reason."""
    result = []
    for place, vector in places(analysis):
        slots = analysis.atoms.resolve(vector)
        stuck = analysis.atoms.pinned(slots).all(axis=0)
        if len(vector) > 1 and stuck.any():
            literals = slots[:, stuck][slots[:, stuck] > 0]
            reason = analysis.atoms.reason(int(literals[0])) if len(literals) else None
            result.append(Pinned(place, len(vector), int(stuck.sum()), reason or Reason("fixed")))
    return result


@dataclass(frozen=True)
class Coverage:
    """How many parameter values lie in a group, are pinned with a reason, or neither (which must not happen)."""

    grouped: int
    pinned: int
    unexplained: int


def coverage(analysis: Analysis) -> Coverage:
    """Account for every parameter value: prunable along some dimension, or pinned along all with a reason."""
    grouped = pinned = unexplained = 0
    in_group = {place.name for group in find_groups(analysis) for place in group.places}
    with_reason = {p.place.name for p in find_pinned(analysis) if p.reason.text}
    for name in {place.name for place, _ in places(analysis)}:
        tensor = get_attribute(analysis.program.graph_module, name)
        if not isinstance(tensor, torch.nn.Parameter):
            continue
        if name in in_group:
            grouped += tensor.numel()
        elif name in with_reason or tensor.numel() == 1:
            pinned += tensor.numel()
        else:
            unexplained += tensor.numel()
    return Coverage(grouped, pinned, unexplained)
