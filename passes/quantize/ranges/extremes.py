"""The smallest and largest values of the samples: over all of them, and on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Extremes:
    """`low`, `high`: of all values. `faded_low`, `faded_high`: sums of the samples' own, with weight (1 - decay) *
    decay^age in samples; divided by 1 - decay^count they are averages."""

    decay: float = 0.99
    low: float = math.inf
    high: float = -math.inf
    faded_low: float = 0.0
    faded_high: float = 0.0
    count: int = 0

    def add(self, lows: Sequence[float], highs: Sequence[float]) -> None:
        """Take in the smallest and the largest value of each of some samples."""
        self.low, self.high = min(self.low, *lows), max(self.high, *highs)
        for low, high in zip(lows, highs):
            self._append((1 - self.decay) * low, (1 - self.decay) * high, 1)

    def merge(self, other: Extremes) -> None:
        """Take in what another saw after this one."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._append(other.faded_low, other.faded_high, other.count)

    def averages(self) -> tuple[float, float]:
        """The averages of the samples' smallest and largest values, the latest counting most."""
        total = 1 - self.decay**self.count
        return self.faded_low / total, self.faded_high / total

    def _append(self, low: float, high: float, count: int) -> None:
        faded = self.decay**count
        self.faded_low, self.faded_high = self.faded_low * faded + low, self.faded_high * faded + high
        self.count += count
