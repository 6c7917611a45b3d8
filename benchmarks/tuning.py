"""Measured placement: what `--tune` finds on many architectures, how close its figures are, and how long it takes.

    taskset -c 0 python benchmarks/tuning.py                        # all models, each with a cold and a warm cache
    taskset -c 0 python benchmarks/tuning.py --models mobilenet_v3_small --seconds 120

`told` is what the figures of single ops, added up, say of the speed of all integer over float; `integer` and `tuned` are whole
models against float, interleaved, one thread, by its processor time, medians over three fresh sessions. SQNR of the outputs on
8 pictures, ranges by minmax on the same. Weights are random (MobileNetV2: ImageNet, where they are there), BatchNorm
statistics, scales and biases too: compare within a row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from int8_peers import CASES, samples
from torch import nn
from zoo_models import redraw

import fxpress
from fxpress.backends.targets import load_target
from fxpress.frontend.sources import load_source
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.pipeline import parse_pipeline
from fxpress.runtime.tuning import Tuning, tune

PREPARE = "cleanup,canonicalize,fuse-batchnorm"
MORE = ("squeezenet1_1", "densenet121")


def models() -> dict[str, Callable[[], nn.Module]]:
    """Architectures on pictures."""
    known = {name: case.make for name, case in CASES.items() if case.feed == "pictures"}
    return known | {name: lambda n=name: redraw(load_source(f"torchvision:{n}").module) for name in MORE}  # type: ignore[misc]


def search(module: nn.Module, folder: Path, seconds: float) -> tuple[Tuning, float]:
    """One search, and its processor seconds."""
    pictures = samples("pictures")[0][:8]
    program = run_passes(fxpress.capture(module.eval(), (pictures[:2],)), PREPARE)
    start = time.process_time()
    found = tune(program, parse_pipeline("quantize"), Context(load_target("ort-x86")), (pictures,), cache=folder, seconds=seconds)
    return found, time.process_time() - start


def show(name: str, found: Tuning, cost: float, again: tuple[Tuning, float] | None) -> None:
    """One row of the table, then the trials."""
    best, integer = found.best, found.integer
    moved = len(integer.placement.integers - best.placement.integers)
    warm = f"{again[1]:.0f} s" if again else "-"
    print(
        f"| {name} | {integer.milliseconds * integer.speed:.2f} | {found.told:.2f}× | {integer.speed:.2f}× | **{best.speed:.2f}×** | "
        f"{integer.sqnr_db:.1f} → {best.sqnr_db:.1f} | {moved} of {len(integer.placement.integers)} | "
        f"{len(found.trials)} | {found.measured} | {cost:.0f} s | {warm} |",
        flush=True,
    )
    for trial in found.trials:
        print(f"    {trial} ({trial.low:.2f} to {trial.high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(models()))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--once", action="store_true", help="with a cold cache only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | float ms | told | integer | tuned | SQNR dB | nodes moved | trials | timed | CPU | CPU, warm cache |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.models:
        torch.manual_seed(0)
        module = models()[name]()
        with tempfile.TemporaryDirectory() as folder:
            found, cost = search(module, Path(folder), options.seconds)
            again = None if options.once else search(module, Path(folder), options.seconds)
        show(name, found, cost, again)


if __name__ == "__main__":
    main()
