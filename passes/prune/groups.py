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


@dataclass(frozen=True, eq=False)
class _Occurrence:
    """The free literals of a dimension, sorted, and how often each occurs. Places that are tied share one."""

    literals: Vector
    counts: Vector


def find_groups(analysis: Analysis) -> list[Group]:
    """All groups of literals that may be removed, by their first place."""
    signature = np.zeros(analysis.atoms.count, dtype=np.uint64)
    numbers = np.random.default_rng(0)
    found = [(place, o) for place, o in _occurrences(analysis) if len(o.literals)]
    for _, occurrence in found:
        signature[occurrence.literals] += numbers.integers(1, 2**63, dtype=np.uint64)
    literals = np.flatnonzero(signature)
    _, index = np.unique(signature[literals], return_inverse=True)
    number = np.zeros(analysis.atoms.count, dtype=np.int64)
    number[literals] = index
    members: dict[int, dict[Place, float]] = {}  # in the order of the first place
    parts: dict[_Occurrence, dict[int, float]] = {}
    for place, occurrence in found:
        if occurrence not in parts:
            parts[occurrence] = _mean_counts(number[occurrence.literals], occurrence.counts)
        for group, count in parts[occurrence].items():
            members.setdefault(group, {})[place] = count
    return [Group(analysis, literals[index == g], tuple(m), tuple(m.values())) for g, m in members.items()]


def _occurrences(analysis: Analysis) -> Iterator[tuple[Place, _Occurrence]]:
    known: dict[bytes, _Occurrence] = {}
    for place, vector in places(analysis):
        slots = analysis.atoms.resolve(vector)
        key = slots.tobytes()
        if key not in known:
            literals, counts = np.unique(slots, return_counts=True)
            free = ~analysis.atoms.pinned(literals)
            known[key] = _Occurrence(literals[free], counts[free])
        yield place, known[key]


def _mean_counts(groups: Vector, counts: Vector) -> dict[int, float]:
    """Group number -> mean count of its literals."""
    distinct, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(index.ravel(), weights=counts) / sizes
    return dict(sorted(zip(distinct.tolist(), means.tolist())))


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
