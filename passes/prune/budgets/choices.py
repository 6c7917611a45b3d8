"""What each group may keep: its literals in the order of their importance, and the counts that options allow."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ....errors import OptionError
from ..analysis import Analysis, flat_axes
from ..axes import FIXED, Vector
from ..groups import Group


@dataclass(frozen=True)
class Limits:
    """What holds for every dimension, whatever the budget.

    `round_to`: kept sizes of dimensions are multiples of it (see `granule`). `max_ratio`: the largest share removed
    from any dimension. `min_channels`: no dimension gets shorter than this. `ratios`: (glob, share removed) for groups
    that run through layers of that name; of several that match, the last counts.
    """

    round_to: int = 1
    max_ratio: float | None = None
    min_channels: int = 1
    ratios: tuple[tuple[str, float], ...] = ()


@dataclass
class Choice:
    """The literals of a group in the order in which they are kept, and how many may be kept."""

    order: Vector
    importance: Vector  # in that order
    allowed: Vector  # counts, ascending
    count: int = 0  # index into allowed
    factors: int = 1  # of how many groups a dimension is the product in which this one occurs, at most
    fixed: bool = False  # by `ratios`

    def wanted(self, ratio: float) -> float:
        """How many to keep so that a dimension loses the share `ratio`, each of its factors alike."""
        return len(self.order) * (1 - ratio) ** (1 / self.factors)

    def set_nearest(self, wanted: float) -> None:
        """Keep the allowed count nearest to `wanted`."""
        self.count = int(np.abs(self.allowed - wanted).argmin())

    def set_threshold(self, threshold: float) -> None:
        """Keep what is at least as important, rounded to the nearest allowed count."""
        self.set_nearest(int((self.importance >= threshold).sum()))

    @property
    def kept(self) -> int:
        return int(self.allowed[self.count])


def granule(size: int, round_to: int) -> int:
    """The rounding of a group: `round_to`, half of it below 4 `round_to`, a quarter for groups narrower than itself,
    but 4 at least.

    Less would not pay: with AVX-512, ONNX Runtime's float convolutions take as long for 12 channels as for 16, and its
    INT8 ones longer (measured, docs/results.md).
    """
    share = 1 if size >= 4 * round_to else 2 if size >= round_to else 4
    return max(round_to // share, min(round_to, 4))


def allowed_counts(size: int, minimum: int, step: int) -> Vector:
    """Multiples of `step` from `minimum` on, and all of them."""
    multiples = np.arange(step, size + 1, step)
    return np.unique(np.append(multiples[multiples >= minimum], size))


def make_choices(analysis: Analysis, groups: list[Group], scores: Vector, limits: Limits) -> list[Choice]:
    """One choice for each group, everything kept. Literals that some tensor cannot do without come first.

    Raises OptionError for a glob of `limits.ratios` that matches no group.
    """
    protected = _protected(analysis, scores)
    least = _least_shares(analysis, limits)
    factors = _factor_counts(analysis)
    ratios = match_ratios(groups, limits.ratios)
    choices = []
    for group, ratio in zip(groups, ratios):
        literals = group.literals
        order = literals[np.lexsort((literals, -scores[literals], ~protected[literals]))]
        share = float(least[literals].max())
        minimum = max(1, int(protected[literals].sum()), math.ceil(share * len(group) - 1e-9))
        allowed = allowed_counts(len(group), minimum, _step(analysis, group, limits.round_to))
        importance = np.where(protected[order], np.inf, scores[order])
        choice = Choice(order, importance, allowed, len(allowed) - 1, int(factors[literals].max()))
        if ratio is not None:
            choice.set_nearest(choice.wanted(ratio))
            choice.allowed, choice.count, choice.fixed = allowed[[choice.count]], 0, True
        choices.append(choice)
    return choices


def _step(analysis: Analysis, group: Group, round_to: int) -> int:
    """By how many literals a group shrinks at a time, so that its dimensions stay multiples of the granule.

    A literal that stands for a run of positions in every dimension (a head of 64 features) counts as so many.
    """
    if round_to == 1:
        return 1
    vectors = {v.tobytes(): v for v in (analysis.tensors[p.name][p.dim] for p in group.places)}
    run = min(_run(analysis, group, vector) for vector in vectors.values())
    step = granule(len(group) * run, round_to)
    return step // math.gcd(step, run)


def _run(analysis: Analysis, group: Group, vector: Vector) -> int:
    """How many neighbouring positions of a dimension a literal of the group has (the mean, rounded down)."""
    slots = analysis.atoms.resolve(vector)
    member = np.isin(slots, group.literals)
    starts = member.copy()
    starts[:, 1:] &= slots[:, 1:] != slots[:, :-1]
    return max(int(member.sum()) // max(int(starts.sum()), 1), 1)


def match_ratios(groups: list[Group], ratios: Sequence[tuple[str, float]]) -> list[float | None]:
    """For each group the share that the last matching glob removes, or None."""
    found: list[float | None] = [None] * len(groups)
    for pattern, ratio in ratios:
        hits = [i for i, group in enumerate(groups) if any(matches(layer, pattern) for layer in group.layers)]
        if not hits:
            known = list(dict.fromkeys(layer for group in groups for layer in group.layers))
            raise OptionError(
                f"the pattern {pattern!r} of ratios matches no layer that can be pruned",
                hint=f"names look like {', '.join(known[:3])}",
            )
        for i in hits:
            found[i] = ratio
    return found


def matches(name: str, pattern: str) -> bool:
    """Does a glob match a dotted name, or the name of one of its owners?"""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _least_shares(analysis: Analysis, limits: Limits) -> Vector:
    """The share of each literal's group that must stay so that `max_ratio` and `min_channels` hold everywhere.

    Where a position is a product of k free factors (heads x features), the k-th root of what its dimension needs.
    """
    result = np.zeros(analysis.atoms.count)
    if limits.max_ratio is None and limits.min_channels <= 1:
        return result
    by_ratio = 0.0 if limits.max_ratio is None else 1 - limits.max_ratio
    for vector in _parameter_vectors(analysis):
        slots = analysis.atoms.resolve(vector)
        free = ~analysis.atoms.pinned(slots)
        need = max(by_ratio, min(1, limits.min_channels / len(vector)))
        shares = np.tile(need ** (1 / np.maximum(free.sum(axis=0), 1)), (len(slots), 1))
        np.maximum.at(result, slots[free], shares[free])
    return result


def _factor_counts(analysis: Analysis) -> Vector:
    """With how many free factors at most (itself included) each literal is multiplied in a parameter dimension."""
    result = np.ones(analysis.atoms.count, dtype=np.int64)
    for vector in _parameter_vectors(analysis):
        slots = analysis.atoms.resolve(vector)
        if len(slots) > 1:
            free = ~analysis.atoms.pinned(slots)
            counts = np.tile(free.sum(axis=0), (len(slots), 1))
            np.maximum.at(result, slots[free], counts[free])
    return result


def _parameter_vectors(analysis: Analysis) -> Iterable[Vector]:
    return {v.tobytes(): v for axes in analysis.tensors.values() for v in axes if v.any()}.values()


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
