"""`report.json` (schema 1) from what the steps of a compilation found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ...backends.coverage import Coverage
from ...frontend.program import StageRecord
from ...passes.prune.groups import Pinned
from ...passes.prune.plan import PruningPlan
from ..evaluate import Metric
from ..layers import LayerParity, LayerRow
from ..verify import Parity
from .environment import describe_environment

SCHEMA = 1


@dataclass(frozen=True)
class Figures:
    """What a model costs and is worth: bytes of its file, parameter values, MACs of one example, latency, metric."""

    size_bytes: int
    parameters: int
    macs: int
    latency_ms: float
    metric: float | None


@dataclass(frozen=True)
class Promise:
    """Something that a compilation undertakes, and whether it came true."""

    name: str
    kept: bool
    detail: str


@dataclass
class Findings:
    """Everything that goes into a report."""

    name: str
    target: str
    pipeline: str
    seed: int
    threads: int
    stages: list[StageRecord]
    before: Figures
    after: Figures
    speedup: float
    metric: Metric | None
    parity: Parity
    coverage: Coverage
    sqnr_db: float | None = None
    layer_parity: LayerParity | None = None
    layers: list[LayerRow] = field(default_factory=list)
    plan: PruningPlan | None = None
    pinned: list[Pinned] = field(default_factory=list)
    compressed: tuple[int, int] | None = None  # bytes of both files after zlib, where single weights were pruned
    promises: list[Promise] = field(default_factory=list)
    fallback: dict[str, Any] | None = None  # the search for what to leave in float, where there was one
    tuning: dict[str, Any] | None = None  # the search for the fastest placement, where there was one


def build_report(f: Findings) -> dict[str, Any]:
    """The report as plain JSON values, with exactly the keys of schema 1 (and `promises`, `fallback`)."""
    return {
        "schema": SCHEMA,
        "model": {"name": f.name, "parameters": f.before.parameters, "macs": f.before.macs},
        "target": f.target,
        "pipeline": f.pipeline,
        "seed": f.seed,
        "stages": [_stage(s) for s in f.stages],
        "float": dataclasses.asdict(f.before),
        "compiled": dataclasses.asdict(f.after),
        "speedup": f.speedup,
        "metric": {"name": f.metric.name, "count": f.metric.count} if f.metric else None,
        "parity": _parity(f.parity, f.layer_parity),
        "sqnr_db": f.sqnr_db,
        "coverage": _coverage(f.coverage),
        "layers": [_layer(row) for row in f.layers],
        "pruning": _pruning(f.plan, f.pinned, f.compressed),
        "promises": [dataclasses.asdict(p) for p in f.promises],
        "fallback": f.fallback,
        "tuning": f.tuning,
        "environment": describe_environment(f.threads),
    }


def _stage(stage: StageRecord) -> dict[str, Any]:
    return {
        "pass": stage.name,
        "seconds": round(stage.seconds, 4),
        "changes": stage.changes,
        "notes": list(stage.notes),
        "peak_rss_mb": stage.peak_rss_mb,
    }


def _parity(parity: Parity, layers: LayerParity | None) -> dict[str, Any]:
    return {
        "batches": list(parity.batches),
        "layer_max_steps": layers.max_steps if layers else None,
        "layer_share_equal": layers.share_equal if layers else None,
        "output_within_1_step": parity.output_within_1_step,
        "max_abs": parity.max_abs,
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    islands = [
        {"node": i.node, "op": i.op, "macs": i.macs, "reason": i.reason, "hint": i.hint} for i in coverage.islands
    ]
    return {"integer_macs": coverage.integer_macs, "float_islands": islands}


def _layer(row: LayerRow) -> dict[str, Any]:
    names = ("name", "op", "sqnr_isolated_db", "sqnr_accumulated_db", "low", "high", "scale", "zero_point", "bytes")
    return {name: getattr(row, name) for name in names}


def _pruning(
    plan: PruningPlan | None, pinned: list[Pinned], compressed: tuple[int, int] | None
) -> dict[str, Any] | None:
    if plan is None:
        return None
    before, after = plan.macs
    rows = [{"size": p.size, "reason": p.reason.text, "source": p.reason.source} for p in pinned]
    return {
        "groups": len(plan.groups),
        "macs_kept": after / before if before else 1.0,
        "effects": list(plan.effects),
        "notes": list(plan.notes),
        "zeros": plan.zeros,
        "blocks": [b.name for b in plan.blocks],
        "compressed_bytes": dict(zip(("float", "compiled"), compressed)) if compressed else None,
        "pinned": rows,
    }
