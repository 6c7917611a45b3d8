"""What a search under `max_drop` found: notes for people, and its section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..passes.pipeline import print_pipeline
from ..passes.quantize.placement.fallback import Trial
from ..passes.quantize.placement.sensitivity import Sensitivity
from .allowance import Outcome

_LISTED = 8


def describe(outcome: Outcome) -> list[str]:
    """Notes: what was kept in float and what it gained, the curve, and why the search ended."""
    best, first = outcome.best, outcome.trials[0]
    change = "as asked" if best is first else print_pipeline(outcome.passes) or "none, all stays in float"
    judged = f"{len(outcome.trials)} trials, {sum(t.seconds for t in outcome.trials):.0f} s"
    verdict = "the allowance is kept" if outcome.met else "the allowance could not be kept"
    share = best.float_macs / outcome.total_macs if outcome.total_macs else 0.0
    notes = [
        f"{verdict}: drop {_drop(first, outcome)} as asked, {_drop(best, outcome)} with {share:.1%} of the MACs in "
        f"float (allowed {outcome.allowance.drop:.4f}; {judged})",
        f"the pipeline from quantization on: {change}",
    ]
    if outcome.kept:
        notes.append(f"in float because of the allowance: {_listed(outcome.kept)}")
    points = [f"{p['float_macs_share']:.1%} -> {p['drop']:.4f}" for p in curve(outcome)]
    notes.append(f"MACs in float -> drop: {', '.join(points)}")
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
    """What each share of the MACs in float buys: the trials that no cheaper one beats, the cheapest first."""
    points: list[dict[str, float]] = []
    total = max(outcome.total_macs, 1)
    judged = [(t.float_macs, -t.metric) for t in outcome.trials if t.metric is not None]
    for macs, negative in sorted(judged):
        drop = outcome.allowance.before.value + negative
        if not points or drop < points[-1]["drop"]:
            points.append({"float_macs_share": macs / total, "drop": drop})
    return points


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The section `fallback` of the report."""
    return {
        "allowed_drop": outcome.allowance.drop,
        "met": outcome.met,
        "kept_float": outcome.kept,
        "float_macs_share": outcome.best.float_macs / max(outcome.total_macs, 1),
        "curve": curve(outcome),
        "trials": [_trial_json(t) for t in outcome.trials],
        "sensitivity": [_point_json(s) for s in outcome.sensitivity],
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    row = {"pipeline": trial.setting.options, "kept_float": sorted(trial.setting.kept)}
    fields = ("metric", "float_macs", "seconds", "error")
    return {**row, **{name: getattr(trial, name) for name in fields}}


def _point_json(point: Sensitivity) -> dict[str, Any]:
    return {
        "name": point.name,
        "kind": point.kind,
        "macs": point.macs,
        "sqnr_alone_db": point.alone_db,
        "sqnr_without_db": point.without_db,
        "operations": sorted(point.operations),
    }
