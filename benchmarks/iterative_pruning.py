"""Is pruning in steps, or shrinking first, worth its time? `python benchmarks/iterative_pruning.py [--json FILE]`

CIFAR ResNet-20 with its published weights, MACs halved, fine-tuned on labels. Every row trains for the same number of
epochs on the same images (cifar10_train20k without its last 2,000) from the same seed, all in this one run:

    one shot      prune, then all epochs
    in steps      `--steps` times: prune a part, then a share of the epochs
    growing       a third of the epochs with a growing penalty on what will go, prune, the rest
    group lasso   a third of the epochs with a penalty on all channels, plan and prune, the rest

Judged on cifar10_test_a, which nothing was tuned on; settings were chosen on the 2,000 images held out (`--held-out`
judges on those instead).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pruning_recovery import EXAMPLE, load, make

import fxpress
from fxpress.frontend.cost import count_macs
from fxpress.runtime.evaluate import Top1
from fxpress.training.iterative import Shrink

HELD_OUT = 2000


@dataclass
class Row:
    """One way: top-1 in percent right after the last pruning and at the end, MACs kept, seconds."""

    way: str
    pruned: float
    trained: float
    macs: float
    seconds: float
    steps: list[str]


def ways(epochs: int, steps: int, seed: int) -> dict[str, tuple[fxpress.TrainingOptions, int, Shrink | None]]:
    """Name -> options of a step's training, number of steps, what shrinks first; `epochs` in all."""
    sgd = fxpress.SGD(0.02, nesterov=True, weight_decay=1e-4)
    whole = fxpress.TrainingOptions(
        epochs=epochs, batch_size=128, optimizer=sgd, warmup=0.05, keep="last", seed=seed
    )  # fmt: skip
    third = max(epochs // 3, 1)
    first, rest = replace(whole, epochs=third), replace(whole, epochs=max(epochs - third, 1))
    return {
        "one shot": (whole, 1, None),
        f"in {steps} steps": (replace(whole, epochs=max(epochs // steps, 1)), steps, None),
        "growing": (rest, 1, Shrink("growing", 0.005, first)),
        "group lasso": (rest, 1, Shrink("group-lasso", 1e-5, first)),
    }


def measure(options: argparse.Namespace) -> list[Row]:
    """All rows."""
    images, labels = load("cifar10_train20k.npz")
    count = min(options.examples or len(labels), len(labels) - HELD_OUT)
    judged = (images[-HELD_OUT:], labels[-HELD_OUT:]) if options.held_out else load("cifar10_test_a.npz", options.judged)
    top1 = Top1(list(zip(*(t.split(250) for t in judged))))
    program = fxpress.capture(make("resnet20"), (EXAMPLE,))
    rows = []
    for way, (training, steps, shrink) in ways(options.epochs, options.steps, options.seed).items():
        start = time.perf_counter()
        pruned, _, done = fxpress.prune_and_finetune(
            program, (images[:count], labels[:count]), training, macs=options.macs, steps=steps, shrink=shrink,
            evaluate=top1, augment="flip-shift", progress=_told if sys.stderr.isatty() else None,
        )  # fmt: skip
        last, kept = done[-1], count_macs(pruned) / count_macs(program)
        seconds = time.perf_counter() - start
        rows.append(Row(way, 100 * last.pruned_metric, 100 * last.metric, kept, seconds, [str(s) for s in done]))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def _told(name: str, done: int, total: int | None) -> None:
    print(f"\r{name} {done}/{total}  ", end="", file=sys.stderr)


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = "| way | after pruning | trained | MACs kept | seconds |\n|---|---|---|---|---|"
    cells = (f"| {r.way} | {r.pruned:.2f} | {r.trained:.2f} | {r.macs:.3f} | {r.seconds:.0f} |" for r in rows)
    return "\n".join([head, *cells])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, help="train on so many images only")
    parser.add_argument("--judged", type=int, help="judge on so many images only")
    parser.add_argument("--held-out", action="store_true", help="judge on the last 2,000 train images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
