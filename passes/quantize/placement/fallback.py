"""Find the fewest MACs to leave in float, or in 16 bits, so that a metric falls no further than allowed.

The metric is judged on the compiled model (a `judge`, see `Trials`), which is costly, so the search asks seldom:

1. Remedies without float: other rules for the ranges. The best is what the rest builds on.
2. A path from nothing in float to everything, by sensitivity (`sensitivity`): at each step the operations that make the
   most noise vanish for each MAC. A point vanishes only when all operations around it are in float, so the candidates
   are the surroundings of points, not single layers.
3. Growth along the path: 1, 2, 4, ... steps until the allowance is met, then bisection between the last two.
4. Giving back: what the path took on the way is tried on integers again, in the largest share that bisection finds,
   those that save the most MACs for the least noise first.
5. Refinement: what is fitted behind the quantization (corrected biases, learned rounding) takes long, so steps 3 and 4
   go without. Where it is asked for, or was the best remedy, the path to the result is bisected once more with it.
6. What is left is given back one operation at a time.

Steps 3 to 6 take for granted that less in float is never better, which holds up to the noise of the metric; the best
trial is kept at all times, and its metric was measured. What is exact is the judgement; the order is a heuristic, whose
result the tests compare with the optimum by brute force.

Where the target has activations of 16 bits, steps 2 to 6 are gone through with these in the place of float first, along
a path of the activations' points (weights keep their 8 bits). Float is left to what they do not suffice for: then
steps 2 to 6 build on 16 bits everywhere, if the metric is better with them.

The search is a function of what its trials gave, so a journal of them is all that is needed to go on after a kill.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from ....errors import FxpressError, OptionError
from .journal import Journal

_MOST_FAILURES = 8  # trials in a row whose metric fails


@dataclass(frozen=True)
class Budget:
    """How long a search may go on: seconds, and trials (judgements of a whole model). Raises OptionError."""

    seconds: float = 1800.0
    trials: int = 60

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise OptionError(f"search_seconds is {self.seconds}", hint="give more than 0")
        if isinstance(self.trials, bool) or self.trials < 0:
            raise OptionError(f"search_trials is {self.trials}", hint="give 0 (no search) or more")


Instead = Literal["float", "int16"]


@dataclass(frozen=True)
class Setting:
    """One way to quantize: the pipeline's options as text, and the operations that stay in float, or have activations
    of 16 bits (`instead`)."""

    options: str
    kept: frozenset[str] = frozenset()
    instead: Instead = "float"

    @property
    def key(self) -> str:
        name = " int16" if self.kept and self.instead == "int16" else ""
        return f"{self.options} |{name} {' '.join(sorted(self.kept))}"


@dataclass(frozen=True)
class Trial:
    """One judgement. `metric` is None where it failed (`error` says how). `float_macs`: MACs of one example that are
    not computed on integers, `int16_macs`: those with activations of 16 bits. `seconds`: to make and judge it."""

    setting: Setting
    metric: float | None
    float_macs: int
    int16_macs: int
    seconds: float
    error: str = ""


class Noisy(Protocol):
    """What the search knows of a point: its noise, and the operations that must be in float for it to vanish."""

    @property
    def noise(self) -> float: ...

    @property
    def operations(self) -> frozenset[str]: ...


class Exhausted(Exception):
    """The budget is used up, or the metric fails again and again; the message says which."""


FACTS = ("metric", "float_macs", "int16_macs", "seconds", "error")  # what is known of a trial beside its setting

Try = Callable[[Setting], tuple[float, int, int]]


@dataclass
class Search:
    """All trials of one search, and the best of them.

    `attempt` makes and judges a setting: (metric, MACs in float, MACs in 16 bits). `needed` is the metric that
    meets the allowance.
    """

    attempt: Try
    needed: float
    budget: Budget = field(default_factory=Budget)
    journal: Journal = field(default_factory=lambda: Journal(None, ""))
    clock: Callable[[], float] = time.perf_counter
    tell: Callable[[int, int], None] | None = None
    trials: list[Trial] = field(default_factory=list)
    hopeless: bool = False  # float does not meet the allowance either: the loss is elsewhere

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._recalled = 0.0
        self._known: dict[str, Trial] = {}

    @property
    def spent(self) -> float:
        """Seconds of this search, those of an earlier run that were taken over included."""
        return self.clock() - self._start + self._recalled

    @property
    def best(self) -> Trial | None:
        """The fewest MACs in float among those that meet the allowance; where none does, the best metric (where float
        would not help either, among those without more in float)."""
        judged = [t for t in self.trials if t.metric is not None and not (self.hopeless and t.setting.kept)]
        return min(judged, key=self._rank, default=None)

    def meets(self, trial: Trial | None) -> bool:
        """Is the allowance met?"""
        return trial is not None and trial.metric is not None and trial.metric >= self.needed

    def _rank(self, trial: Trial) -> tuple[float, ...]:
        assert trial.metric is not None
        if self.meets(trial):
            return (0, trial.float_macs, trial.int16_macs, -trial.metric)
        return (1, -trial.metric, trial.float_macs, trial.int16_macs)

    def add(self, trial: Trial) -> Trial:
        """Take in a trial that was judged elsewhere."""
        self.trials.append(trial)
        self._known[trial.setting.key] = trial
        return trial

    def judge(self, setting: Setting) -> Trial:
        """The trial of a setting, from memory or the journal where it is known. Raises Exhausted."""
        if setting.key in self._known:
            return self._known[setting.key]
        self._check_budget()
        fact = self.journal.find(setting.key)
        if fact is not None:
            self._recalled += fact["seconds"]
            trial = Trial(setting, *(fact[k] for k in FACTS))
        else:
            trial = self._run(setting)
            facts = {k: getattr(trial, k) for k in FACTS}
            self.journal.add(setting.key, {**facts, "drop_left": _margin(trial.metric, self.needed)})
        self.add(trial)
        if self.tell:
            self.tell(len(self.trials), self.budget.trials)
        return trial

    def _run(self, setting: Setting) -> Trial:
        start = self.clock()
        try:
            metric, floats, wide = self.attempt(setting)
        except FxpressError as error:
            return Trial(setting, None, 0, 0, self.clock() - start, error.message)
        if not math.isfinite(metric):
            return Trial(setting, None, floats, wide, self.clock() - start, f"the metric is {metric}")
        return Trial(setting, metric, floats, wide, self.clock() - start)

    def _check_budget(self) -> None:
        longest = max((t.seconds for t in self.trials[-3:]), default=0.0)
        if len(self.trials) >= self.budget.trials:
            raise Exhausted(f"the budget of {self.budget.trials} trials is used up")
        if self.spent + longest > self.budget.seconds:
            raise Exhausted(f"the budget of {self.budget.seconds:g} seconds is used up")
        last = self.trials[-_MOST_FAILURES:]
        if len(last) == _MOST_FAILURES and all(t.metric is None for t in last):
            raise Exhausted(f"the metric failed {_MOST_FAILURES} times in a row: {last[-1].error}")


def _margin(metric: float | None, needed: float) -> float | None:
    return None if metric is None else metric - needed


# -- the order ----------------------------------------------------------------------------------------------------


def float_path(points: Sequence[Noisy], macs: dict[str, int]) -> list[frozenset[str]]:
    """Growing sets of operations to leave in float (or 16 bits), from nothing to all: at each step the
    surroundings of the point that makes the most noise vanish for each MAC. `macs` by operation; absent means none."""
    kept: frozenset[str] = frozenset()
    path = [kept]
    around = _neighbours(points)
    left = set(range(len(points)))
    smallest = max(sum(macs.values()), 1) * 1e-6  # so that what costs nothing does not divide by 0
    while left:
        best = max(left, key=lambda i: _worth(points, i, around[i] & left, kept, macs, smallest))
        kept |= points[best].operations
        left = {i for i in left if not points[i].operations <= kept}
        path.append(kept)
    return path


def _worth(
    points: Sequence[Noisy], index: int, around: set[int], kept: frozenset[str], macs: dict[str, int], smallest: float
) -> tuple[float, int]:
    """Noise that vanishes for each MAC when the surroundings of a point join `kept`; ties go to the first point."""
    grown = kept | points[index].operations
    gain = sum(points[i].noise for i in around if points[i].operations <= grown)
    return gain / (sum(macs.get(o, 0) for o in grown - kept) + smallest), -index


def _neighbours(points: Sequence[Noisy]) -> list[set[int]]:
    """For each point those that have an operation in common with it, itself included."""
    by_operation: dict[str, set[int]] = {}
    for i, point in enumerate(points):
        for operation in point.operations:
            by_operation.setdefault(operation, set()).add(i)
    return [set().union({i}, *(by_operation[o] for o in p.operations)) for i, p in enumerate(points)]


def order_to_give_back(kept: frozenset[str], points: Sequence[Noisy], macs: dict[str, int]) -> list[str]:
    """The operations of `kept`, those first whose return to integers saves the most MACs for the least noise."""

    def cost(operation: str) -> tuple[float, str]:
        rest = kept - {operation}
        noise = sum(p.noise for p in points if operation in p.operations and p.operations <= kept)
        assert operation not in rest
        return (noise + 1e-30) / max(macs.get(operation, 0), 1e-3), operation

    return sorted(kept, key=cost)


# -- the steps of the search --------------------------------------------------------------------------------------


def try_remedies(search: Search, options: Iterable[str]) -> str:
    """Judge settings without float until one meets the allowance; returns the options of the best so far."""
    last = ""
    for last in options:
        if search.meets(search.judge(Setting(last))):
            break
    best = search.best
    return best.setting.options if best is not None else last


def grow(search: Search, start: Setting, path: Sequence[frozenset[str]]) -> None:
    """From `start`, steps 1, 2, 4, ... along the path until the allowance is met, then bisection."""
    low, step = 0, 1
    high = min(step, len(path) - 1)
    while not search.meets(search.judge(replace(start, kept=path[high]))):
        if high == len(path) - 1:
            judged = search.judge(replace(start, kept=path[high])).metric is not None
            search.hopeless = judged and start.instead == "float"
            return
        low, step = high, 2 * step
        high = min(step, len(path) - 1)
    _bisect(search, start, path, low, high)


def _bisect(search: Search, start: Setting, path: Sequence[frozenset[str]], low: int, high: int) -> None:
    """Between a set that does not meet the allowance and one that does."""
    while high - low > 1:
        middle = (low + high) // 2
        if search.meets(search.judge(replace(start, kept=path[middle]))):
            high = middle
        else:
            low = middle


def refine(search: Search, start: Setting, path: Sequence[frozenset[str]]) -> None:
    """From `start`, with better options than those that the best was found with, bisect along the path to the best."""
    best = search.best
    if best is None or not search.meets(best):
        return
    sets = list(dict.fromkeys(kept & best.setting.kept for kept in path))
    if search.meets(search.judge(replace(start, kept=sets[-1]))):
        _bisect(search, start, sets, 0, len(sets) - 1)


def give_back(search: Search, points: Sequence[Noisy], macs: dict[str, int]) -> None:
    """From the best trial on, return as many operations to integers at once as bisection finds."""
    best = search.best
    if best is None or not search.meets(best):
        return
    kept = best.setting.kept
    order = order_to_give_back(kept, points, macs)
    low, high = 0, len(order)  # giving back `low` is fine, all of them is not
    while high - low > 1:
        middle = (low + high) // 2
        if search.meets(search.judge(replace(best.setting, kept=kept - set(order[:middle])))):
            low = middle
        else:
            high = middle


def give_back_singly(search: Search, points: Sequence[Noisy], macs: dict[str, int]) -> None:
    """From the best trial on, one operation at a time; those without MACs stay as they are, since they save none."""
    needed: set[str] = set()
    while (best := search.best) is not None and search.meets(best):
        kept = best.setting.kept
        left = [o for o in order_to_give_back(kept, points, macs) if o not in needed and macs.get(o)]
        if not left:
            return
        search.judge(replace(best.setting, kept=kept - {left[0]}))
        if search.best is best:  # it is needed, or stays in float anyway
            needed.add(left[0])
