"""What a search under `max_drop` found: notes for people, and its section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..passes.pipeline import print_pipeline
from ..passes.quantize.placement.fallback import FACTS, Instead, Trial
from ..passes.quantize.placement.sensitivity import Sensitivity
from .allowance import Outcome

_LISTED = 8
_WHERE: dict[Instead, str] = {"float": "float", "int16": "16 bits"}  # for people


def describe(outcome: Outcome) -> list[str]:
    """Notes: what was kept in float and what it gained, the curve, and why the search ended."""
    best, first = outcome.best, outcome.trials[0]
    change = "as asked" if best is first else print_pipeline(outcome.passes) or "none, all stays in float"
    judged = f"{len(outcome.trials)} trials, {sum(t.seconds for t in outcome.trials):.0f} s"
    verdict = "the allowance is kept" if outcome.met else "the allowance could not be kept"
    notes = [
        f"{verdict}: drop {_drop(first, outcome)} as asked, {_drop(best, outcome)} with "
        f"{shares_text(_shares(best, outcome))} (allowed {outcome.allowance.drop:.4f}; {judged})",
        f"the pipeline from quantization on: {change}",
    ]
    kept = ((where, outcome.kept[instead]) for instead, where in _WHERE.items())
    notes += [f"in {where} because of the allowance: {_listed(names)}" for where, names in kept if names]
    points = [f"{shares_text(p)} -> {p['drop']:.4f}" for p in curve(outcome)]
    notes.append(f"what it takes -> drop: {', '.join(points)}")
    failed = [t for t in outcome.trials if t.metric is None]
    if failed:
        notes.append(f"{len(failed)} trials could not be judged: {failed[-1].error}")
    return notes + outcome.notes


def _drop(trial: Trial, outcome: Outcome) -> str:
    return "unknown" if trial.metric is None else f"{outcome.allowance.before.value - trial.metric:.4f}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def curve(outcome: Outcome) -> list[dict[str, float]]:
    """What each share of the MACs in float (then in 16 bits) buys: the trials that no cheaper one beats, the cheapest
    first."""
    points: list[dict[str, float]] = []
    before, trials = outcome.allowance.before.value, outcome.trials
    judged = [(t.float_macs, t.int16_macs, before - t.metric, t) for t in trials if t.metric is not None]
    for _, _, drop, trial in sorted(judged, key=lambda row: row[:3]):
        if not points or drop < points[-1]["drop"]:
            points.append({**_shares(trial, outcome), "drop": drop})
    return points


def _shares(trial: Trial, outcome: Outcome) -> dict[str, float]:
    total = max(outcome.total_macs, 1)
    return {"float_macs_share": trial.float_macs / total, "int16_macs_share": trial.int16_macs / total}


def shares_text(shares: dict[str, float]) -> str:
    """The MACs that are not on 8 bits, for people: "3.0% of the MACs in float", with those in 16 bits where there are
    any."""
    wide = shares["int16_macs_share"]
    also = f" and {wide:.1%} in 16 bits" if wide else ""
    return f"{shares['float_macs_share']:.1%} of the MACs in float{also}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The section `fallback` of the report."""
    return {
        "allowed_drop": outcome.allowance.drop,
        "met": outcome.met,
        **{f"kept_{instead}": names for instead, names in outcome.kept.items()},
        **_shares(outcome.best, outcome),
        "curve": curve(outcome),
        "trials": [_trial_json(t) for t in outcome.trials],
        "sensitivity": [_point_json(s) for s in outcome.sensitivity],
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    setting = trial.setting
    kept = {f"kept_{k}": sorted(setting.kept) if setting.instead == k else [] for k in _WHERE}
    return {"pipeline": setting.options, **kept, **{name: getattr(trial, name) for name in FACTS}}


def _point_json(point: Sensitivity) -> dict[str, Any]:
    return {
        "name": point.name,
        "kind": point.kind,
        "macs": point.macs,
        "sqnr_alone_db": point.alone_db,
        "sqnr_without_db": point.without_db,
        "operations": sorted(point.operations),
    }
