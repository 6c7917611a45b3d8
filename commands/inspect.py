"""`fxpress inspect` and `fxpress explain`: what a model is made of, and why something is as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, did_you_mean
from ..runtime.artifact import read_report
from ..runtime.report.words import count, decibel, number, percent, size
from .compile import resolve_example, resolve_source
from .screen import emit_json, say, show_report, show_table

if TYPE_CHECKING:
    from ..frontend.program import Program
    from ..passes.prune.describe import Coupling
    from ..passes.prune.groups import Pinned

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
    if report.get("fallback"):
        show_fallback(report["fallback"])
    if as_json:
        emit_json(report)
    return 0


def show_fallback(found: dict[str, Any]) -> None:
    """What the search under --max-drop found: what each share of float buys, and the points that cost most."""
    kept = "kept" if found["met"] else "not kept"
    say(f"allowed drop {found['allowed_drop']:.4f}: {kept}, {len(found['trials'])} trials")
    shares = ("float_macs_share", "int16_macs_share")
    curve = [(*(percent(p.get(k, 0.0)) for k in shares), f"{p['drop']:.4f}") for p in found["curve"]]
    show_table("what MACs in float and in 16 bits buy", ("in float", "16 bits", "drop"), curve, right=(0, 1, 2))
    rows = [
        (p["name"], p["kind"], decibel(p["sqnr_alone_db"]), decibel(p["sqnr_without_db"]), count(p["macs"]))
        for p in found["sensitivity"][:_SHOWN]
    ]
    if rows:
        title = "sensitivity, worst first (SQNR of the outputs in dB)"
        columns = ("point", "kind", "only it quantized", "all but it", "MACs around it")
        show_table(title, columns, rows, right=(2, 3, 4))


def inspect_model(
    model: str, weights: Path | None, input_size: str | None, target: str, as_json: bool, everything: bool = False
) -> int:
    """Cost, groups, blocks, and what cannot be pruned or quantized, of a model that is not compiled yet.

    `everything`: every group and every pinned axis in a row of its own.
    """
    from ..api import as_program
    from ..backends.coverage import float_reasons
    from ..backends.targets import load_target
    from ..frontend.cost import cost_table
    from ..passes.manager import run_passes
    from ..passes.prune.describe import couplings
    from ..passes.prune.groups import find_groups, find_pinned
    from ..passes.prune.rules.table import analyze
    from ..passes.rewrite import refuse_quantized

    table = load_target(target)
    source = resolve_source(model, weights, seed=0)
    args, kwargs = resolve_example(source, input_size, None, seed=0)
    program = run_passes(as_program(source.module, args, kwargs), "cleanup")
    refuse_quantized(program, "groups and costs are those of the float program")
    analysis = analyze(program)
    groups, pinned = couplings(analysis, find_groups(analysis)), find_pinned(analysis)
    fused = run_passes(program, "fuse-batchnorm")
    macs = {row.name: row.macs for row in cost_table(fused) if row.macs}
    floating = {n: why for n, why in float_reasons(fused, table).items() if n in macs}
    say(repr(program))
    say(f"  {count(sum(macs.values()))} MACs for one example")
    show_costs(program)
    show_groups(groups, everything)
    show_pinned(pinned, everything)
    blocks = block_rows(program)
    show_blocks(blocks, everything)
    show_floating(floating, macs, table.name)
    if as_json:
        emit_json(_as_json(program, source.name, groups, pinned_rows(pinned), blocks, floating, macs))
    return 0


def show_costs(program: Program) -> None:
    """The layers that cost most."""
    from ..frontend.cost import cost_table

    rows = sorted(cost_table(program), key=lambda r: -r.macs)
    shown = [
        (r.name, r.op.removeprefix("aten."), count(r.macs), count(r.parameters), size(r.bytes)) for r in rows[:_SHOWN]
    ]
    title = f"layers by MACs ({min(_SHOWN, len(rows))} of {len(rows)})"
    show_table(title, ("layer", "op", "MACs", "parameters", "bytes"), shown, right=(2, 3, 4))


def show_groups(groups: list[Coupling], everything: bool) -> None:
    """What is pruned together: the layers that write and read the same channels, and the ops in between."""
    from ..passes.prune.describe import alike

    kinds = [[g] for g in groups] if everything else alike(groups)
    shown = kinds if everything else kinds[:_SHOWN]
    rows = [(len(k), len(k[0]), k[0].each, *_coupled(k[0], everything)) for k in shown]
    title = f"groups that can be pruned: {len(groups)}"
    if not everything:
        more = f", {len(shown)} of them here" if len(shown) < len(kinds) else ""
        title += f", in {len(kinds)} forms{more} (names that differ in their numbers are one form; --all lists each)"
    columns = ("groups", "channels", "rows each", "written by", "read by", "through", "norms and biases")
    show_table(title, columns, rows, right=(0, 1, 2))


def _coupled(coupling: Coupling, everything: bool) -> list[str]:
    limit = None if everything else 3
    names = (coupling.written_by, coupling.read_by, coupling.through, coupling.own)
    return [_listed(n, limit if n is not coupling.through else 2 * limit if limit else None) for n in names]


def _listed(names: Sequence[str], limit: int | None) -> str:
    if limit is None or len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def show_pinned(pinned: list[Pinned], everything: bool) -> None:
    """What cannot be pruned: every axis, by reason and source line."""
    from ..passes.prune.describe import pinned_alike

    kinds = [[p] for p in pinned] if everything else pinned_alike(pinned)
    rows = []
    for kind in kinds:
        sizes = [str(n) for n in sorted({p.size for p in kind}, reverse=True)]
        reason = kind[0].reason
        rows.append((_listed(sizes, 3), _listed([str(p.place) for p in kind], 2), reason.text, _short(reason.source)))
    title = f"cannot be pruned: {len(pinned)} axes" + ("" if everything else " (by reason; --all lists each)")
    show_table(title, ("sizes", "axes", "why", "at"), rows)


def block_rows(program: Program) -> list[dict[str, Any]]:
    """Every residual block with what goes with it."""
    from ..frontend.program import source_of
    from ..passes.prune.kinds.blocks import find_blocks
    from ..passes.prune.kinds.plans import BlockCosts

    costs, nodes = BlockCosts(program), {n.name: n for n in program.graph.nodes}
    whole, rows = costs.of([]), []
    for block in find_blocks(program):
        left = costs.of([block])
        macs, parameters = whole["macs"] - left["macs"], whole["params"] - left["params"]
        source = source_of(nodes[block.node])
        rows.append({"name": block.name, "macs": macs, "parameters": parameters, "source": source})
    return rows


def show_blocks(blocks: list[dict[str, Any]], everything: bool) -> None:
    """Residual blocks that can be left out as a whole (`prune{kind=blocks}`)."""
    if not blocks:
        say("no residual block x + f(x) can be left out")
        return
    forms: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for block in blocks:
        form = block["name"] if everything else re.sub(r"\d+", "#", block["name"])
        forms.setdefault((form, block["macs"], block["parameters"], block["source"]), []).append(block)
    rows = [
        (len(alike), _between(alike), count(b["macs"]), count(b["parameters"]), _short(b["source"]))
        for alike in forms.values()
        for b in alike[:1]
    ]
    title = f"residual blocks that can be left out: {len(blocks)}"
    show_table(title, ("blocks", "name", "MACs", "parameters", "added at"), rows, right=(0, 2, 3))


def _between(blocks: list[dict[str, Any]]) -> str:
    first, last = blocks[0]["name"], blocks[-1]["name"]
    return first if first == last else f"{first} to {last}"


def _short(source: str | None) -> str:
    """A source line without the folder that packages are installed in."""
    return re.sub(r"^.*/(?:site|dist)-packages/", "", source or "")


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
    groups: list[Coupling],
    pinned: list[dict[str, Any]],
    blocks: list[dict[str, Any]],
    floating: dict[str, str],
    macs: dict[str, int],
) -> dict[str, Any]:
    return {
        "model": {"name": name, "parameters": program.parameter_count, "macs": sum(macs.values())},
        "inputs": [str(i) for i in program.inputs],
        "outputs": [str(o) for o in program.outputs],
        "groups": [_group_json(g) for g in groups],
        "pinned": pinned,
        "blocks": blocks,
        "float": [{"node": n, "macs": macs[n], "reason": why} for n, why in floating.items()],
    }


def _group_json(coupling: Coupling) -> dict[str, Any]:
    return {
        "size": len(coupling),
        "places": [str(p) for p in coupling.group.places],
        "rows_each": coupling.each,
        "written_by": list(coupling.written_by),
        "read_by": list(coupling.read_by),
        "own": list(coupling.own),
        "through": list(coupling.through),
    }


def explain_node(folder: Path, node: str, as_json: bool) -> int:
    """What the report says about one layer."""
    report = read_report(folder)
    layers = {row["name"]: row for row in report["layers"]}
    points = [p for p in (report.get("fallback") or {}).get("sensitivity", ()) if p["name"] == node]
    islands = {row["node"]: row for row in report["coverage"]["float_islands"]}
    if node not in layers and node not in islands and not points:
        hint = did_you_mean(node, {**layers, **islands}, "layers")
        raise OptionError(
            f"the report has no quantized output and no float island called {node!r}",
            hint=f"{hint} (an integer layer whose output stays in float, as the last one, has neither)",
        )
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
    for point in points:
        alone, without = decibel(point["sqnr_alone_db"]), decibel(point["sqnr_without_db"])
        kind = f"{node}, {point['kind']}"
        say(f"{kind}: the outputs have SQNR {alone} dB with only this quantized, {without} dB without it")
        say(f"  to leave it in float: quantize{{keep_float=[{','.join(point['operations'])}]}}")
    if as_json:
        emit_json({"layer": layers.get(node), "island": islands.get(node), "sensitivity": points})
    return 0
