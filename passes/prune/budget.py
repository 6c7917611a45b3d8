"""Choose which literals to keep so that a budget is met.

All groups compete under one threshold on importance, found by bisection; then single steps are given back, the most
important first, until the result is within 1 % of the budget or no step fits. Costs are exact: every term of MACs and
parameters is a product of kept sizes of axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from ...errors import PruningError
from ...frontend.cost import cost_table
from ...frontend.program import get_attribute
from .analysis import Analysis, flat_axes
from .axes import FIXED, Vector
from .groups import Group

TOLERANCE = 0.01  # how far below a budget a plan may end where the granularity allows better


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


class Cost:
    """A sum of terms, each a constant times the kept sizes of some vectors."""

    def __init__(self, analysis: Analysis, terms: list[tuple[float, tuple[Vector, ...]]]) -> None:
        self._table = SizeTable(analysis)
        width = max((len(v) for _, v in terms), default=0)
        numbers = [[self._table.add(v) for v in vectors] for _, vectors in terms]
        # -1 is the 1 that `sizes` appends.
        self._numbers = np.array([n + [-1] * (width - len(n)) for n in numbers], dtype=np.int64).reshape(-1, width)
        self._constants = np.array([c for c, _ in terms])

    def __call__(self, keep: Vector) -> float:
        """The cost when only the literals of the mask `keep` are kept."""
        if not len(self._constants):
            return 0.0
        sizes = self._table.sizes(keep).astype(np.float64)
        return float((self._constants * sizes[self._numbers].prod(axis=1)).sum())


def macs_cost(analysis: Analysis) -> Cost:
    """The MACs of one example."""
    macs = {cost.node: cost.macs for cost in cost_table(analysis.program)}
    terms = []
    for work in analysis.work:
        axes = tuple(v for v in work.axes if v.any())
        terms.append((work.share * macs.get(work.node, 0) / max(prod(map(len, axes)), 1), axes))
    return Cost(analysis, terms)


def parameter_cost(analysis: Analysis) -> Cost:
    """The number of parameter values."""
    terms = []
    for name, axes in {id(a): (n, a) for n, a in analysis.tensors.items()}.values():
        if isinstance(get_attribute(analysis.program.graph_module, name), torch.nn.Parameter):
            free = tuple(v for v in axes if v.any())
            terms.append((prod(map(len, axes)) / max(prod(map(len, free)), 1), free))
    return Cost(analysis, terms)


# -- what each group may keep -------------------------------------------------------------------------------------


@dataclass
class Choice:
    """The literals of a group in the order in which they are kept, and how many may be kept."""

    order: Vector
    importance: Vector  # in that order
    allowed: Vector  # counts, ascending
    count: int = 0  # index into allowed

    def set_threshold(self, threshold: float) -> None:
        """Keep what is at least as important, rounded to the nearest allowed count."""
        wanted = int((self.importance >= threshold).sum())
        self.count = int(np.abs(self.allowed - wanted).argmin())

    @property
    def kept(self) -> int:
        return int(self.allowed[self.count])


def granule(size: int, round_to: int) -> int:
    """The rounding of a group: `round_to`, for narrow groups a half or a quarter of it, but 4 at least."""
    step = round_to
    while step > max(round_to // 4, min(round_to, 4)) and size < 4 * step:
        step //= 2
    return step


def allowed_counts(size: int, minimum: int, step: int) -> Vector:
    """Multiples of `step` from `minimum` on, and all of them."""
    multiples = np.arange(step, size + 1, step)
    return np.unique(np.append(multiples[multiples >= minimum], size))


def make_choices(
    analysis: Analysis, groups: list[Group], scores: Vector, round_to: int, max_ratio: float | None
) -> list[Choice]:
    """One choice for each group, everything kept. Literals that some tensor cannot do without come first."""
    protected = _protected(analysis, scores)
    factors = _factor_counts(analysis)
    choices = []
    for group in groups:
        literals = group.literals
        order = literals[np.lexsort((literals, -scores[literals], ~protected[literals]))]
        minimum = max(1, int(protected[literals].sum()))
        if max_ratio is not None:
            share = (1 - max_ratio) ** (1 / int(factors[literals].max()))
            minimum = max(minimum, math.ceil(share * len(group) - 1e-9))
        allowed = allowed_counts(len(group), minimum, granule(len(group), round_to))
        importance = np.where(protected[order], np.inf, scores[order])
        choices.append(Choice(order, importance, allowed, len(allowed) - 1))
    return choices


def _factor_counts(analysis: Analysis) -> Vector:
    """With how many free factors at most (itself included) each literal is multiplied in a parameter dimension."""
    result = np.ones(analysis.atoms.count, dtype=np.int64)
    for axes in analysis.tensors.values():
        for vector in axes:
            slots = analysis.atoms.resolve(vector)
            free = ~analysis.atoms.pinned(slots)
            counts = np.tile(free.sum(axis=0), (len(slots), 1))
            np.maximum.at(result, slots[free], counts[free])
    return result


def _protected(analysis: Analysis, scores: Vector) -> Vector:
    """Literals that must stay so that no dimension of any tensor becomes empty: those of its best position."""
    result = np.zeros(analysis.atoms.count, dtype=bool)
    result[FIXED] = True
    every = (v for value in analysis.values.values() for axes in flat_axes(value) for v in axes if v.any())
    vectors = {v.tobytes(): v for v in every}
    for vector in vectors.values():
        slots = analysis.atoms.resolve(vector)
        stays = (analysis.atoms.pinned(slots) | result[slots]).all(axis=0)
        if len(vector) and not stays.any():
            weakest = np.where(analysis.atoms.pinned(slots), np.inf, scores[slots]).min(axis=0)
            result[slots[:, weakest.argmax()]] = True
    return result


# -- meeting a budget ---------------------------------------------------------------------------------------------


@dataclass
class Selection:
    """Which atoms are kept, the cost reached, and what people should know about it."""

    keep: Vector
    cost: float
    notes: list[str] = field(default_factory=list)


def keep_mask(analysis: Analysis, choices: list[Choice]) -> Vector:
    """Mask over atoms: what the choices keep; everything that is in no group stays."""
    keep = np.ones(analysis.atoms.count, dtype=bool)
    for choice in choices:
        keep[choice.order[choice.kept :]] = False
    return keep


def select_ratio(analysis: Analysis, choices: list[Choice], ratio: float) -> Vector:
    """Remove the share `ratio` of every group."""
    for choice in choices:
        wanted = round(len(choice.order) * (1 - ratio))
        choice.count = int(np.abs(choice.allowed - wanted).argmin())
    return keep_mask(analysis, choices)


def select_budget(analysis: Analysis, choices: list[Choice], cost: Cost, share: float, name: str) -> Selection:
    """Keep what fits into `share` of the full cost. Raises PruningError where that cannot be reached."""
    total = cost(keep_mask(analysis, choices))
    measure = lambda: cost(keep_mask(analysis, choices))  # noqa: E731
    budget = share * total
    thresholds = np.unique(np.concatenate([[0.0, np.inf], *(c.importance for c in choices)]))
    low, high = 0, len(thresholds) - 1
    if _at(choices, thresholds[high], measure) > budget * (1 + 1e-12):
        reached = min(_minimum(choices, measure), total) / total if total else 1.0
        raise PruningError(
            f"{name}={share:g} cannot be reached: the smallest possible is {name}={reached:.4g}",
            hint="raise the budget, lower round_to, or exclude less (`fxpress inspect` lists what is pinned and why)",
        )
    while low < high:  # the least threshold that fits
        middle = (low + high) // 2
        low, high = (low, middle) if _at(choices, thresholds[middle], measure) <= budget else (middle + 1, high)
    reached = _at(choices, thresholds[low], measure)
    reached = _give_back(choices, reached, budget, measure)
    notes = []
    if reached < (1 - TOLERANCE) * budget:
        notes.append(
            f"{name} ended at {reached / total:.4f} instead of {share:g}: no group can keep a step more within it"
        )
    return Selection(keep_mask(analysis, choices), reached, notes)


def _at(choices: list[Choice], threshold: float, measure: Callable[[], float]) -> float:
    for choice in choices:
        choice.set_threshold(threshold)
    return measure()


def _minimum(choices: list[Choice], measure: Callable[[], float]) -> float:
    for choice in choices:
        choice.count = 0
    return measure()


def _give_back(choices: list[Choice], reached: float, budget: float, measure: Callable[[], float]) -> float:
    """Keep one step more in one group after the other, the most important step first, while the budget allows."""
    open_choices = list(choices)
    while reached < (1 - TOLERANCE / 4) * budget and open_choices:
        open_choices = [c for c in open_choices if c.count + 1 < len(c.allowed)]
        open_choices.sort(key=lambda c: -float(c.importance[c.kept]))
        for choice in list(open_choices):
            choice.count += 1
            cost = measure()
            if cost <= budget:
                reached = cost
                break
            choice.count -= 1
            open_choices.remove(choice)
    return reached
