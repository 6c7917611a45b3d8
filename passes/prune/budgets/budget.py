"""Budgets: what may stay, and the choice of literals that meets it.

Globally, all groups compete under one threshold on importance, found by bisection; then single steps are given back,
the most important first, until the result is within 1 % of the budget or no step fits. Layer by layer, every layer is
brought to the share by itself: where it is above, the groups that it depends on shrink alike; then each group takes
back what no layer needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from ....errors import OptionError, PruningError
from ..analysis import Analysis
from ..axes import Vector
from .choices import Choice, Limits
from .costs import CostModel

TOLERANCE = 0.01  # how far below a budget a plan may end where the granularity allows better
_EXCHANGES = 5000  # costs looked at, about, where no single step meets a budget
_ROUNDS = 100  # of shrinking in per-layer budgets; each at least takes a step from every group that must shrink

Scope = Literal["global", "layer"]
Ratios = Mapping[str, float] | Iterable[str]


# -- what is asked for --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """`name` is macs, params, size or latency, with the `share` that is kept, or ratio, with the share that goes."""

    name: str
    share: float
    scope: Scope
    limits: Limits

    @staticmethod
    def checked(
        shares: Mapping[str, float | None],
        scope: Scope | None = None,
        ratios: Ratios = (),
        round_to: int | None = None,
        max_ratio: float | None = None,
        min_channels: int | None = None,
    ) -> Budget:
        """The one budget among `shares` that is given; `ratios` alone is one too. Raises OptionError."""
        given = [(n, v) for n, v in shares.items() if v is not None]
        fixed = read_ratios(ratios)
        if not given and fixed and scope is None:
            given = [("ratio", 0.0)]
        elif len(given) != 1:
            names = ", ".join(n for n, _ in given) or "none"
            hint = "for example macs=0.5 (keep half of the MACs)"
            raise OptionError(f"give exactly one budget, got {names}", hint=hint)
        else:
            _check_share(*given[0])
        if scope is not None and scope not in get_args(Scope):
            raise OptionError(f"scope is {scope!r}", hint=f"choose one of {', '.join(get_args(Scope))}")
        for option, value in (("round_to", round_to), ("min_channels", min_channels)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise OptionError(f"{option} is {value!r}", hint="give a positive whole number, such as 8")
        if max_ratio is not None and not (_is_number(max_ratio) and 0 < max_ratio < 1):
            raise OptionError(f"max_ratio is {max_ratio!r}", hint="give a share in (0, 1)")
        beyond = [f"{glob}:{ratio:g}" for glob, ratio in fixed if max_ratio is not None and ratio > max_ratio]
        if beyond:
            message = f"ratios asks for {beyond[0]}, above max_ratio={max_ratio:g}"
            raise OptionError(message, hint="change one of the two")
        name, share = given[0]
        limits = Limits(round_to or 1, max_ratio, min_channels or 1, fixed)
        return Budget(name, float(share), scope or ("layer" if name == "ratio" else "global"), limits)

    def __str__(self) -> str:
        default = "layer" if self.name == "ratio" else "global"
        fixed = ", ".join(f"{glob}:{ratio:g}" for glob, ratio in self.limits.ratios)
        scope = "" if self.scope == default else f", scope={self.scope}"
        return f"{self.name}={self.share:g}{scope}" + (f", ratios=[{fixed}]" if fixed else "")


def read_ratios(ratios: Ratios) -> tuple[tuple[str, float], ...]:
    """(glob, share removed) from a mapping or from texts "glob:share". Raises OptionError."""
    if isinstance(ratios, str):
        ratios = [ratios]
    items = ratios.items() if isinstance(ratios, Mapping) else map(_read_ratio, ratios)
    found = tuple((glob, share) for glob, share in items)
    for glob, share in found:
        if not isinstance(glob, str) or not glob or not _is_number(share) or not 0 <= share < 1:
            raise OptionError(
                f"ratios holds {glob!r}: {share!r}",
                hint='give shares to remove in [0, 1) by glob: {"layer1.*": 0.3}, or as text layer1.*:0.3',
            )
    return tuple((glob, float(share)) for glob, share in found)


def _read_ratio(text: object) -> tuple[str, float]:
    glob, _, share = str(text).rpartition(":")
    try:
        return glob, float(share)
    except ValueError as error:
        raise OptionError(f"ratios holds {text!r}", hint="write glob:share, for example layer1.*:0.3") from error


def _check_share(name: str, value: object) -> None:
    if name == "threshold":
        if not _is_number(value) or value <= 0:  # type: ignore[operator]
            raise OptionError(f"threshold is {value!r}", hint="give a positive number, in units of the importance")
        return
    if not _is_number(value) or not 0 < value <= 1 or (name == "ratio" and value == 1):  # type: ignore[operator]
        hint = "give a share in (0, 1): ratio says what goes, every other budget what is kept"
        raise OptionError(f"{name} is {value!r}", hint=hint)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- meeting it ---------------------------------------------------------------------------------------------------


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


def select(analysis: Analysis, choices: list[Choice], budget: Budget, cost: CostModel) -> Selection:
    """Keep what meets a budget; of a ratio, `cost` counts channels and is only asked where the scope is global."""
    if budget.name == "threshold":
        return Selection(select_threshold(analysis, choices, budget.share), 0.0)
    if budget.name == "ratio" and budget.scope == "layer":
        return select_ratio(analysis, choices, budget.share)
    share = 1 - budget.share if budget.name == "ratio" else budget.share
    name = "share of channels" if budget.name == "ratio" else budget.name
    if budget.scope == "layer":
        return select_layers(analysis, choices, cost, share, name)
    return select_budget(analysis, choices, cost, share, name, thorough=name == "latency")


def select_threshold(analysis: Analysis, choices: list[Choice], threshold: float) -> Vector:
    """Remove what is less important than `threshold`, rounded to what each group may keep."""
    for choice in choices:
        choice.set_threshold(threshold)
    return keep_mask(analysis, choices)


def select_ratio(analysis: Analysis, choices: list[Choice], ratio: float) -> Selection:
    """Remove the share `ratio` of every group; of groups that are multiplied with others, of their dimensions."""
    for choice in choices:
        choice.set_nearest(choice.wanted(ratio))
    free = [c for c in choices if not c.fixed]
    size, kept, wanted = sum(len(c.order) for c in free), sum(c.kept for c in free), sum(c.wanted(ratio) for c in free)
    notes = []
    if abs(kept - wanted) > TOLERANCE * size:
        notes.append(f"ratio={ratio:g} asks to keep {wanted:.0f} of {size} channels, {kept} are kept: groups shrink in "
                     "steps, and within their limits")  # fmt: skip
    return Selection(keep_mask(analysis, choices), 0.0, notes)


def select_budget(
    analysis: Analysis, choices: list[Choice], cost: CostModel, share: float, name: str, thorough: bool = False
) -> Selection:
    """Keep what fits into `share` of the full cost. Raises PruningError where that cannot be reached.

    `thorough`: give back steps as long as any fits, not only to within 1 %: for costs with steps that are free.
    """
    measure = lambda: cost(keep_mask(analysis, choices))  # noqa: E731
    total = cost(np.ones(analysis.atoms.count, dtype=bool))
    budget = share * total
    thresholds = np.unique(np.concatenate([[0.0, np.inf], *(c.importance for c in choices)]))
    low, high = 0, len(thresholds) - 1
    if _at(choices, thresholds[high], measure) > budget * (1 + 1e-12):
        reached = min(_minimum(choices, measure), total) / total if total else 1.0
        raise PruningError(
            f"{name}={share:g} cannot be reached: the smallest possible is {name}={reached:.4g}",
            hint="raise the budget, lower round_to, min_channels or what is excluded, raise max_ratio "
            "(`fxpress inspect` lists what is pinned and why)",
        )
    while low < high:  # the least threshold that fits
        middle = (low + high) // 2
        low, high = (low, middle) if _at(choices, thresholds[middle], measure) <= budget else (middle + 1, high)
    reached = _at(choices, thresholds[low], measure)
    reached = _give_back(choices, reached, budget, measure, 1.0 if thorough else 1 - TOLERANCE / 4)
    if reached < (1 - TOLERANCE) * budget:
        reached = _exchange(choices, reached, budget, measure)
    notes = []
    if reached < (1 - TOLERANCE) * budget:
        notes.append(
            f"{name} ended at {reached / total:.4f} instead of {share:g}: no group can keep a step more within it, and "
            "no other one a step less for it"
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


def _give_back(
    choices: list[Choice], reached: float, budget: float, measure: Callable[[], float], enough: float
) -> float:
    """Keep one step more in one group after the other, the most important step first, while the budget allows."""
    open_choices = list(choices)
    while reached < enough * budget and open_choices:
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


def _exchange(choices: list[Choice], reached: float, budget: float, measure: Callable[[], float]) -> float:
    """Take a step from one group, the least important first, where others can then fill the budget better."""
    givers = sorted((c for c in choices if c.count > 0), key=lambda c: float(c.importance[c.kept - 1]))
    for giver in givers[: _EXCHANGES // max(len(choices), 1) + 1]:
        before = [c.count for c in choices]
        giver.count -= 1
        others = [c for c in choices if c is not giver]
        filled = _give_back(others, measure(), budget, measure, 1 - TOLERANCE / 4)
        if (1 - TOLERANCE) * budget <= filled <= budget:
            return filled
        for choice, count in zip(choices, before):
            choice.count = count
    return reached


# -- layer by layer -----------------------------------------------------------------------------------------------


def select_layers(analysis: Analysis, choices: list[Choice], cost: CostModel, share: float, name: str) -> Selection:
    """Bring every part of the cost that depends on a group to `share` of its full cost, by itself."""
    everything = np.ones(analysis.atoms.count, dtype=bool)
    full, total = cost.parts(everything), cost(everything)
    for choice in choices:
        choice.count = len(choice.allowed) - 1
    limits = share * full * (1 + 1e-9)
    depends = _dependence(analysis, choices, cost, full)
    parts = lambda: cost.parts(keep_mask(analysis, choices))  # noqa: E731
    for _ in range(_ROUNDS):
        now = parts()
        over = (now > limits) & depends.any(axis=0)
        if not _shrink(choices, depends, over, np.where(over, now / np.maximum(share * full, 1e-300), 1.0)):
            break
    _take_back(choices, limits, parts)
    keep = keep_mask(analysis, choices)
    reached = cost(keep)
    return Selection(keep, reached, _layer_notes(cost, cost.parts(keep), full, limits, share, reached / total, name))


def _dependence(analysis: Analysis, choices: list[Choice], cost: CostModel, full: Vector) -> Vector:
    """[choices, parts]: does the cost of a part fall when the group keeps its least?"""
    rows = []
    for choice in choices:
        before, choice.count = choice.count, 0
        rows.append(cost.parts(keep_mask(analysis, choices)) < full * (1 - 1e-12))
        choice.count = before
    return np.stack(rows)


def _shrink(choices: list[Choice], depends: Vector, over: Vector, excess: Vector) -> bool:
    """One round: the groups of a part that is too large by a factor f shrink by sqrt(f), as if there were two of them,
    but by a step at least. False when nothing can."""
    moved = False
    for choice, row in zip(choices, depends):
        factor = float(excess[row & over].max(initial=1.0))
        if factor > 1 and choice.count > 0:
            wanted = np.searchsorted(choice.allowed, choice.kept / math.sqrt(factor), side="right") - 1
            choice.count = max(0, min(int(wanted), choice.count - 1))
            moved = True
    return moved


def _take_back(choices: list[Choice], limits: Vector, parts: Callable[[], Vector]) -> None:
    """Each group, the most pruned first, keeps as much as leaves every part within its limit (or as far above)."""
    limits = np.maximum(limits, parts())
    for choice in sorted(choices, key=lambda c: c.kept / len(c.order)):
        low, high = choice.count, len(choice.allowed) - 1
        while low < high:
            choice.count = (low + high + 1) // 2
            if (parts() <= limits).all():
                low = choice.count
            else:
                high = choice.count - 1
        choice.count = low


def _layer_notes(
    cost: CostModel, now: Vector, full: Vector, limits: Vector, share: float, reached: float, name: str
) -> list[str]:
    missed = [n for n, over in zip(cost.names, (now > limits) & (full > 0)) if over]
    notes = []
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        notes.append(f"{len(missed)} layers cannot come down to {name}={share:g} by themselves: "
                     f"{', '.join(missed[:3])}{more}")  # fmt: skip
    if abs(reached / share - 1) > TOLERANCE:
        notes.append(f"{name} ended at {reached:.4f} in total: every layer meets {share:g} by itself, and some share "
                     "their channels with layers that need fewer")  # fmt: skip
    return notes
