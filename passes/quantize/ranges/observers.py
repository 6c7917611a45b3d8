"""Observers: what is remembered of a tensor's values during calibration.

Laws (tested as properties): memory does not grow with the number of samples; the result does not depend on how the
samples were batched; `a.merge(b)` is what one observer would hold that saw the samples of a, then those of b.

`MinMax`          smallest and largest value.
`MovingAverage`   of each sample's smallest and largest value, decaying per sample (not per batch), bias-corrected.
`Candidates`      all of them side by side, of which one is chosen later by measuring.
`Histogram`       counts on a dyadic grid: bin width 2^k, edges at multiples of it. When the range outgrows the bins, k
                  rises and neighbours are added, so the counts depend only on which values came, not on their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ....errors import OptionError, QuantizationError
from ..spec import NumberFormat, QuantParams, choose_params


class Observer(Protocol):
    """What calibration needs of an observer."""

    def observe(self, x: torch.Tensor) -> None:
        """Take in a batch [N, ...] of samples."""

    def merge(self, other: Any) -> None:
        """Take in what another observer of the same kind saw after this one."""

    def params(self, form: NumberFormat) -> QuantParams:
        """Scale and zero point for the values seen."""


@dataclass
class MinMax:
    """Range = smallest to largest value seen."""

    low: float = math.inf
    high: float = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def merge(self, other: MinMax) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def params(self, form: NumberFormat) -> QuantParams:
        _require(self.low <= self.high)
        return choose_params(self.low, self.high, form)


@dataclass
class MovingAverage:
    """Range = exponential average of the samples' own ranges: weight (1 - decay) * decay^age, normalized to sum 1."""

    decay: float = 0.99
    low: float = 0.0
    high: float = 0.0
    count: int = 0

    def observe(self, x: torch.Tensor) -> None:
        flat = x.reshape(x.shape[0], -1) if x.ndim else x.reshape(1, 1)
        lows, highs = (v.double() for v in torch.aminmax(flat, dim=1))
        ages = torch.arange(len(flat) - 1, -1, -1, dtype=torch.float64)
        weights = (1 - self.decay) * self.decay**ages
        self._append(float(lows @ weights), float(highs @ weights), len(flat))

    def merge(self, other: MovingAverage) -> None:
        self._append(other.low, other.high, other.count)

    def _append(self, low: float, high: float, count: int) -> None:
        faded = self.decay**count
        self.low, self.high = self.low * faded + low, self.high * faded + high
        self.count += count

    def params(self, form: NumberFormat) -> QuantParams:
        _require(self.count > 0)
        total = 1 - self.decay**self.count
        return choose_params(self.low / total, self.high / total, form)


@dataclass
class Histogram:
    """Counts on a dyadic grid, and the range of least squared quantization error over them."""

    bins: int = 4096
    exponent: int | None = None  # bin width is 2^exponent
    first: int = 0  # index of the first bin: it covers [first, first + 1) * width
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    zeros: int = 0  # exact zeros are counted apart: after ReLU they are many, and they cost nothing
    low: float = math.inf
    high: float = -math.inf

    def observe(self, x: torch.Tensor) -> None:
        low, high = (float(v) for v in torch.aminmax(x))
        _require(math.isfinite(low) and math.isfinite(high), "calibration met NaN or infinity in an activation")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._make_room(low, high)
        assert self.exponent is not None
        x = _thinned(x)
        index = torch.floor(x * 2.0**-self.exponent).to(torch.int64) - self.first
        self.counts += torch.bincount(index, minlength=len(self.counts))
        zeros = x.numel() - int(torch.count_nonzero(x))
        self.zeros += zeros
        if zeros:
            self.counts[-self.first] -= zeros

    def merge(self, other: Histogram) -> None:
        if other.exponent is None:
            return
        self._make_room(other.low, other.high)
        assert self.exponent is not None
        shifted = _coarsen(other, max(self.exponent, other.exponent))
        self._coarsen_to(shifted.exponent or 0)
        self._cover(shifted.first, shifted.first + len(shifted.counts))
        start = shifted.first - self.first
        self.counts[start : start + len(shifted.counts)] += shifted.counts
        self.zeros += other.zeros
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def params(self, form: NumberFormat) -> QuantParams:
        _require(self.exponent is not None)
        low, high = best_range(self, form)
        return choose_params(low, high, form)

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
            coarse = _coarsen(self, exponent)
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


_PER_SAMPLE = 1 << 15


