"""Plain supervised training, on a Program or a module: enough to recover accuracy after pruning.

A Program trains like the module it came from: its BatchNorm and dropout switch with `train()` and `eval()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.nn import functional

from ..errors import DataError
from ..frontend.program import Program

Trainable = TypeVar("Trainable", Program, torch.nn.Module)


def fit(
    model: Trainable,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    learning_rate: float = 1e-2,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Trainable:
    """Train a classifier in place on `inputs` [N, ...] and `labels` [N], and return it in evaluation mode.

    AdamW with one cosine decay of the learning rate to zero, cross entropy. The order of the examples depends on
    `seed` alone. `on_epoch` is told the number of epochs done and the mean loss of the last. Raises DataError.
    """
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise DataError(f"{len(inputs)} examples and {len(labels)} labels", hint="give one label per example")
    steps = epochs * -(-len(inputs) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for epoch in range(epochs):
        losses = []
        for rows in shuffled(len(inputs), batch_size, seed + epoch):
            loss = functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        if on_epoch:
            on_epoch(epoch + 1, sum(losses) / len(losses))
    model.eval()
    return model


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of the indices 0..count-1 in an order that depends on `seed` alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order.split(batch_size)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch use `count` threads within the block. Small layers are slower on many, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
