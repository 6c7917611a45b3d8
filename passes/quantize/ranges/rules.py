"""The range rules by name: each makes (low, high) of what calibration remembers of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ....errors import OptionError
from ..spec import NumberFormat
from .entropy import most_informative_range
from .extremes import Extremes
from .histogram import Histogram
from .percentile import DEFAULT_PERCENTILE, percentile_range
from .squared_error import best_range

Ranges = Literal["auto", "minmax", "moving-average", "percentile", "entropy", "mse"]


@dataclass
class Statistics:
    """What is remembered of a tensor; the histogram stays empty where no rule asks for it."""

    extremes: Extremes = field(default_factory=Extremes)
    histogram: Histogram = field(default_factory=Histogram)

    def merge(self, other: Statistics) -> None:
        """Take in what was remembered of samples that came later."""
        self.extremes.merge(other.extremes)
        self.histogram.merge(other.histogram)


# Rules that need no histogram: it is most of what observing costs.
_BY_EXTREMES = ("minmax", "moving-average")
RULES = (*_BY_EXTREMES, "percentile", "entropy", "mse")
# Among these `auto` chooses by measuring: each was the best on some network (docs/results.md).
CANDIDATES = ("minmax", "moving-average", "mse")


def needs_histogram(ranges: str) -> bool:
    """Does a rule (or "auto") read the histogram?"""
    return ranges not in _BY_EXTREMES


def range_of(statistics: Statistics, rule: str, form: NumberFormat, percentile: float) -> tuple[float, float]:
    """(low, high) by a rule's name."""
    extremes, histogram = statistics.extremes, statistics.histogram
    if rule == "minmax":
        return extremes.low, extremes.high
    if rule == "moving-average":
        return extremes.averages()
    if rule == "percentile":
        return percentile_range(histogram, percentile)
    if rule == "entropy":
        return most_informative_range(histogram, form)
    return best_range(histogram, form)


def check_rule(ranges: str, percentile: float | None) -> float:
    """The percentile to use. Raises OptionError for an unknown rule, and for a percentile without effect or meaning."""
    if ranges != "auto" and ranges not in RULES:
        raise OptionError(f"unknown range rule {ranges!r}", hint=f"choose one of auto, {', '.join(RULES)}")
    if percentile is None:
        return DEFAULT_PERCENTILE
    if ranges != "percentile":
        raise OptionError(f"percentile has no effect with ranges={ranges}", hint="write ranges=percentile")
    if not 50 < percentile <= 100:
        raise OptionError(f"percentile is {percentile}", hint="give more than 50 and at most 100, such as 99.99")
    return percentile
