"""Observers: what is remembered of a tensor's values during calibration.

Laws (tested as properties): memory does not grow with the number of samples; the result does not depend on how the
samples were batched; `a.merge(b)` is what one observer would hold that saw the samples of a, then those of b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ....errors import QuantizationError
from ..spec import NumberFormat, QuantParams, choose_params
from .histogram import thinned
from .percentile import DEFAULT_PERCENTILE
from .rules import Statistics, check_rule, needs_histogram, range_of

_LONG = 1 << 14  # values of a row for which a call of its own is no cost


class Observer(Protocol):
    """What calibration needs of an observer."""

    def observe(self, x: torch.Tensor, samples: int | None = None) -> None:
        """Take in a batch [N, ...]; `samples`, N where not given, is how many samples are in its first dim."""

    def merge(self, other: Any) -> None:
        """Take in what another observer of the same kind saw after this one."""

    def params(self, form: NumberFormat) -> QuantParams:
        """Scale and zero point for the values seen."""


@dataclass
class RangeObserver:
    """Remembers what one rule, by its name, needs to choose a range."""

    rule: str = "mse"
    percentile: float = DEFAULT_PERCENTILE
    statistics: Statistics = field(default_factory=Statistics)
    _chosen: dict[tuple[str, NumberFormat], QuantParams] = field(default_factory=dict, repr=False)

    def observe(self, x: torch.Tensor, samples: int | None = None) -> None:
        if not x.numel():
            return
        rows = sample_rows(x, samples)
        lows, highs = _extremes_of(rows)
        if not all(map(math.isfinite, (*lows, *highs))):
            raise QuantizationError(
                "calibration met NaN or infinity in an activation", hint="look for overflow in model and data"
            )
        self.statistics.extremes.add(lows, highs)
        if self._keeps_histogram():
            self.statistics.histogram.add(thinned(rows), min(lows), max(highs))
        self._chosen.clear()

    def merge(self, other: RangeObserver) -> None:
        self.statistics.merge(other.statistics)
        self._chosen.clear()

    def params(self, form: NumberFormat) -> QuantParams:
        if not self.statistics.extremes.count:
            raise QuantizationError(
                "a tensor was never observed", hint="give calibration data that reaches every part of the model"
            )
        key = (self._rule_used(), form)
        if key not in self._chosen:
            self._chosen[key] = choose_params(*range_of(self.statistics, key[0], form, self.percentile), form)
        return self._chosen[key]

    def _rule_used(self) -> str:
        return self.rule

    def _keeps_histogram(self) -> bool:
        return needs_histogram(self.rule)


@dataclass
class Candidates(RangeObserver):
    """Remembers what every rule needs; `chosen` names the one that counts."""

    chosen: str = "mse"

    def _rule_used(self) -> str:
        return self.chosen

    def _keeps_histogram(self) -> bool:
        return True


def _extremes_of(rows: torch.Tensor) -> tuple[list[float], list[float]]:
    """The smallest and the largest value of each row."""
    if rows.shape[1] < _LONG:
        return rows.amin(1).tolist(), rows.amax(1).tolist()
    # Of a whole tensor PyTorch finds both at once.
    pairs = [torch.aminmax(row) for row in rows]
    return [float(p.min) for p in pairs], [float(p.max) for p in pairs]


def sample_rows(x: torch.Tensor, samples: int | None = None) -> torch.Tensor:
    """A batch as [samples, values]. A tensor whose first dim holds no whole number of rows for each sample counts as
    one sample. Values come in the order in which they lie in memory, which saves a copy."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    rows = x.shape[0] if x.ndim else 1
    count = rows if samples is None else samples
    return x.reshape(count if count and rows % count == 0 else 1, -1)


def make_observer(ranges: str, percentile: float | None = None) -> RangeObserver:
    """A fresh observer by the name of its range rule; `percentile` in percent, for the rules that have one.

    Raises OptionError for an unknown name, and for a percentile that has no effect.
    """
    used = check_rule(ranges, percentile)
    return Candidates(percentile=used) if ranges == "auto" else RangeObserver(ranges, used)
