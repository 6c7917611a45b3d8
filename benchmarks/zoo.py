"""Is pruning exact on every architecture? `python benchmarks/zoo.py` writes docs/zoo.md; run it again to go on.

Each model of `zoo_models.py` goes, in a process of its own and without any hint, through

    capture -> plan_pruning(ratio=0.5) -> apply -> oracle in float64 -> to_onnx -> ONNX Runtime against PyTorch

and gives one line of a JSON-lines file (`--results`), which a later run completes: names that are already there are
skipped unless `--again` names them. Exit code 1 when a captured model failed, crashed, hung or differed.

    python benchmarks/zoo.py                                  # everything that is missing, then docs/zoo.md
    python benchmarks/zoo.py --together                       # in one process, three times as fast
    python benchmarks/zoo.py --again timm:swin_tiny_patch4_window7_224
    python benchmarks/zoo.py --one transformers:bert          # in this process, with the traceback
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import zoo_models

BOUND = 1e-9  # oracle, relative, float64
EFFECT = 1e-4  # what pruning changes at least, relative
RUNTIME_BOUND = 1e-3  # ONNX Runtime against PyTorch, relative, float32
TIMEOUT = 600.0
ROOT = Path(__file__).parent.parent

Row = dict[str, Any]


def measure(name: str, ratio: float = 0.5) -> Row:
    """One model, the whole way."""
    import torch

    import fxpress
    from fxpress.passes.prune.groups import coverage, find_groups, find_pinned
    from fxpress.passes.prune.masking import oracle_error
    from fxpress.passes.prune.rules.table import analyze
    from fxpress.passes.verify import relative_difference
    from fxpress.runtime.verify import check_parity

    torch.manual_seed(0)
    row: Row = {"model": name}
    module, args, kwargs = zoo_models.load(name)
    start = time.perf_counter()
    try:
        program = fxpress.capture(module, args, kwargs or None)
    except fxpress.FxpressError as error:
        return row | {"status": "not captured", "error": str(error).splitlines()[0]}
    row["capture_s"] = time.perf_counter() - start
    start = time.perf_counter()
    analysis = analyze(program)
    groups, pinned, found = find_groups(analysis), find_pinned(analysis), coverage(analysis)
    row |= {"analysis_ms": (time.perf_counter() - start) * 1e3, "nodes": len(program.graph.nodes)}
    row |= {"groups": len(groups), "pinned": len(pinned), "parameters": program.parameter_count}
    row |= {"prunable": found.grouped / max(program.parameter_count, 1), "unexplained": found.unexplained}
    plan = fxpress.plan_pruning(program, ratio=ratio)
    pruned = plan.apply(program)
    row |= {"macs_kept": plan.macs[1] / plan.macs[0], "params_kept": pruned.parameter_count / program.parameter_count}
    row["oracle"] = oracle_error(plan.mask(program), pruned)
    changed = zip(pruned.call_example(), program.call_example())
    row["effect"] = max(relative_difference(a, b) for a, b in changed)  # else the agreement would say nothing
    try:
        parity = check_parity(pruned, fxpress.to_onnx(pruned), batches=(2,))
    except fxpress.FxpressError as error:  # explained, but still a model that does not arrive
        return row | {"status": "exact, not exported", "error": str(error).splitlines()[0]}
    row["onnxruntime"] = parity.max_relative
    right = row["oracle"] <= BOUND and parity.max_relative <= RUNTIME_BOUND and row["effect"] > EFFECT
    row["status"] = "exact" if right else "differs"
    return row


def measure_together(name: str) -> Row:
    """As `measure`; an error is a row. Imports are paid once for all models, which takes a third of the time."""
    start = time.perf_counter()
    try:
        row = measure(name)
    except Exception as error:  # a row like others
        row = {"model": name, "status": "failed", "error": f"{type(error).__name__}: {error}"[-600:]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def measure_apart(name: str) -> Row:
    """As `measure`, in a process of its own: a crash or a hang of one model is a row like others."""
    command = [sys.executable, __file__, "--one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"model": name, "status": "hung", "error": f"no result after {TIMEOUT:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        text = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-8:]
        return {"model": name, "status": "failed", "error": " | ".join(text)[-600:]}
    return json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - start, 1)}


def read(path: Path) -> dict[str, Row]:
    """The newest row of each model."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


