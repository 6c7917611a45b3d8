"""Calibration by several processes: each observes its part of the data, then all hold what one would have seen.

The parts are consecutive batches, in the order of the processes, and observers merge in this order; so a rule that
depends on the order of the samples (the moving average) means the same as in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

from ...errors import DataError, QuantizationError
from ..base import Processes
from .ranges.states import state_of, with_state

Batch = TypeVar("Batch")
_SAMPLES = "samples"


def own_batches(batches: Iterable[Batch], processes: Processes | None) -> Iterable[Batch]:
    """The batches that this process observes. Data of unknown length are read once more, to count them.

    Raises DataError where there are fewer batches than processes.
    """
    if processes is None or processes.count == 1:
        return batches
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if count < processes.count:
        raise DataError(f"{count} batches for {processes.count} processes", hint="give smaller batches, or more")
    first, end = (count * rank // processes.count for rank in (processes.rank, processes.rank + 1))
    return itertools.islice(batches, first, end)


def merge_observed(observers: dict[str, Any], samples: int, processes: Processes | None) -> tuple[dict[str, Any], int]:
    """Observers, by the name of their site, that have seen what all processes have, and the number of samples."""
    if processes is None or processes.count == 1:
        return observers, samples
    told = processes.gather({_SAMPLES: samples, **{name: state_of(o) for name, o in observers.items()}})
    if any(state.keys() != told[0].keys() for state in told):
        raise QuantizationError(
            "the processes do not quantize the same tensors",
            hint="leave out what each measures for itself: placement, latency budgets",
        )
    merged = {}
    for name, observer in observers.items():
        first, *others = (with_state(observer, state[name]) for state in told)
        for other in others:
            first.merge(other)
        merged[name] = first
    return merged, sum(state[_SAMPLES] for state in told)
