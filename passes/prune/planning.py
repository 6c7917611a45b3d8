"""`plan_pruning`: from a budget and an importance to a `PruningPlan`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...errors import OptionError, PruningError
from ...frontend.program import Program
from .analysis import Analysis
from .axes import Reason, Vector
from .budget import Selection, macs_cost, make_choices, parameter_cost, select_budget, select_ratio
from .groups import Group, find_groups, places
from .importance import importances
from .plan import GroupSummary, PruningPlan, Removal
from .rules import analyze


def plan_pruning(
    program: Program,
    *,
    macs: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    importance: str = "l2",
    round_to: int | None = None,
    exclude: Iterable[str] = (),
    max_ratio: float | None = None,
    data: Any = None,
    seed: int = 0,
) -> PruningPlan:
    """Choose what to remove from `program`, which is not changed.

    Exactly one budget: `macs` or `params`, the share that is kept, or `ratio`, the share of every group that is
    removed (all in (0, 1); a share of 1 keeps everything). `importance`: l1, l2 or random (drawn from `seed`).
    `round_to`: group sizes are multiples of it, narrow groups of a half or quarter of it, 4 at least (default 1).
    `exclude`: globs of names of parameters or layers that keep their shape. `max_ratio`: the largest share removed
    from any dimension. `data` is for importances that need it; none of the present ones does.

    Raises OptionError (a bad or effectless option) and PruningError (a quantized program, an impossible budget).
    """
    budget = _check_options(macs, params, ratio, round_to, max_ratio, data, importance)
    analysis = analyze(program)
    _pin_excluded(analysis, [exclude] if isinstance(exclude, str) else list(exclude))
    groups = find_groups(analysis)
    if not groups:
        raise PruningError(
            "nothing in this program can be pruned", hint="`fxpress inspect` says what is pinned and why"
        )
    scores = importances(analysis, groups, importance, seed)
    choices = make_choices(analysis, groups, scores, round_to or 1, max_ratio)
    costs = {"macs": macs_cost(analysis), "params": parameter_cost(analysis)}
    name, value = budget
    if name == "ratio":
        selection = Selection(select_ratio(analysis, choices, value), 0.0)
    else:
        selection = select_budget(analysis, choices, costs[name], value, name)
    everything = np.ones(analysis.atoms.count, dtype=bool)
    macs_pair, params_pair = ((round(c(everything)), round(c(selection.keep))) for c in costs.values())
    return PruningPlan(
        removals=_removals(analysis, selection.keep),
        groups=tuple(_summary(g, selection.keep) for g in groups),
        macs=macs_pair,
        parameters=params_pair,
        request=f"{name}={value:g}, importance={importance}",
        notes=tuple(selection.notes),
    )


# -- options ------------------------------------------------------------------------------------------------------


def _check_options(
    macs: float | None,
    params: float | None,
    ratio: float | None,
    round_to: int | None,
    max_ratio: float | None,
    data: Any,
    importance: str,
) -> tuple[str, float]:
    """The one budget that is given."""
    given = [(n, v) for n, v in (("macs", macs), ("params", params), ("ratio", ratio)) if v is not None]
    if len(given) != 1:
        names = ", ".join(n for n, _ in given) or "none"
        raise OptionError(f"give exactly one budget, got {names}", hint="for example macs=0.5 (keep half of the MACs)")
    name, value = given[0]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1 or (name == "ratio" and value == 1):
        hint = "give a share in (0, 1): macs and params say what is kept, ratio what goes"
        raise OptionError(f"{name} is {value!r}", hint=hint)
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise OptionError(f"round_to is {round_to!r}", hint="give a positive whole number, such as 8")
    if max_ratio is not None and not 0 < max_ratio < 1:
        raise OptionError(f"max_ratio is {max_ratio!r}", hint="give a share in (0, 1)")
    if data is not None:
        raise OptionError(f"importance {importance!r} reads only weights: data has no effect", hint="leave data out")
    return name, float(value)


def _pin_excluded(analysis: Analysis, patterns: list[str]) -> None:
    """Parameters whose name, or the name of whose layer, matches a glob keep their shape."""
    for pattern in patterns:
        matched = [n for n in analysis.tensors if _matches(n, pattern)]
        if not matched:
            raise OptionError(
                f"exclude pattern {pattern!r} matches no parameter",
                hint=f"names look like {', '.join(list(analysis.tensors)[:3])}",
            )
        for name in matched:
            for vector in analysis.tensors[name]:
                analysis.atoms.pin(vector, Reason(f"excluded by {pattern!r}"))


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


# -- from literals to indices ----------------------------------------------------------------------------------------


def _removals(analysis: Analysis, keep: Vector) -> tuple[Removal, ...]:
    result = []
    for place, vector in places(analysis):
        kept = keep[analysis.atoms.resolve(vector)].all(axis=0)
        if not kept.all():
            removed = tuple(map(int, np.flatnonzero(~kept)))
            result.append(Removal(place.name, place.dim, len(vector), removed))
    return tuple(result)


def _summary(group: Group, keep: Vector) -> GroupSummary:
    return GroupSummary(len(group), int(keep[group.literals].sum()), tuple(map(str, group.places)))