# -- the page -----------------------------------------------------------------------------------------------------


def page(rows: list[Row]) -> str:
    """docs/zoo.md."""
    zoo_models.declare_operators()
    import timm
    import torch
    import torchvision
    import transformers

    versions = ", ".join(
        f"{m.__name__} {str(m.__version__).split('+')[0]}" for m in (torch, torchvision, timm, transformers)
    )
    captured = [r for r in rows if r["status"] != "not captured"]
    exact = [r for r in captured if r["status"] == "exact"]
    head = [
        "# The zoo: structured pruning without hints",
        "",
        f"Made by `python benchmarks/zoo.py` on {date.today()}, {versions}. Random weights; every group loses half.",
        "**oracle**: largest relative difference in float64 from the original with the removed positions zeroed where they",
        "are consumed (norms take their statistics over what is kept). **ORT**: pruned program, PyTorch against ONNX Runtime",
        "in float32, relative. **prunable**: share of the parameter values that lie in a group; the rest is pinned with a reason.",
        "",
        f"{len(rows)} models, {len(captured)} captured, {len(exact)} exact.",
    ]
    for library in ("timm", "torchvision", "transformers"):
        head += ["", f"## {library}", "", *_table([r for r in rows if r["model"].startswith(f"{library}:")])]
    return "\n".join(head) + "\n"


def _table(rows: list[Row]) -> list[str]:
    titles = "model | nodes | groups | prunable | MACs kept | parameters kept | analysis ms | oracle | ORT | status"
    lines = [f"| {titles} |", "|" + "---|" * 10]
    for r in sorted(rows, key=lambda r: r["model"]):
        name, status = r["model"].partition(":")[2], r["status"]
        if "oracle" not in r:
            lines.append(f"| {name} | | | | | | | | | {status}: {str(r.get('error', ''))[:160].replace('|', '/')} |")
            continue
        shares = f"{r['prunable']:.1%} | {r['macs_kept']:.1%} | {r['params_kept']:.1%}"
        runtime = f"{r['onnxruntime']:.0e}" if "onnxruntime" in r else str(r["error"])[:80]
        errors = f"{r['analysis_ms']:.0f} | {r['oracle']:.0e} | {runtime}"
        lines.append(f"| {name} | {r['nodes']} | {r['groups']} | {shares} | {errors} | {status} |")
    return lines


def main() -> int:
    """Run what is missing, write the page, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=zoo_models.NAMES, help="names or beginnings of names")
    parser.add_argument("--one", metavar="NAME", help="one model in this process; prints its row")
    parser.add_argument("--together", action="store_true", help="all in this process: faster, and a crash ends it")
    parser.add_argument("--again", nargs="*", default=[], metavar="NAME", help="measure these anew")
    parser.add_argument("--failed", action="store_true", help="measure anew what was not exact")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "zoo.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(arguments.results)
    wanted = [n for n in zoo_models.NAMES if any(n.startswith(m) for m in [*arguments.models, *arguments.again])]
    for name in wanted:
        done = name in known and name not in arguments.again
        if done and not (arguments.failed and known[name]["status"] not in ("exact", "not captured")):
            continue
        row = (measure_together if arguments.together else measure_apart)(name)
        known[name] = row
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        figures = f"{row.get('oracle', 0):8.1e} {row.get('seconds', 0):6.1f} s"
        print(f"{name:50} {row['status']:12} {figures}  {row.get('error', '')[-200:]}", flush=True)
    rows = [known[n] for n in zoo_models.NAMES if n in known]
    arguments.page.write_text(page(rows), encoding="utf-8")
    return int(any(r["status"] not in ("exact", "not captured") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
