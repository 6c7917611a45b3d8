"""Automatic float fallback on real weights: how few MACs stay in float, in how many trials and how long.

    python benchmarks/fallback.py                     # MobileNetV2 made to fail, and ResNet-20 held to 0.15 points

MobileNetV2 is judged on 400 of the 500 ImageNet pictures, calibrated on the other 100 (every fifth), in settings that
harm it: `per-tensor` is the target with one scale for all output channels of a layer's weights, `five-bit` the target
with weights of 5 bits per channel, `contrast` plain min-max ranges of 10 pictures with eight times the contrast.
ResNet-20 is calibrated on 1,000 CIFAR-10 train images and searched on 4,000 others (`--judge` prints the result on
cifar10_test_a as well, which took no part).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from int8_accuracy import DATA, collect
from models import cifar_resnet20

from fxpress.api import capture
from fxpress.backends.targets import load_target
from fxpress.compilation.allowance import Budget
from fxpress.compilation.settings import Settings, Stages
from fxpress.compilation.steps import compile_program
from fxpress.frontend.batches import as_batches
from fxpress.frontend.sources import load_source
from fxpress.frontend.weights import load_weights
from fxpress.passes.pipeline import parse_pipeline
from fxpress.passes.quantize.spec import Target
from fxpress.runtime.artifact import Artifact
from fxpress.runtime.evaluate import Top1, measure, session_runner
from fxpress.runtime.session import make_session

CASES = ("per-tensor", "five-bit", "contrast", "resnet20")
PREPARE = "cleanup,canonicalize,fuse-batchnorm"


def harmed(**weight: object) -> Target:
    """ort-x86 with another format of weights."""
    target = load_target("ort-x86")
    return dataclasses.replace(target, weight=dataclasses.replace(target.weight, **weight))


def batches(x: np.ndarray, size: int = 25) -> list[torch.Tensor]:
    return list(torch.from_numpy(x).split(size))


def labelled(x: np.ndarray, y: np.ndarray, size: int = 25) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(batches(x, size), torch.from_numpy(y).split(size)))


def run(
    title: str, module: torch.nn.Module, calibration: np.ndarray, x: np.ndarray, y: np.ndarray, target: Target,
    pipeline: str, max_drop: float, budget: Budget, journal: Path | None,
) -> Artifact:  # fmt: skip
    """Compile under `max_drop` and print what the search found."""
    program = capture(module, (torch.from_numpy(x[:2]),))
    settings = Settings(
        title, target, parse_pipeline(pipeline), max_drop=max_drop, search=budget, journal=journal
    )
    start = time.perf_counter()
    stages = Stages()
    artifact = compile_program(
        program, program, settings, stages, as_batches(program, batches(calibration)), Top1(labelled(x, y))
    )
    seconds = time.perf_counter() - start
    found = artifact.report["fallback"]
    print(f"\n{title}: allowed drop {max_drop:.4f}, {len(y)} examples, {seconds:.0f} s in all")
    for stage in artifact.report["stages"]:
        if stage["pass"] == "max-drop":
            print(f"  search {stage['seconds']:.0f} s")
            print(*(f"  {note}" for note in stage["notes"]), sep="\n")
    print(artifact)
    print(f"  pipeline {artifact.report['pipeline']}")
    for row in (found or {}).get("sensitivity", [])[:10]:
        print(f"  {row['name']:28} {row['kind']:10} {row['sqnr_alone_db']:7.1f} dB {row['sqnr_without_db']} {row['macs']}")
    return artifact


def mobilenet(case: str, budget: Budget, journal: Path | None) -> None:
    module = load_source("torchvision:mobilenet_v2").module
    load_weights(module, DATA / "mobilenet_v2-b0353104.pth")
    x, y = collect(DATA / "imagenet_sample_500.zip", "imagenet")
    chosen = np.arange(len(x)) % 5 == 0
    calibration, x, y = x[chosen], x[~chosen], y[~chosen]
    target, quantize = load_target("ort-x86"), "quantize"
    if case == "per-tensor":
        target = harmed(per_channel=False)
    elif case == "five-bit":
        target = harmed(bits=5)
    else:
        calibration, quantize = 8 * calibration[:10], "quantize{ranges=minmax}"
    run(f"MobileNetV2, {case}", module, calibration, x, y, target, f"{PREPARE},{quantize}", 0.01, budget, journal)


def resnet20(drop: float, budget: Budget, journal: Path | None, judge: bool) -> None:
    module = cifar_resnet20()
    load_weights(module, DATA / "cifar_resnet20.th")
    x, y = collect(DATA / "cifar10_train20k.npz", "cifar10", 5000)
    part = np.arange(len(x)) % 5 == 0
    artifact = run(
        "ResNet-20", module, x[part], x[~part], y[~part], load_target("ort-x86"), f"{PREPARE},quantize", drop, budget, journal
    )
    if judge:
        x, y = collect(DATA / "cifar10_test_a.npz", "cifar10")
        program = capture(module, (torch.from_numpy(x[:2]),))
        for name, model in (("float", artifact.float_onnx), ("compiled", artifact.onnx)):
            metric = measure(Top1(labelled(x, y, 100)), session_runner(program, make_session(model)))
            print(f"  cifar10_test_a, {name}: {metric.value:.4f} on {metric.count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--drop", type=float, default=0.0015, help="of ResNet-20")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--judge", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget = Budget(options.seconds, options.trials)
    for case in options.cases:
        if case == "resnet20":
            resnet20(options.drop, budget, options.journal, options.judge)
        else:
            mobilenet(case, budget, options.journal)


if __name__ == "__main__":
    main()
