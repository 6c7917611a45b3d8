"""`fxpress inspect` and `fxpress explain`: what a model is made of, and why something is as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_compile import resolve_example, resolve_source
from .cli_screen import emit_json, say, show_report, show_table
from .errors import OptionError, did_you_mean
from .runtime.artifact import read_report
from .runtime.report.words import count, decibel, number, pinned_kinds, size

if TYPE_CHECKING:
    from .frontend.program import Program
    from .passes.prune.groups import Group, Pinned

_SHOWN = 20


def inspect_artifact(folder: Path, as_json: bool) -> int:
    """The report of a compiled model."""
    report = read_report(folder)
    show_report(report)
    islands = report["coverage"]["float_islands"]
    if islands:
        show_table(
            "in float",
            ("node", "op", "MACs", "why"),
            [(i["node"], i["op"], count(i["macs"]), i["reason"]) for i in islands[:_SHOWN]],
            right=(2,),
        )
    judged = [row for row in report["layers"] if row["sqnr_isolated_db"] is not None]
    worst = sorted(judged, key=lambda row: row["sqnr_isolated_db"])[:_SHOWN]
    if worst:
        rows = [(r["name"], r["op"], decibel(r["sqnr_isolated_db"]), decibel(r["sqnr_accumulated_db"])) for r in worst]
        show_table("layers, worst first (SQNR in dB)", ("name", "op", "isolated", "accumulated"), rows, right=(2, 3))
    if as_json:
        emit_json(report)
    return 0


def inspect_model(model: str, weights: Path | None, input_size: str | None, target: str, as_json: bool) -> int:
    """Cost, groups, and what cannot be pruned or quantized, of a model that is not compiled yet."""
    from .api import as_program
    from .backends.coverage import float_reasons
    from .backends.targets import load_target
    from .frontend.cost import cost_table
    from .passes.manager import run_passes
    from .passes.prune.groups import find_groups, find_pinned
    from .passes.prune.rules import analyze

    table = load_target(target)
    source = resolve_source(model, weights, seed=0)
    args, kwargs = resolve_example(source, input_size, None, seed=0)
    program = run_passes(as_program(source.module, args, kwargs), "cleanup")
    analysis = analyze(program)
    groups, pinned = find_groups(analysis), pinned_rows(find_pinned(analysis))
    fused = run_passes(program, "fuse-batchnorm")
    macs = {row.name: row.macs for row in cost_table(fused) if row.macs}
    floating = {n: why for n, why in float_reasons(fused, table).items() if n in macs}
    say(repr(program))
    say(f"  {count(sum(macs.values()))} MACs for one example")
    show_costs(program)
    show_groups(groups)
    show_pinned(pinned)
    show_floating(floating, macs, table.name)
    if as_json:
        emit_json(_as_json(program, source.name, groups, pinned, floating, macs))
    return 0


def show_costs(program: Program) -> None:
    """The layers that cost most."""
    from .frontend.cost import cost_table

    rows = sorted(cost_table(program), key=lambda r: -r.macs)
    shown = [
        (r.name, r.op.removeprefix("aten."), count(r.macs), count(r.parameters), size(r.bytes)) for r in rows[:_SHOWN]
    ]
    title = f"layers by MACs ({min(_SHOWN, len(rows))} of {len(rows)})"
    show_table(title, ("layer", "op", "MACs", "parameters", "bytes"), shown, right=(2, 3, 4))


def show_groups(groups: list[Group]) -> None:
    """What can be pruned together."""
    rows = sorted(groups, key=lambda g: -len(g))
    shown = [
        (len(g), len(g.places), ", ".join(map(str, g.places[:3])) + (", ..." if len(g.places) > 3 else ""))
        for g in rows[:_SHOWN]
    ]
    title = f"groups that can be pruned ({min(_SHOWN, len(rows))} of {len(rows)})"
    show_table(title, ("size", "places", "parameter dimensions"), shown, right=(0, 1))


def show_pinned(pinned: list[dict[str, Any]]) -> None:
    """What cannot be pruned, by reason; --json lists every dimension."""
    shown = [(k.sizes, k.dimensions, k.reason, k.source) for k in pinned_kinds(pinned)]
    title = f"cannot be pruned ({len(pinned)} parameter dimensions)"
    show_table(title, ("sizes", "dimensions", "why", "first at"), shown, right=(1,))


def pinned_rows(pinned: list[Pinned]) -> list[dict[str, Any]]:
    """Plain values for tables and JSON."""
    return [{"size": p.size, "place": str(p.place), "reason": p.reason.text, "source": p.reason.source} for p in pinned]


def show_floating(floating: dict[str, str], macs: dict[str, int], target: str) -> None:
    """What the target cannot compute on integers, and why."""
    shown = [(name, count(macs[name]), why) for name, why in floating.items()]
    if shown:
        show_table(f"stays in float on {target} ({len(shown)})", ("layer", "MACs", "why"), shown, right=(1,))
    else:
        say(f"every layer with MACs can run on integers on {target}")


def _as_json(
    program: Program,
    name: str,
    groups: list[Group],
    pinned: list[dict[str, Any]],
    floating: dict[str, str],
    macs: dict[str, int],
) -> dict[str, Any]:
    return {
        "model": {"name": name, "parameters": program.parameter_count, "macs": sum(macs.values())},
        "inputs": [str(i) for i in program.inputs],
        "outputs": [str(o) for o in program.outputs],
        "groups": [{"size": len(g), "places": [str(p) for p in g.places]} for g in groups],
        "pinned": pinned,
        "float": [{"node": n, "macs": macs[n], "reason": why} for n, why in floating.items()],
    }


def explain_node(folder: Path, node: str, as_json: bool) -> int:
    """What the report says about one layer."""
    report = read_report(folder)
    layers = {row["name"]: row for row in report["layers"]}
    islands = {row["node"]: row for row in report["coverage"]["float_islands"]}
    if node not in layers and node not in islands:
        raise OptionError(f"the report has no layer {node!r}", hint=did_you_mean(node, {**layers, **islands}, "layers"))
    if node in layers:
        row = layers[node]
        low, high, scale = (number(row[k]) for k in ("low", "high", "scale"))
        alone, all_before = (decibel(row[f"sqnr_{k}_db"]) for k in ("isolated", "accumulated"))
        say(f"{node} ({row['op']}): real = {scale} * (q - {row['zero_point']}), from {low} to {high}")
        say(f"  error: SQNR {alone} dB by itself, {all_before} dB with everything before it")
        say(f"  decided by: the table of target {report['target']} and the calibration data")
        say("  to override: another range method, as in --pipeline '...,quantize{ranges=minmax}'")
    if node in islands:
        row = islands[node]
        say(f"{node} ({row['op']}) stays in float: {row['reason']}")
        say(f"  hint: {row['hint']}")
    if as_json:
        emit_json({"layer": layers.get(node), "island": islands.get(node)})
    return 0
