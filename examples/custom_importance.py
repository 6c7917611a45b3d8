"""Importance criteria of one's own: one small function each.

    python examples/custom_importance.py
    fxpress compile MODEL --plugin examples/custom_importance.py --prune macs=0.5,importance=entropy --data DATA -o OUT

`reads` says what the function is shown (`fxpress.passes.prune.importance.criteria` describes each), and it gives one
score for each channel or position, larger for what matters more. Places, products (heads), residual streams,
normalization and aggregation over coupled layers are not its business.
"""

from __future__ import annotations

import torch
from torch import nn

import fxpress
from fxpress.passes.prune.importance.criteria import Moments, Slices


@fxpress.register_importance("entropy")
def entropy(slices: Slices) -> torch.Tensor:
    """Entropy of the squared weights: what is spread over many inputs is hard to replace."""
    shares = slices.values.square()
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return -(shares * shares.clamp_min(1e-30).log()).sum(dim=1)


@fxpress.register_importance("variance", reads="moments", aggregate="sum")
def variance(seen: Moments) -> torch.Tensor:
    """What a channel adds to its readers, without its constant part, which a bias can give."""
    powers = seen.products.diagonal().clamp_min(1e-30)
    return seen.energy * (1 - seen.means.square() / powers).clamp_min(0)


def main() -> list[fxpress.PruningPlan]:
    """Plans by both criteria for a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip
    program = fxpress.capture(model.eval(), (torch.randn(2, 3, 16, 16),))
    batches = [torch.randn(16, 3, 16, 16) for _ in range(4)]
    return [
        fxpress.plan_pruning(program, macs=0.5, importance="entropy"),
        fxpress.plan_pruning(program, macs=0.5, importance="variance", data=batches),
    ]


if __name__ == "__main__":
    for plan in main():
        print(plan)
