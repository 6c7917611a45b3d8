"""An exponential moving average of a model's tensors (Polyak and Juditsky 1992; the form with a decay per step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

Tensors = dict[str, torch.Tensor]


class Average:
    """The average of all floating tensors of `live`; what is not floating follows the last value.

    `decay` is reached slowly, min(decay, (1 + step) / (10 + step)), so that the first weights are soon forgotten.
    """

    def __init__(self, live: Mapping[str, torch.Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors: Tensors = {name: t.detach().clone() for name, t in live.items()}

    @torch.no_grad()
    def update(self, live: Mapping[str, torch.Tensor], step: int) -> None:
        """Take in the values after step number `step` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, mean in self.tensors.items():
            if mean.is_floating_point():
                mean.lerp_(live[name], share)
            else:
                mean.copy_(live[name])


@contextmanager
def values(live: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Let the tensors of `live` have the values of `others` within the block."""
    if others is None:
        yield
        return
    own = copied(live)
    assign(live, others)
    try:
        yield
    finally:
        assign(live, own)


@torch.no_grad()
def assign(live: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy `values` into the tensors of `live`, by name."""
    for name, tensor in live.items():
        tensor.copy_(values[name])


def copied(live: Mapping[str, torch.Tensor]) -> Tensors:
    """The values of `live` as they are now."""
    return {name: t.detach().clone() for name, t in live.items()}
