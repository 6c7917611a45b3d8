"""Speed and fidelity of INT8 on eleven architectures, fxpress beside `quantize_static` and NNCF, in one run.

    taskset -c 0 python benchmarks/int8_peers.py                       # all models; a later run takes up where it ended
    taskset -c 0 python benchmarks/int8_peers.py --models resnet18 --again --tune
    taskset -c 0 python benchmarks/int8_peers.py --models timm:repvgg_a0 torchvision:densenet121   # any others, 224x224
    python benchmarks/int8_peers.py --table                            # what was measured, as Markdown

Every tool gets the same float ONNX file and the same calibration samples (32 pictures of the ImageNet sample where it is
there, noise where it is not, random tokens for BERT); SQNR is that of the outputs against the float file on 16 other samples.
MobileNetV2 has its ImageNet weights where they are there; the other weights are random, BatchNorm statistics, scales and
biases too (compare within a row). Latency: batch 1, one thread, runs of all variants interleaved in an order drawn anew for
each round, sessions made anew in each trial; speed is the median of float / variant within a round, by the processor time
of the thread (by the wall clock with --wall).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from int8_accuracy import DATA, collect
from models import Detector
from peers import Feed, interleaved, nncf_model, quantize_static_models, quantize_static_settings
from torch import nn
from zoo_models import redraw

import fxpress
from fxpress.backends.coverage import measure_coverage
from fxpress.frontend.sources import declare_torchvision_operators, load_source
from fxpress.frontend.sqnr import Sqnr
from fxpress.frontend.weights import load_weights
from fxpress.runtime.session import Session, make_session

CALIBRATION, JUDGED = 32, 16
RESULTS = Path(__file__).parent / "results" / "int8_peers.jsonl"


@dataclass(frozen=True)
class Case:
    """A model: how it is made, what it is fed ("pictures" or "tokens"), and whether it is a transformer."""

    make: Callable[[], nn.Module]
    feed: str = "pictures"
    transformer: bool = False


def _source(name: str) -> nn.Module:
    return redraw(load_source(name).module)


def _mobilenet_v2() -> nn.Module:
    module = load_source("torchvision:mobilenet_v2").module
    file = DATA / "mobilenet_v2-b0353104.pth"
    if not file.exists():
        return redraw(module)
    load_weights(module, file)
    return module


def _bert() -> nn.Module:
    declare_torchvision_operators()  # transformers imports torchvision
    from transformers import BertConfig, BertModel

    return redraw(BertModel(BertConfig(), add_pooling_layer=False))


def _detector() -> nn.Module:
    return redraw(Detector())


CASES = {
    "resnet18": Case(functools.partial(_source, "torchvision:resnet18")),
    "resnet50": Case(functools.partial(_source, "torchvision:resnet50")),
    "mobilenet_v2": Case(_mobilenet_v2),
    "mobilenet_v3_small": Case(functools.partial(_source, "torchvision:mobilenet_v3_small")),
    "efficientnet_b0": Case(functools.partial(_source, "torchvision:efficientnet_b0")),
    "shufflenet_v2_x1_0": Case(functools.partial(_source, "torchvision:shufflenet_v2_x1_0")),
    "convnext_tiny": Case(functools.partial(_source, "torchvision:convnext_tiny")),
    "deit_tiny": Case(functools.partial(_source, "timm:deit_tiny_patch16_224"), transformer=True),
    "swin_t": Case(functools.partial(_source, "torchvision:swin_t"), transformer=True),
    "bert_base_128": Case(_bert, "tokens", transformer=True),
    "detector": Case(_detector),
}


@functools.cache
def _pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """(calibration, judged): every fifth picture of the sample, and some of the others."""
    archive = DATA / "imagenet_sample_500.zip"
    if not archive.exists():
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(n, 3, 224, 224, generator=generator) for n in (CALIBRATION, JUDGED))  # type: ignore[return-value]
    x = torch.from_numpy(collect(archive, "imagenet")[0])
    chosen = torch.arange(len(x)) % 5 == 0
    return x[chosen][:CALIBRATION].clone(), x[~chosen][:: max(1, 400 // JUDGED)][:JUDGED].clone()


def samples(feed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(calibration, judged) inputs [N, ...]."""
    if feed == "pictures":
        return _pictures()
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, 30522, (n, 128), generator=generator) for n in (CALIBRATION, JUDGED))  # type: ignore[return-value]


@dataclass
class Variant:
    """One compiled form: figures against float; `note` says what went wrong."""

    name: str
    speedup: float | None = None
    ms: float | None = None
    sqnr_db: float | None = None
    integer_macs: float | None = None
    size: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass
class Found:
    """The variants of one model as ONNX files, with what is known of each."""

    models: dict[str, onnx.ModelProto] = field(default_factory=dict)
    rows: dict[str, Variant] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], onnx.ModelProto]) -> None:
        """Make a variant; a tool that fails is a row that says so."""
        self.rows[name] = Variant(name)
        start = time.process_time()
        try:
            self.models[name] = make()
        except Exception as error:
            self.rows[name].note = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else type(error).__name__
        self.rows[name].seconds = round(time.process_time() - start, 1)


