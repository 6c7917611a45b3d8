"""A histogram that does not depend on the order in which values come: the dyadic grid.

Bins have the width 2^k and their edges at multiples of it. When the range outgrows the bins, k rises and neighbours are
added, so the counts depend only on which values came, and two histograms merge into the one that all values would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

_WHOLE, _PER_SAMPLE = 1 << 15, 1 << 13


@dataclass
class Histogram:
    """Counts on a dyadic grid of at most `bins` bins, and the smallest and largest value."""

    bins: int = 4096
    exponent: int | None = None  # bin width is 2^exponent
    first: int = 0  # index of the first bin: it covers [first, first + 1) * width
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    zeros: int = 0  # exact zeros are counted apart: after ReLU they are many, and they cost nothing
    low: float = math.inf
    high: float = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        """Count all values of `x`."""
        low, high = (float(v) for v in torch.aminmax(x))
        self.add(x.reshape(-1).float(), low, high)

    def add(self, values: torch.Tensor, low: float, high: float) -> None:
        """Count `values`, float32 [n]; `low` and `high` are the smallest and largest of all that they stand for."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._make_room(low, high)
        assert self.exponent is not None
        index = torch.floor(values * 2.0**-self.exponent).to(torch.int64).sub_(self.first)
        self.counts += torch.bincount(index, minlength=len(self.counts))
        zeros = values.numel() - int(torch.count_nonzero(values))
        self.zeros += zeros
        if zeros:
            self.counts[-self.first] -= zeros

    def merge(self, other: Histogram) -> None:
        """Take in what another histogram counted."""
        if other.exponent is None:
            return
        self._make_room(other.low, other.high)
        assert self.exponent is not None
        shifted = coarsened(other, max(self.exponent, other.exponent))
        self._coarsen_to(shifted.exponent or 0)
        self._cover(shifted.first, shifted.first + len(shifted.counts))
        start = shifted.first - self.first
        self.counts[start : start + len(shifted.counts)] += shifted.counts
        self.zeros += other.zeros
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(centers, counts) of the bins that hold something but exact zeros, float64."""
        assert self.exponent is not None
        index = torch.nonzero(self.counts).flatten()
        return (index.double() + self.first + 0.5) * 2.0**self.exponent, self.counts[index].double()

    def _make_room(self, low: float, high: float) -> None:
        """Choose the finest width for which the whole range, zero included, fits in the bins."""
        low, high = min(low, self.low, 0.0), max(high, self.high, 0.0)
        exponent = _finest_exponent(low, high, self.bins)
        self._coarsen_to(exponent if self.exponent is None else max(exponent, self.exponent))
        assert self.exponent is not None
        width = 2.0**self.exponent
        self._cover(math.floor(low / width), math.floor(high / width) + 1)

    def _coarsen_to(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        elif exponent > self.exponent:
            coarse = coarsened(self, exponent)
            self.exponent, self.first, self.counts = coarse.exponent, coarse.first, coarse.counts

    def _cover(self, first: int, end: int) -> None:
        """Let the bins cover [first, end)."""
        if len(self.counts) == 0:
            self.first = first
        before = max(0, self.first - first)
        after = max(0, end - (self.first + len(self.counts)))
        if before or after:
            self.counts = torch.nn.functional.pad(self.counts, (before, after))
            self.first -= before


def _finest_exponent(low: float, high: float, bins: int) -> int:
    """The smallest k for which [low, high] touches at most `bins` bins of width 2^k."""
    span = max(high - low, 2.0**-80)  # finer widths would leave float32
    exponent = math.floor(math.log2(span / bins)) - 1
    while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) + 1 > bins:
        exponent += 1
    return exponent


def coarsened(histogram: Histogram, exponent: int) -> Histogram:
    """The same counts in bins of width 2^exponent, which is at least the present width."""
    assert histogram.exponent is not None
    step = exponent - histogram.exponent
    if step == 0:
        return histogram
    first = histogram.first >> step
    index = (torch.arange(len(histogram.counts)) + histogram.first >> step) - first
    counts = torch.zeros(int(index[-1]) + 1 if len(index) else 0, dtype=torch.int64)
    counts.index_add_(0, index, histogram.counts)
    return Histogram(histogram.bins, exponent, first, counts, histogram.zeros, histogram.low, histogram.high)


def thinned(rows: torch.Tensor) -> torch.Tensor:
    """All values of samples [N, values] of up to 2^15 values, about 2^13 evenly spread ones of larger ones, as a flat
    float32 tensor.

    The step depends on the shape alone, so batching still does not matter. It shares no factor with the sizes, so that
    all channels and places are met.
    """
    step = -(-rows.shape[1] // _PER_SAMPLE) if rows.shape[1] > _WHOLE else 1
    while step > 1 and math.gcd(step, rows.shape[1]) > 1:
        step += 1
    return rows[:, ::step].reshape(-1).float()
