"""Pruning to a latency: what was asked for against what a fresh process measures.

    python benchmarks/pruning_latency.py                                  # the table of docs/results.md
    python benchmarks/pruning_latency.py torchvision:resnet18 --latency 0.5 --recipe int8
    python benchmarks/pruning_latency.py --widths                         # time of a convolution by its channels

One process plans (with the user's cached table of kernel times) and writes the unpruned and the pruned model as ONNX, in
the form that the recipe gives them. A second, fresh one runs both in turns, batch 1, one thread, in five trials with new
sessions; "measured" is the median over the trials of the median ratio by the clock on the wall, with the least and the
greatest trial; "cpu" the same by processor time, which other processes disturb less.
Random weights: which channels go does not change how long the rest takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = ["torchvision:mobilenet_v2", "torchvision:resnet18", "timm:vit_tiny_patch16_224"]
TRIALS = 5
WIDTHS = (8, 12, 14, 16, 18, 20, 24, 28, 30, 32, 40, 48, 52, 56, 60, 64)


def plan(model: str, latency: float, recipe: str, folder: Path) -> dict[str, object]:
    """Plan and write both models; runs in its own process."""
    import torch

    import fxpress
    from fxpress.frontend.sources import load_source

    torch.set_num_threads(1)
    source = load_source(model, 0)
    program = fxpress.capture(source.module, (torch.randn(2, *(source.input_shape or (3, 224, 224))),))
    clock = fxpress.op_latencies(recipe)
    start = time.perf_counter()
    made = fxpress.plan_pruning(program, latency=latency, round_to=16, latencies=clock)
    seconds = time.perf_counter() - start
    (folder / "original.onnx").write_bytes(clock.compiled(program))
    (folder / "pruned.onnx").write_bytes(clock.compiled(made.apply(program)))
    kept = made.macs[1] / made.macs[0]
    return {"seconds": seconds, "measurements": clock.measured, "macs": kept, "notes": list(made.notes)}


def measure(folder: Path, seconds: float) -> dict[str, list[float]]:
    """The ratios of the trials, by either clock; runs in its own process, which never saw the model."""
    import numpy as np

    from fxpress.runtime.benchmark import compare_latency
    from fxpress.runtime.session import make_session

    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for _ in range(TRIALS):
        pruned, original = (make_session(folder / name) for name in ("pruned.onnx", "original.onnx"))
        shape = [n if isinstance(n, int) else 1 for n in original.input_shapes[0]]
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        for name, clock in (("wall", time.perf_counter), ("cpu", time.thread_time)):
            ratios[name].append(compare_latency(pruned, original, (x,), seconds=seconds, clock=clock).ratio)
    return ratios


def widths() -> None:
    """Processor time of a stack of 3x3 convolutions on 16x16 pixels by its number of channels, 16 channels being 1."""
    import torch
    from torch import nn

    import fxpress
    from fxpress.runtime.benchmark import compare_latency
    from fxpress.runtime.session import make_session

    def session(channels: int) -> object:
        layers = [m for _ in range(6) for m in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
        model = nn.Sequential(nn.Conv2d(16, channels, 3, padding=1), nn.ReLU(), *layers).eval()
        return make_session(clock.compiled(fxpress.capture(model, (x,))))

    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(2, 16, 16, 16)
    for recipe in ("float", "int8"):
        clock = fxpress.op_latencies(recipe)
        base, times = session(16), []
        for n in WIDTHS:
            timing = compare_latency(session(n), base, (x[:1].numpy(),), seconds=2, clock=time.thread_time)
            times.append(f"{n}: {timing.ratio:.2f}")
        print(f"{recipe:5}  {'  '.join(times)}", flush=True)


def in_fresh_process(step: str, *arguments: str) -> dict[str, object]:
    """The JSON that this script prints for one step."""
    command = [sys.executable, __file__, "--step", step, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--latency", type=float, default=0.6)
    parser.add_argument("--recipe", default="float")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each of the five trials")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--widths", action="store_true", help="time convolutions by their channels instead")
    parser.add_argument("--step", choices=["plan", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.widths:
        widths()
    elif args.step == "plan":
        print(json.dumps(plan(args.models[0], args.latency, args.recipe, args.folder)))
    elif args.step == "measure":
        print(json.dumps(measure(args.folder, args.seconds)))
    else:
        results = [run(model, args) for model in args.models]
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


def run(model: str, args: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        given = [model, "--latency", str(args.latency), "--recipe", args.recipe, "--folder", folder]
        made = in_fresh_process("plan", *given)
        trials = in_fresh_process("measure", *given, "--seconds", str(args.seconds))
    ratios: list[float] = trials["wall"]  # type: ignore[assignment]
    ratio, cpu = statistics.median(ratios), statistics.median(trials["cpu"])  # type: ignore[call-overload]
    print(
        f"{model:32} {args.recipe:6} asked {args.latency:.3f}  MACs kept {made['macs']:.3f}  "
        f"planned in {made['seconds']:5.1f} s ({made['measurements']} kernels timed)  measured {ratio:.3f} "
        f"[{min(ratios):.3f}, {max(ratios):.3f}]  {100 * (ratio / args.latency - 1):+.1f} %  cpu {cpu:.3f}",
        flush=True,
    )
    for note in made["notes"]:  # type: ignore[attr-defined]
        print(f"    {note}", flush=True)
    return {"model": model, "recipe": args.recipe, "asked": args.latency, "ratio": ratio, "cpu": cpu, **trials, **made}


if __name__ == "__main__":
    main()
