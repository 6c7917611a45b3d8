"""Prune, fine-tune, compile: what `fxpress demo` does, with your own training loop in the middle.

    python examples/prune_and_finetune.py OUT
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional

import fxpress


def network() -> nn.Module:
    """A small classifier of 3x16x16 inputs into four classes."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def examples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a brighter quadrant; the label says which."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 4
    for x, label in zip(inputs, labels.tolist()):
        row, column = divmod(label, 2)
        x[label % 3, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 0.8
    return inputs, labels


def train(model: nn.Module | fxpress.Program, steps: int, learning_rate: float) -> None:
    """Any training loop will do: a Program trains like the module it came from."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    for step in range(steps):
        inputs, labels = examples(64, seed=step)
        loss = functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main(output: str) -> fxpress.Artifact:
    """Train, prune to half the MACs, fine-tune, compile to INT8, judge on inputs that were not trained on."""
    torch.manual_seed(0)
    model = network()
    train(model, steps=80, learning_rate=1e-2)

    reference = fxpress.capture(model, (torch.randn(2, 3, 16, 16),))
    plan = fxpress.plan_pruning(reference, macs=0.5)
    pruned = plan.apply(reference)
    train(pruned, steps=40, learning_rate=3e-3)

    held_out, answers = examples(400, seed=10_000)

    def accuracy(run) -> float:
        return float((run(held_out).argmax(1) == answers).float().mean())

    calibration = [examples(64, seed=s)[0] for s in range(4)]
    artifact = fxpress.compile(
        pruned, calibration=calibration, evaluate=accuracy, reference=reference, plan=plan, output=output
    )
    print(artifact)
    return artifact


if __name__ == "__main__":
    main(sys.argv[1])
