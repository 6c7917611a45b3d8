"""Does INT8 arrive on every architecture? `python benchmarks/zoo_int8.py` writes docs/zoo_int8.md; run it again to go on.

Each model of `zoo_models.py` (random weights, redrawn so that every branch matters) goes without any hint through

    capture -> cleanup,canonicalize,fuse-batchnorm,smooth,quantize -> to_onnx -> ONNX Runtime

calibrated on 16 random inputs like its example inputs and judged on 4 others. A line of a JSON-lines file (`--results`)
a model; names that are there are skipped unless `--again` names them. Exit code 1 where a captured model failed, or a
layer that is fed the same integers is more than one step apart between PyTorch and ONNX Runtime.

    python benchmarks/zoo_int8.py                                    # everything that is missing, then the page
    python benchmarks/zoo_int8.py --target ort-x86-avx2 timm:resnet
    python benchmarks/zoo_int8.py --one transformers:bert            # with the traceback
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import zoo_models
from zoo import ROOT, Row, read

CALIBRATED, JUDGED, BATCH = 16, 4, 2
PIPELINE = "cleanup,canonicalize,fuse-batchnorm"


def measure(name: str, target: str) -> Row:
    """One model, the whole way."""
    import torch

    import fxpress
    from fxpress.backends.coverage import measure_coverage
    from fxpress.backends.targets import load_target
    from fxpress.errors import QuantizationError, VerificationError
    from fxpress.passes.base import Context
    from fxpress.passes.manager import PassManager
    from fxpress.passes.quantize.reasons import stated_reasons
    from fxpress.runtime.feed import random_inputs
    from fxpress.runtime.layers import check_layers
    from fxpress.runtime.session import make_session
    from fxpress.runtime.verify import check_parity

    torch.manual_seed(0)
    module, args, kwargs = zoo_models.load(name)
    try:
        program = fxpress.capture(module, args, kwargs or None)
    except fxpress.FxpressError as error:
        return {"model": name, "status": "not captured", "error": str(error).splitlines()[0]}
    draw = torch.Generator().manual_seed(1)
    data = [random_inputs(program, BATCH, draw) for _ in range(CALIBRATED // BATCH)]
    unseen = [random_inputs(program, BATCH, draw) for _ in range(JUDGED // BATCH)]
    context = Context(load_target(target), data, seed=0)
    floating = PassManager(PIPELINE, share_weights=True).run(program, context)
    start = time.perf_counter()
    try:
        int8 = PassManager("smooth,quantize").run(floating, context)
    except QuantizationError as error:  # nothing of it is for integers
        return {"model": name, "status": "float", "error": str(error).splitlines()[0]}
    row: Row = {"model": name, "target": target, "quantize_s": round(time.perf_counter() - start, 1)}
    model = fxpress.to_onnx(int8, target=target)
    session = make_session(model)
    row["sqnr_db"] = _sqnr(floating, session, unseen)
    found = measure_coverage(model, stated_reasons(int8), context.target.session if context.target else None)
    row["integer"] = found.integer_macs
    row["unexplained"] = [i.node for i in found.islands if not i.reason][:5]
    try:
        layers = check_layers(int8, unseen[0])
    except VerificationError as error:  # nothing to quantize
        return row | {"status": "float", "error": str(error).splitlines()[0]}
    row |= {"steps": layers.max_steps, "equal": layers.share_equal, "output_relative": layers.output_relative}
    row["worst"] = max(layers.layers, key=lambda s: s.max_steps).name
    parity = check_parity(int8, session, batches=(1, 3), real_inputs=unseen[0])
    row |= {"end_to_end": parity.output_within_1_step, "relative": parity.max_relative}
    return row | {"status": "same" if layers.kept else "differs"}


def _sqnr(floating: Any, session: Any, data: Any) -> float | None:
    """Of the float outputs, in dB, on inputs that calibration did not see."""
    import torch

    from fxpress.frontend.sqnr import Sqnr
    from fxpress.runtime.feed import leaves

    found = Sqnr()
    for inputs in data:
        actual = session.run(*(x.numpy() for x in inputs))
        with torch.no_grad():
            expected = floating.run_flat(leaves(floating, inputs))
        for e, a in zip(expected, actual):
            if e.is_floating_point():
                found.add(e, a.copy())
    return found.decibel


def measured(name: str, target: str) -> Row:
    """As `measure`; an error is a row like others."""
    start = time.perf_counter()
    try:
        row = measure(name, target)
    except Exception as error:  # a row like others
        row = {"model": name, "status": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


# -- the page -----------------------------------------------------------------------------------------------------


def page(rows: list[Row], target: str) -> str:
    """docs/zoo_int8.md."""
    import onnxruntime
    import torch

    captured = [r for r in rows if r["status"] != "not captured"]
    same = [r for r in captured if r["status"] == "same"]
    lines = [
        "# The zoo in INT8",
        "",
        f"Made by `python benchmarks/zoo_int8.py --target {target}` on {date.today()}, torch {torch.__version__.split('+')[0]}, onnxruntime",
        f"{onnxruntime.__version__}. Random weights and inputs: what is judged is whether every architecture arrives and is computed",
        "as simulated, not what INT8 costs a trained network. **SQNR** of the outputs in ONNX Runtime on inputs that calibration",
        "did not see. **integer**: share of the MACs in integer kernels of the optimized graph. **steps**: largest difference",
        "between PyTorch and ONNX Runtime of a layer fed the same integers; **equal**: share of its values that are the same.",
        "**end to end**: share of the output values within one step (1/255 of the range where the output is float).",
        "",
        f"{len(rows)} models, {len(captured)} captured, {len(same)} computed as simulated.",
        "",
        "| model | SQNR, dB | integer | steps | equal | end to end | status |",
        "|" + "---|" * 7,
    ]
    for r in sorted(rows, key=lambda r: r["model"]):
        if "steps" not in r:
            lines.append(f"| {r['model']} | | | | | | {r['status']}: {str(r.get('error', ''))[:160].replace('|', '/')} |")
            continue
        sqnr = "" if r["sqnr_db"] is None else f"{r['sqnr_db']:.1f}"
        shares = f"{r['integer']:.1%} | {r['steps']:g} | {r['equal']:.4%} | {r['end_to_end']:.2%}"
        lines.append(f"| {r['model']} | {sqnr} | {shares} | {r['status']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing, write the page, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=zoo_models.NAMES, help="names or beginnings of names")
    parser.add_argument("--one", metavar="NAME", help="one model; prints its row, or the traceback")
    parser.add_argument("--again", nargs="*", default=[], metavar="NAME", help="measure these anew")
    parser.add_argument("--failed", action="store_true", help="measure anew what was not the same")
    parser.add_argument("--target", default="ort-x86")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "zoo_int8.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo_int8.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(json.dumps(measure(options.one, options.target)))
        return 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    for name in zoo_models.NAMES:
        if not any(name.startswith(m) for m in [*options.models, *options.again]):
            continue
        bad = name in known and options.failed and known[name]["status"] not in ("same", "not captured")
        if name in known and name not in options.again and not bad:
            continue
        row = known[name] = measured(name, options.target)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        figures = f"{row.get('sqnr_db') or 0:6.1f} dB {row.get('integer') or 0:5.2f} {row.get('steps', -1):g} {row.get('end_to_end', 0):.3f}"
        print(f"{name:50} {row['status']:12} {figures} {row['seconds']:6.1f} s {row.get('error', '')[:200]}", flush=True)
    rows = [known[n] for n in zoo_models.NAMES if n in known]
    options.page.write_text(page(rows, options.target), encoding="utf-8")
    return int(any(r["status"] not in ("same", "float", "not captured") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
