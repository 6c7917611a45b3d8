"""How much accuracy comes back after pruning, without labels? `python benchmarks/pruning_recovery.py [--json FILE]`

CIFAR ResNets with their published weights; MACs cut by 1.5, 2.1 and 2.6. Calibration: the first 1,000 train images, no
labels. Judged on cifar10_test_a, 5,000 test images that nothing was tuned on. Columns, all from this one run:

    TP + BN       Torch-Pruning, global L2 magnitude, same MACs, BatchNorm re-estimated on the same images
    zero-shot     the plan of fxpress, nothing else
    + BN          BatchNorm re-estimated
    + LS          least squares instead
    + training    least squares, then training towards the float network on the same images
    KL            divergence of the trained network's predictions from the float network's on the last 4,000 train images

With several `--epochs` each number is trained and the one with the smallest divergence is judged, so the test images choose
nothing.

Torch-Pruning does not follow channels through the zero-padded shortcuts (pruning-facts.md), so the stream is on its list of
ignored layers, as its users would have it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import models

import fxpress
from fxpress.frontend.cost import count_macs
from fxpress.passes.processor import has_bfloat16
from fxpress.passes.prune.recovery.reestimate import reestimate_statistics

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CUTS = (1.5, 2.1, 2.6)
CALIBRATION = 1000
HELD_OUT = 4000
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXAMPLE = torch.zeros(2, 3, 32, 32)


@dataclass
class Row:
    """One network at one cut: top-1 in percent, MACs as a share of the original's, seconds of each step."""

    network: str
    cut: float
    unpruned: float
    torch_pruning: float
    torch_pruning_macs: float
    macs: float
    zero_shot: float
    batchnorm: float
    least_squares: float
    training: float
    divergence: dict[int, float]  # by epochs
    seconds: dict[str, float]


def load(name: str, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [n, 3, 32, 32] normalized, labels) of one of the CIFAR files."""
    import numpy as np

    with np.load(DATA / name) as file:
        images, labels = file["images"][:count], file["labels"][:count]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return ((x - mean) / deviation).contiguous(), torch.from_numpy(labels)


def top1(program: fxpress.Program, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent."""
    hits = sum(int((program.run_flat((a,))[0].argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250)))
    return 100 * hits / len(y)


def divergence(program: fxpress.Program, reference: fxpress.Program, x: torch.Tensor) -> float:
    """KL(reference || program) of the predicted classes, in nats, mean over images."""
    total = 0.0
    for batch in x.split(250):
        found, wanted = (p.run_flat((batch,))[0].log_softmax(1) for p in (program, reference))
        total += float(nn.functional.kl_div(found, wanted, reduction="sum", log_target=True))
    return total / len(x)


def make(name: str) -> nn.Module:
    """A network with its published weights."""
    return models.load_checkpoint(getattr(models, f"cifar_{name}")(), DATA / f"cifar_{name}.th")


def torch_pruned(name: str, share: float) -> fxpress.Program:
    """Torch-Pruning's global L2 pruning: the largest network within `share` of the MACs, found by bisection."""
    total = count_macs(fxpress.capture(make(name), (EXAMPLE,)))
    low, high, best = 0.0, 0.95, None
    for _ in range(9):
        middle = (low + high) / 2
        program = fxpress.capture(_torch_pruned_at(name, middle), (EXAMPLE,))
        if count_macs(program) <= share * total:
            high, best = middle, program
        else:
            low = middle
    assert best is not None
    return best


def _torch_pruned_at(name: str, ratio: float) -> nn.Module:
    import torch_pruning

    module = make(name)
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    stream = [m for n, m in layers if not n.endswith(".conv1")]
    pruner = torch_pruning.pruner.BasePruner(
        module,
        EXAMPLE,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=1.0,
        ignored_layers=stream,
    )
    pruner.step()
    return module.eval()


def measure(name: str, cut: float, epochs: list[int], steps: int, bfloat16: bool, max_ratio: float | None = None) -> Row:
    """All columns of one row."""
    calibration = load("cifar10_train20k.npz", CALIBRATION)[0].split(100)
    x, y = load("cifar10_test_a.npz")
    program = fxpress.capture(make(name), (EXAMPLE,))
    clock = Clock()
    peer = torch_pruned(name, 1 / cut)
    reestimate_statistics(peer, [(b,) for b in calibration])
    clock.lap("torch-pruning")
    limits = {"importance": "hessian", "normalize": "cost", "max_ratio": max_ratio}
    choose = functools.partial(fxpress.plan_pruning, data=calibration, **limits)
    solved, plan = fxpress.prune_and_recover(program, calibration, macs=1 / cut, steps=steps, choose=choose)
    clock.lap("plan and least squares")
    pruned = plan.apply(program)
    renormed = fxpress.recover(pruned, calibration, reference=program, plan=plan, method="batchnorm")
    clock.lap("batchnorm")
    training = {"method": "none", "augment": "flip-shift-cutmix", "bfloat16": bfloat16}
    held_out, candidates = load("cifar10_train20k.npz")[0][-HELD_OUT:], {}
    for n in epochs:
        trained = fxpress.recover(solved, calibration, reference=program, plan=plan, epochs=n, **training)
        clock.lap(f"{n} epochs")
        candidates[divergence(trained, program, held_out)] = n, trained
    trained = candidates[min(candidates)][1]
    total = count_macs(program)
    scores = [top1(p, x, y) for p in (program, peer, pruned, renormed, solved, trained)]
    unpruned, torch_pruning, *ours = scores
    macs = [count_macs(p) / total for p in (peer, pruned)]
    return Row(name, cut, unpruned, torch_pruning, macs[0], macs[1], *ours, {n: d for d, (n, _) in candidates.items()}, clock.laps)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap goes to `name`."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = (
        "| network | MACs cut | unpruned | TP + BN | zero-shot | + BN | + LS | + training | KL | MACs kept (TP) | seconds |"
    )
    lines = [head, "|" + "---|" * 11]
    for r in rows:
        scores = (r.unpruned, r.torch_pruning, r.zero_shot, r.batchnorm, r.least_squares, r.training)
        seconds = ", ".join(f"{k} {v:.0f}" for k, v in r.seconds.items())
        cells = " | ".join(f"{s:.2f}" for s in scores)
        kl = ", ".join(f"{d:.4f} ({n} epochs)" for n, d in r.divergence.items())
        macs = f"{r.macs:.4f} ({r.torch_pruning_macs:.4f})"
        lines.append(f"| {r.network} | {r.cut}× | {cells} | {kl} | {macs} | {seconds} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[120])
    parser.add_argument("--steps", type=int, default=1, help="prune and recover in so many steps")
    parser.add_argument("--max-ratio", type=float, help="the largest share that any layer loses")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16, where the processor has it")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet32"])
    parser.add_argument("--cuts", nargs="+", type=float, default=list(CUTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        for cut in options.cuts:
            rows.append(measure(name, cut, options.epochs, options.steps, has_bfloat16() and not options.float32, options.max_ratio))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(table(rows))
    return 0 if all(r.training > r.torch_pruning for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
