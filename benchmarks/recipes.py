"""Every shipped recipe, tried on two networks: `python benchmarks/recipes.py [--networks digits resnet20] [--json FILE]`

`digits`: the network of `fxpress demo`, trained for a few seconds. `resnet20`: the published weights, trained on
cifar10_train20k where a recipe trains (`--examples`: on so many of them), calibrated on its first 1,000 images, judged on
cifar10_test_a. Each is one call of `fxpress.compile(recipe=...)`; the figures are those of its report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pruning_recovery import EXAMPLE, load, make

import fxpress
from fxpress.compilation.settings import trains
from fxpress.demo import DigitNet, load_digits
from fxpress.passes.pipeline import parse_pipeline
from fxpress.recipe import RECIPES
from fxpress.runtime.evaluate import Top1

Pictures = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Task:
    """A float program, and the data of a recipe."""

    program: fxpress.Program
    calibration: list[torch.Tensor]
    training: Pictures
    judged: Pictures


def digits(examples: int | None) -> Task:
    """The demo's network, trained on the digits of scikit-learn."""
    data = load_digits()
    torch.manual_seed(0)
    program = fxpress.capture(DigitNet(16), (data.inputs[:2],))
    options = fxpress.TrainingOptions(epochs=15, optimizer=fxpress.AdamW(1e-2), batch_size=32)
    trained = fxpress.finetune(program, (data.inputs, data.labels), options)
    judged = data.held_out_inputs, data.held_out_labels
    return Task(trained, list(data.inputs[:500].split(50)), (data.inputs, data.labels), judged)


def resnet20(examples: int | None) -> Task:
    """The published weights on CIFAR-10."""
    pictures, labels = load("cifar10_train20k.npz", examples)
    program = fxpress.capture(make("resnet20"), (EXAMPLE,))
    return Task(program, list(pictures[:1000].split(100)), (pictures, labels), load("cifar10_test_a.npz"))


TASKS: dict[str, Callable[[int | None], Task]] = {"digits": digits, "resnet20": resnet20}


def tried(task: Task, recipe: str) -> dict[str, Any]:
    """The figures of one recipe's report."""
    training = task.training if trains(parse_pipeline(RECIPES[recipe].pipeline)) else None
    start = time.perf_counter()
    artifact = fxpress.compile(
        task.program, calibration=task.calibration, recipe=recipe, training=training, evaluate=Top1([task.judged])
    )
    report = artifact.report
    before, after = report["float"], report["compiled"]
    return {
        "float": 100 * before["metric"],
        "compiled": 100 * after["metric"],
        "macs": after["macs"] / before["macs"],
        "size": after["size_bytes"] / before["size_bytes"],
        "speedup": report["speedup"],
        "kept": artifact.kept,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--examples", type=int, help="of ResNet-20's training data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    print("| network | recipe | top-1 | MACs | file / float | speed | kept | seconds |\n" + "|---" * 8 + "|")
    for network in options.networks:
        task = TASKS[network](options.examples)
        for recipe in options.recipes:
            row = results.setdefault(network, {})[recipe] = tried(task, recipe)
            top1 = f"{row['float']:.2f} -> {row['compiled']:.2f} %"
            shares = f"{row['macs']:.3f} | {row['size']:.3f} | {row['speedup']:.2f}x"
            print(f"| {network} | `{recipe}` | {top1} | {shares} | {row['kept']} | {row['seconds']:.0f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
