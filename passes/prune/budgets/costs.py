"""What a program costs as a function of what is kept: MACs, parameters, bytes. All are exact.

Every term of these costs is a constant times the kept sizes of some axes, and belongs to a part: the layer that
computes it, or whose parameter it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch

from ....frontend.cost import cost_table
from ....frontend.program import get_attribute, layer_name
from ..analysis import Analysis
from ..axes import Vector
from ..groups import Group


class CostModel(Protocol):
    """A cost that can be asked for many masks over atoms, as a whole and part by part."""

    @property
    def names(self) -> list[str]:
        """The names of the parts, for people."""

    def parts(self, keep: Vector) -> Vector:
        """The cost of each part when only the literals of the mask `keep` are kept."""

    def __call__(self, keep: Vector) -> float:
        """The sum of the parts."""


class SizeTable:
    """The kept sizes of many vectors at once: each distinct vector is resolved and counted only once."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._numbers: dict[bytes, int] = {}
        self._vectors: list[Vector] = []
        self._slots: Vector | None = None
        self._starts: Vector = np.zeros(0, dtype=np.int64)

    def add(self, vector: Vector) -> int:
        """The number of a vector in the table."""
        key = vector.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self._vectors)
            self._vectors.append(vector)
        return self._numbers[key]

    def sizes(self, keep: Vector) -> Vector:
        """The kept size of every vector, for a mask over atoms; one 1 is added at the end."""
        if self._slots is None:
            self._slots = self._analysis.atoms.resolve(np.concatenate(self._vectors))
            self._starts = np.cumsum([0, *(len(v) for v in self._vectors)])[:-1]
        kept = keep[self._slots].all(axis=0)
        return np.append(np.add.reduceat(kept, self._starts, dtype=np.int64), 1)

    @property
    def vectors(self) -> list[Vector]:
        """All distinct vectors, by number."""
        return self._vectors


@dataclass(frozen=True)
class Term:
    """A constant times the kept sizes of `vectors`; it belongs to the part `owner`."""

    owner: str
    constant: float
    vectors: tuple[Vector, ...]


class Cost:
    """A sum of terms."""

    def __init__(self, analysis: Analysis, terms: list[Term]) -> None:
        self._table = SizeTable(analysis)
        width = max((len(t.vectors) for t in terms), default=0)
        numbers = [[self._table.add(v) for v in t.vectors] for t in terms]
        # -1 is the 1 that `sizes` appends.
        padded = [n + [-1] * (width - len(n)) for n in numbers]
        self._numbers = np.array(padded, dtype=np.int64).reshape(len(terms), width)
        self._constants = np.array([t.constant for t in terms])
        self.names = list(dict.fromkeys(t.owner for t in terms))
        index = {name: i for i, name in enumerate(self.names)}
        self._owners = np.array([index[t.owner] for t in terms], dtype=np.int64)

    def parts(self, keep: Vector) -> Vector:
        """The cost of each part, in the order of `names`."""
        return np.bincount(self._owners, weights=self._terms(keep), minlength=len(self.names))

    def __call__(self, keep: Vector) -> float:
        """The cost when only the literals of the mask `keep` are kept."""
        return float(self._terms(keep).sum())

    def _terms(self, keep: Vector) -> Vector:
        if not len(self._constants):
            return self._constants
        sizes = self._table.sizes(keep).astype(np.float64)
        return self._constants * sizes[self._numbers].prod(axis=1)


def macs_cost(analysis: Analysis) -> Cost:
    """The MACs of one example; a part is a layer."""
    macs = {cost.node: cost.macs for cost in cost_table(analysis.program)}
    terms = []
    for work in analysis.work:
        axes = tuple(v for v in work.axes if v.any())
        constant = work.share * macs.get(work.node, 0) / max(prod(map(len, axes)), 1)
        terms.append(Term(layer_name(work.node), constant, axes))
    return Cost(analysis, terms)


def parameter_cost(analysis: Analysis) -> Cost:
    """The number of parameter values; a part is what has its parameters in one module."""
    return _stored(analysis, lambda t: float(isinstance(t, torch.nn.Parameter)))


def size_cost(analysis: Analysis) -> Cost:
    """The bytes of all parameters and buffers."""
    return _stored(analysis, lambda t: float(t.element_size()))


def _stored(analysis: Analysis, worth: Callable[[torch.Tensor], float]) -> Cost:
    """The values of all tensors, each counted once and with the worth of one of its values."""
    terms = []
    for name, axes in {id(a): (n, a) for n, a in analysis.tensors.items()}.values():
        value = worth(get_attribute(analysis.program.graph_module, name))
        free = tuple(v for v in axes if v.any())
        if value:
            constant = value * prod(map(len, axes)) / max(prod(map(len, free)), 1)
            terms.append(Term(name.rpartition(".")[0] or name, constant, free))
    return Cost(analysis, terms)


def channel_cost(analysis: Analysis, groups: Iterable[Group]) -> Cost:
    """The number of literals that are kept; a part is a group."""
    return Cost(analysis, [Term(str(g.places[0]), 1.0, (g.literals,)) for g in groups])
