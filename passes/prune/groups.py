"""Groups: literals that occur in exactly the same dimensions of the same parameters, and so compete with one another.

Removing a literal shortens every place of its group by as many positions as it has there. The factors of a product
(heads and their features) are groups of their own: a literal does not compete with those that it is multiplied with.
`find_groups` is one pass over all parameter dimensions: each place adds its random 64-bit number to the signature of
the literals that occur in it, and each literal its own to those of the literals that it is multiplied with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ...frontend.program import get_attribute, layer_name
from .analysis import Analysis, flat_axes
from .axes import Reason, Vector


class Place(NamedTuple):
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
    """All groups of literals that may be removed, by their first place. Linear in the positions of all places."""
    where = list(places(analysis))
    parts, of_place = _distinct_parts(analysis, [vector for _, vector in where])
    part, literals, counts = _occurrences(analysis, parts)
    numbers = np.random.default_rng(0).integers(1, 2**63, size=len(where) + analysis.atoms.count, dtype=np.uint64)
    weight, signature = (np.zeros(n, dtype=np.uint64) for n in (len(parts), analysis.atoms.count))
    np.add.at(weight, of_place, numbers[: len(where)])
    np.add.at(signature, literals, weight[part])
    first, second = _multiplied(analysis, parts)
    np.add.at(signature, first, numbers[len(where) :][second])
    members = np.flatnonzero(signature)
    _, index = np.unique(signature[members], return_inverse=True)
    number = np.zeros(analysis.atoms.count, dtype=np.int64)
    number[members] = index
    means = _mean_counts(part, number[literals], counts, len(parts))
    alike: list[list[Place]] = [[] for _ in parts]
    for (place, _), p in zip(where, of_place.tolist()):
        alike[p].append(place)
    found: dict[int, tuple[list[Place], list[float]]] = {}  # in the order of the first place
    for same, found_here in zip(alike, means):
        for group, count in found_here:
            at, counted = found.setdefault(group, ([], []))
            at += same
            counted += [count] * len(same)
    order = np.argsort(index, kind="stable")
    sizes = np.cumsum(np.bincount(index))
    atoms = np.split(members[order], sizes[:-1]) if len(members) else []
    return [Group(analysis, atoms[g], tuple(at), tuple(counted)) for g, (at, counted) in found.items()]


def _distinct_parts(analysis: Analysis, vectors: list[Vector]) -> tuple[list[Vector], Vector]:
    """The literals [slots, positions] of every distinct vector, and which of them each vector has."""
    if not vectors:
        return [], np.zeros(0, dtype=np.int64)
    originals = [analysis.atoms.original(v) for v in vectors]
    distinct = list({id(v): v for v in originals}.values())
    roots = analysis.atoms.find(np.concatenate(distinct))
    ends = itertools.accumulate(map(len, distinct))
    known: dict[bytes, int] = {}
    number = {id(v): known.setdefault(roots[b - len(v) : b].tobytes(), len(known)) for v, b in zip(distinct, ends)}
    parts = [analysis.atoms.resolve(np.frombuffer(piece, dtype=np.int64), roots=True) for piece in known]
    return parts, np.array([number[id(v)] for v in originals])


def _occurrences(analysis: Analysis, parts: list[Vector]) -> tuple[Vector, Vector, Vector]:
    """(part, free literal, how often it occurs there), by part and literal."""
    if not parts:
        return (np.zeros(0, dtype=np.int64),) * 3
    flat = np.concatenate([p.ravel() for p in parts])
    owner = np.repeat(np.arange(len(parts)), [p.size for p in parts])
    free = ~analysis.atoms.pinned(flat)
    keys, counts = np.unique(owner[free] * analysis.atoms.count + flat[free], return_counts=True)
    return keys // analysis.atoms.count, keys % analysis.atoms.count, counts


def _multiplied(analysis: Analysis, parts: list[Vector]) -> tuple[Vector, Vector]:
    """The distinct ordered pairs of free literals that stand at the same position of a dimension."""
    pairs = [p for slots in parts for p in itertools.combinations(slots, 2)]
    if not pairs:
        return (np.zeros(0, dtype=np.int64),) * 2
    first, second = (np.concatenate(side) for side in zip(*pairs))
    free = ~(analysis.atoms.pinned(first) | analysis.atoms.pinned(second))
    keys = np.unique(np.minimum(first, second)[free] * analysis.atoms.count + np.maximum(first, second)[free])
    low, high = keys // analysis.atoms.count, keys % analysis.atoms.count
    return np.concatenate([low, high]), np.concatenate([high, low])


def _mean_counts(part: Vector, group: Vector, counts: Vector, parts: int) -> list[list[tuple[int, float]]]:
    """For each part: its groups by number, and the mean count of each one's literals in it."""
    width = int(group.max()) + 1 if len(group) else 1
    keys = part * width + group
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])  # runs: groups are mostly contiguous
    sums, lengths = np.add.reduceat(counts, starts), np.diff(np.append(starts, len(keys)))
    keys, index = np.unique(keys[starts], return_inverse=True)
    means = np.bincount(index.ravel(), sums) / np.bincount(index.ravel(), lengths)
    result: list[list[tuple[int, float]]] = [[] for _ in range(parts)]
    for key, mean in zip(keys.tolist(), means.tolist()):
        result[key // width].append((key % width, mean))
    return result


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
