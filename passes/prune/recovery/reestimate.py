"""BatchNorm re-estimation: the running statistics of a pruned program, computed anew on data without labels.

After pruning, the inputs of a BatchNorm are no longer distributed as its statistics say; giving it the mean and
variance that its inputs have now recovers a good part of what was lost (Li et al. 2020, "EagleEye").

The statistics of one BatchNorm change the inputs of those behind it. So they are computed in order of depth, each on
the final values of what lies before it: the plain mean and variance over all samples, however the data are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from ....frontend.program import Program, get_attribute, layer_name
from ...rewrite import argument, aten, find
from .linear_layers import uses_statistics
from .pairing import shared_weights
from .partial_run import PartialRun, by_depth

Batch = tuple[torch.Tensor, ...]


def reestimate_statistics(
    program: Program,
    batches: Iterable[Batch],
    only: set[fx.Node] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, list[str]]:
    """Give the BatchNorm nodes of `program` (those in `only`) new running statistics, in place.

    Returns how many, and the reasons for those left alone. `batches` is read once for each depth.
    """
    shared, norms, notes = shared_weights(program), [], []
    for norm in find(program, aten.batch_norm.default):
        if only is not None and norm not in only:
            continue
        reason = _obstacle(norm, shared)
        if reason is None:
            norms.append(norm)
        else:
            notes.append(f"{layer_name(norm)} left alone: {reason}")
    levels = by_depth(program, norms)
    for number, level in enumerate(levels, start=1):
        _estimate(program, level, batches)
        if progress:
            progress(number, len(levels))
    return len(norms), notes


def _obstacle(norm: fx.Node, shared: set[str]) -> str | None:
    if not uses_statistics(norm):
        return "it has no running statistics"
    names = {str(argument(norm, n).target) for n in ("running_mean", "running_var")}
    return "its statistics are shared with another layer" if names & shared else None


class _Sums:
    """Count, sum and sum of squares of one BatchNorm's input by channel, about its old mean."""

    def __init__(self, program: Program, norm: fx.Node) -> None:
        self.source = norm.all_input_nodes[0]
        self._mean, self._variance = (
            get_attribute(program.graph_module, str(argument(norm, n).target)) for n in ("running_mean", "running_var")
        )
        self._center = self._mean.double().clone()
        self._count = 0
        self._first, self._second = torch.zeros_like(self._center), torch.zeros_like(self._center)

    def add(self, x: torch.Tensor) -> None:
        """`x` [n, channels, space...]"""
        values = x.double().transpose(0, 1).flatten(1) - self._center[:, None]
        self._count += values.shape[1]
        self._first += values.sum(1)
        self._second += values.square().sum(1)

    def store(self) -> None:
        """Set the running mean and the (unbiased, as PyTorch keeps it) running variance."""
        if self._count < 2:  # one value has no variance
            return
        offset = self._first / self._count
        variance = (self._second - self._count * offset.square()).clamp_min(0) / (self._count - 1)
        self._mean.copy_(self._center + offset)
        self._variance.copy_(variance)


def _estimate(program: Program, norms: list[fx.Node], batches: Iterable[Batch]) -> None:
    sums = [_Sums(program, norm) for norm in norms]
    run = PartialRun(program, [s.source for s in sums])
    with torch.no_grad():
        for batch in batches:
            values = run(batch)
            for each in sums:
                each.add(values[each.source])
        for each in sums:
            each.store()