def run_case(name: str, case: Case, options: argparse.Namespace) -> dict[str, object]:
    """All variants of one model."""
    torch.manual_seed(0)
    module = case.make().eval()
    calibration, judged = samples(case.feed)
    batches = [calibration[i : i + 8] for i in range(0, len(calibration), 8)]
    extra = {"tune": True} if options.tune else {}
    found = Found()
    program = fxpress.capture(module, calibration[:2])
    kept: dict[str, fxpress.Artifact] = {}

    def ours() -> onnx.ModelProto:
        kept["fxpress"] = fxpress.compile(program, calibration=batches, recipe=options.recipe, **extra)
        return kept["fxpress"].onnx

    floating = fxpress.compile(program, recipe="float").float_onnx
    found.models["float"] = floating
    found.rows["float"] = Variant("float")
    found.add("fxpress", ours)
    entry = floating.graph.input[0].name
    feeds = [{entry: x[None].numpy()} for x in calibration]
    if not options.alone:
        for setting in quantize_static_settings():
            found.add(setting, lambda s=setting: quantize_static_models(floating, feeds, {s: quantize_static_settings()[s]})[s])
        found.add("NNCF", lambda: nncf_model(floating, feeds, case.transformer))
    measure(found, [{entry: x[None].numpy()} for x in judged], options)
    report = kept["fxpress"].report if kept else {}
    parity = {k: report.get("parity", {}).get(k) for k in ("layer_max_steps", "layer_share_equal", "output_within_1_step")}
    return {
        "model": name, "clock": "wall" if options.wall else "thread", "rounds": options.rounds, "tune": options.tune,
        "recipe": options.recipe, "pipeline": report.get("pipeline"), "parity": parity,
        "rows": [dataclasses.asdict(r) for r in found.rows.values()],
    }  # fmt: skip


def measure(found: Found, feeds: list[Feed], options: argparse.Namespace) -> None:
    """Speed, SQNR, coverage and size of every variant that was made."""
    reference = outputs(make_session(found.models["float"], threads=1), feeds)
    for name in list(found.models):
        row, model = found.rows[name], found.models[name]
        row.size = round(model.ByteSize() / found.models["float"].ByteSize(), 4)
        if name == "float":
            continue
        try:
            row.sqnr_db = round(sqnr(reference, outputs(make_session(model, threads=1), feeds)), 2)
            row.integer_macs = round(measure_coverage(model).integer_macs, 4)
        except Exception as error:
            row.note = f"does not run: {str(error).splitlines()[0][:100]}"
            del found.models[name]
    clock = time.perf_counter if options.wall else time.thread_time
    times = interleaved(found.models, feeds[0], options.rounds, clock, trials=4)
    for name, measured in times.items():
        found.rows[name].ms = round(statistics.median(measured), 3)
        found.rows[name].speedup = round(statistics.median(f / t for f, t in zip(times["float"], measured)), 3)


def outputs(session: Session, feeds: list[Feed]) -> list[tuple[np.ndarray, ...]]:
    return [session.run(feed) for feed in feeds]


def sqnr(reference: list[tuple[np.ndarray, ...]], actual: list[tuple[np.ndarray, ...]]) -> float:
    """Over all samples and outputs, in dB."""
    found = Sqnr()
    for wants, haves in zip(reference, actual):
        for want, have in zip(wants, haves):
            found.add(want, have)
    assert found.decibel is not None
    return found.decibel


def show(result: dict[str, object]) -> str:
    """One model as lines."""
    lines = [f"\n{result['model']} ({result['clock']} time) parity {result['parity']}"]
    for row in result["rows"]:  # type: ignore[union-attr]
        values = [row[k] for k in ("speedup", "ms", "sqnr_db", "integer_macs", "size", "seconds")]
        figures = "  ".join("      -" if v is None else f"{v:7.2f}" for v in values)
        lines.append(f"{row['name']:38} {figures}  {row['note']}")
    return "\n".join(lines)


TABLE = ("fxpress", "static default (S8S8)", "static U8S8 per channel", "static U8S8 per tensor", "static U8S8 per channel, QOperator", "NNCF")


def table(results: dict[str, dict[str, object]]) -> str:
    """Speed over float and SQNR of every variant, a model a line; "-" where a tool's file does not run."""
    lines = ["| model | integer MACs | " + " | ".join(TABLE) + " |", "|" + "---|" * (len(TABLE) + 2)]
    for name, result in results.items():
        rows = {r["name"]: r for r in result["rows"]}  # type: ignore[union-attr]
        cells = [_cell(rows.get(variant)) for variant in TABLE]
        lines.append(f"| {name} | {rows['fxpress']['integer_macs']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, float] | None) -> str:
    if row is None or row["speedup"] is None:
        return "-"
    return f"{row['speedup']:.2f}× {row['sqnr_db']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(CASES), help="of the eleven, or sources of models on pictures")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--again", action="store_true", help="measure what is in the results file too")
    parser.add_argument("--alone", action="store_true", help="fxpress and float only")
    parser.add_argument("--wall", action="store_true", help="wall clock instead of the thread's processor time")
    parser.add_argument("--tune", action="store_true", help="let fxpress measure where each op runs best")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--table", action="store_true", help="show the results file as Markdown and end")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    known = {r["model"]: r for r in found}  # the last one counts
    if options.table:
        print(table(known))
        return
    for name in options.models:
        if name in known and not options.again:
            continue
        result = run_case(name, CASES.get(name) or Case(functools.partial(_source, name)), options)
        print(show(result), flush=True)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
