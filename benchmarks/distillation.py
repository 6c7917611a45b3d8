"""Does a small network learn more from a large one? `python benchmarks/distillation.py [--epochs 10] [--json FILE]`

The student is a CNN of three stages (8, 16, 32 channels; 17 thousand parameters), untrained; the teacher ResNet-20 with
its published weights. Trained on cifar10_train20k, the same steps with the same seed for each row: labels alone; soft
labels (Hinton et al.); soft labels and labels; DIST; soft labels with features or with attention. Three seeds each.
`--judge` as in benchmarks/qat.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from pruning_recovery import EXAMPLE, load, make, top1
from qat import HELD_OUT

import fxpress
from fxpress.training.distill import Distillation
from fxpress.training.distill_terms import Attention, Features, Relations, SoftLabels, Term

STAGES = (("one", "layer1"), ("two", "layer2"), ("three", "layer3"))


class Student(nn.Module):
    """Three stages of two convolutions each; scores [n, 10] from [n, 3, 32, 32]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one = _stage(3, width, 1)
        self.two = _stage(width, 2 * width, 2)
        self.three = _stage(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.three(self.two(self.one(x))).mean((2, 3)))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    def block(a: int, step: int) -> list[nn.Module]:
        return [nn.Conv2d(a, outputs, 3, step, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*block(inputs, stride), *block(outputs, 1))


ROWS: dict[str, tuple[list[Term], float]] = {
    "labels": ([], 1.0),
    "soft labels": ([SoftLabels(1.0)], 0.0),
    "soft labels, labels": ([SoftLabels(0.9)], 0.1),
    "DIST, labels": ([Relations(1.0)], 1.0),
    "soft labels, features": ([SoftLabels(1.0), Features(STAGES)], 0.0),
    "soft labels, attention": ([SoftLabels(1.0), Attention(STAGES)], 0.0),
}


def train(row: str, data: tuple[torch.Tensor, torch.Tensor], epochs: int, seed: int) -> fxpress.Program:
    """A student trained as a row says."""
    terms, labels = ROWS[row]
    torch.manual_seed(seed)
    student = fxpress.capture(Student(), (EXAMPLE,))
    objective = Distillation(student, make("resnet20"), terms, labels=labels, seed=seed) if terms else None
    options = fxpress.TrainingOptions(
        epochs, 64, fxpress.SGD(0.1, nesterov=True), warmup=0.05, clip_norm=5.0, seed=seed
    )
    return fxpress.finetune(student, data, options, objective=objective, augment="flip-shift")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--judge", choices=("test", "held-out"), default="test")
    parser.add_argument("--examples", type=int, help="train on that many images only")
    parser.add_argument("--limit", type=int, help="judge on that many images only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = load("cifar10_train20k.npz")
    end = len(y) - HELD_OUT if options.judge == "held-out" else len(y)
    judged = (x[end:], y[end:]) if options.judge == "held-out" else load("cifar10_test_a.npz")
    judged = judged[0][: options.limit], judged[1][: options.limit]
    data = x[:end][: options.examples], y[:end][: options.examples]
    results: dict[str, list[float]] = {}
    for row in options.rows:
        start = time.perf_counter()
        results[row] = [top1(train(row, data, options.epochs, seed), *judged) for seed in range(options.seeds)]
        figures = ", ".join(f"{v:.2f}" for v in results[row])
        mean, seconds = statistics.mean(results[row]), time.perf_counter() - start
        print(f"{row:24} {mean:6.2f} %   ({figures})   {seconds:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"options": {**vars(options), "json": None}, "top1": results}, indent=1))


if __name__ == "__main__":
    main()