def _thinned(x: torch.Tensor) -> torch.Tensor:
    """At most about 2^15 values of each sample [N, ...], evenly spread, as a flat float32 tensor.

    The step depends on the shape alone, so batching still does not matter. It shares no factor with the sizes, so that
    all channels and places are met. (The smallest and largest value are taken from all values.)
    """
    flat = x.reshape(x.shape[0], -1) if x.ndim else x.reshape(1, 1)
    step = -(-flat.shape[1] // _PER_SAMPLE)
    while step > 1 and math.gcd(step, flat.shape[1]) > 1:
        step += 1
    return flat[:, ::step].reshape(-1).float()


def _finest_exponent(low: float, high: float, bins: int) -> int:
    """The smallest k for which [low, high] touches at most `bins` bins of width 2^k."""
    span = max(high - low, 2.0**-80)  # finer widths would leave float32
    exponent = math.floor(math.log2(span / bins)) - 1
    while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) + 1 > bins:
        exponent += 1
    return exponent


def _coarsen(histogram: Histogram, exponent: int) -> Histogram:
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


# -- the range of least squared error ------------------------------------------------------------------------------

_SHRINK = torch.linspace(1.0, 0.3, 71, dtype=torch.float64)


def best_range(histogram: Histogram, form: NumberFormat) -> tuple[float, float]:
    """The (low, high) whose quantization has the least squared error over the histogram.

    Clipping a rare large value costs it some error, and buys all others finer steps (Sung et al. 2015; Banner et al.
    2019). Both ends are searched in turn, on a grid of shares of the observed range, until neither moves.
    """
    assert histogram.exponent is not None
    width = 2.0**histogram.exponent
    filled = torch.nonzero(histogram.counts).flatten()
    centers = (filled.double() + histogram.first + 0.5) * width
    counts = histogram.counts[filled].double()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if len(filled) == 0 or form.symmetric:
        return _best_symmetric(centers, counts, max(-low, high), form) if len(filled) else (low, high)
    ends = (low, high)
    for _ in range(4):
        highs = _SHRINK * high
        new_high = float(highs[_errors(centers, counts, torch.full_like(highs, ends[0]), highs, form).argmin()])
        lows = _SHRINK * low
        new_low = float(lows[_errors(centers, counts, lows, torch.full_like(lows, new_high), form).argmin()])
        if (new_low, new_high) == ends:
            break
        ends = (new_low, new_high)
    return ends


def _best_symmetric(
    centers: torch.Tensor, counts: torch.Tensor, bound: float, form: NumberFormat
) -> tuple[float, float]:
    bounds = _SHRINK * bound
    best = float(bounds[_errors(centers, counts, -bounds, bounds, form).argmin()])
    return -best, best


def _errors(
    centers: torch.Tensor, counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor, form: NumberFormat
) -> torch.Tensor:
    """Squared error for each candidate range."""
    qmin, qmax = form.limits
    if form.symmetric:
        scale = (torch.maximum(-lows, highs) / qmax).clamp_min(1e-300)[:, None]
        zero = torch.zeros_like(scale)
    else:
        scale = ((highs - lows) / (qmax - qmin)).clamp_min(1e-300)[:, None]
        zero = torch.round(qmin - lows[:, None] / scale).clamp(qmin, qmax)
    steps = torch.clamp(torch.round(centers / scale) + zero, qmin, qmax)
    return (((steps - zero) * scale - centers) ** 2 * counts).sum(1)


def best_bounds(rows: torch.Tensor, form: NumberFormat, candidates: int = 21) -> torch.Tensor:
    """For each row, the symmetric bound of least squared error among shares 1.0 to 0.6 of its largest value."""
    rows = rows.float()
    largest = rows.abs().amax(1)
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for share in torch.linspace(1.0, 0.6, candidates):
        scale = (largest * share / form.limits[1]).clamp_min(2.0**-100)[:, None]
        error = ((torch.round(rows / scale).clamp(*form.limits) * scale - rows) ** 2).sum(1)
        better = error < least
        best, least = torch.where(better, largest * share, best), torch.where(better, error, least)
    return best


OBSERVERS: dict[str, type[MinMax] | type[MovingAverage] | type[Histogram]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "mse": Histogram,
}


@dataclass
class Candidates:
    """One observer of each kind side by side; `chosen` names the one that counts."""

    observers: dict[str, Observer] = field(default_factory=lambda: {name: make() for name, make in OBSERVERS.items()})
    chosen: str = "mse"

    def observe(self, x: torch.Tensor) -> None:
        for observer in self.observers.values():
            observer.observe(x)

    def merge(self, other: Candidates) -> None:
        for name, observer in self.observers.items():
            observer.merge(other.observers[name])

    def params(self, form: NumberFormat) -> QuantParams:
        return self.observers[self.chosen].params(form)


def make_observer(ranges: str) -> Observer:
    """A fresh observer by the name of its range rule. Raises OptionError for an unknown name."""
    if ranges == "auto":
        return Candidates()
    if ranges not in OBSERVERS:
        raise OptionError(f"unknown range rule {ranges!r}", hint=f"choose one of auto, {', '.join(OBSERVERS)}")
    return OBSERVERS[ranges]()


def _require(condition: bool, message: str = "a tensor was never observed") -> None:
    if not condition:
        raise QuantizationError(message, hint="give calibration data that reaches every part of the model")
