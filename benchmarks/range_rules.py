"""Range rules side by side: SQNR of the outputs on samples that no rule has seen, for networks with real weights.

    python benchmarks/range_rules.py                 # ResNet-20, ResNet-32, MobileNetV2

Calibration: 1,000 train images (CIFAR-10), every fifth picture of the ImageNet sample. Judged on 500 other train
images, on 100 of the other pictures. Weights by minmax.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch
from int8_accuracy import DATA, collect
from models import cifar_resnet20, cifar_resnet32

import fxpress
from fxpress.backends.targets import load_target
from fxpress.frontend.sources import load_source
from fxpress.frontend.weights import load_weights
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.quantize.ranges.choose import mean_sqnr

RULES = (
    "minmax", "moving-average", "mse", "entropy",
    "percentile,percentile=99.9", "percentile,percentile=99.99", "percentile,percentile=99.999", "auto",
)  # fmt: skip


def cifar(name: str, module: torch.nn.Module) -> tuple[torch.nn.Module, np.ndarray, np.ndarray]:
    """A network, calibration and judging images."""
    load_weights(module, DATA / f"cifar_{name}.th")
    x, _ = collect(DATA / "cifar10_train20k.npz", "cifar10", 1500)
    return module, x[::3], x[np.arange(len(x)) % 3 != 0][:1000]


def networks() -> Iterator[tuple[str, torch.nn.Module, np.ndarray, np.ndarray]]:
    """Name, module, calibration images, judging images."""
    for name, make in (("resnet20", cifar_resnet20), ("resnet32", cifar_resnet32)):
        module, judging, calibration = cifar(name, make())
        yield name, module, calibration, judging
    module = load_source("torchvision:mobilenet_v2").module
    load_weights(module, DATA / "mobilenet_v2-b0353104.pth")
    x, _ = collect(DATA / "imagenet_sample_500.zip", "imagenet")
    yield "mobilenet_v2", module, x[::5], x[np.arange(len(x)) % 5 == 2]


def measure(module: torch.nn.Module, calibration: np.ndarray, judging: np.ndarray) -> Iterator[tuple[str, float, str]]:
    """(rule, SQNR in dB, note of the pass) for each rule."""
    program = fxpress.capture(module.eval(), torch.from_numpy(calibration[:2]))
    program = run_passes(program, "cleanup,canonicalize,fuse-batchnorm")
    batches = [(torch.from_numpy(calibration[i : i + 25]),) for i in range(0, len(calibration), 25)]
    parts = [torch.from_numpy(judging[i : i + 25]) for i in range(0, len(judging), 25)]
    expected = [program.run_flat((x,)) for x in parts]
    for rule in RULES:
        context = Context(target=load_target("ort-x86"), calibration=batches)
        int8 = run_passes(program, f"quantize{{ranges={rule}}}", context)
        note = next((n for n in int8.log[-1].notes if "ranges by" in n), "")
        yield rule, mean_sqnr(expected, (int8.run_flat((x,)) for x in parts)), note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no data: {DATA} is absent")
    torch.set_num_threads(1)
    for name, module, calibration, judging in networks():
        if options.only and name not in options.only:
            continue
        for rule, sqnr, note in measure(module, calibration, judging):
            print(f"{name:14} {rule:32} {sqnr:6.2f} dB  {note}", flush=True)


if __name__ == "__main__":
    main()
