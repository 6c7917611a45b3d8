"""Learning-rate schedules: the rate as a share of its peak, from how much of the training is done.

All but `Plateau` are functions of the position alone, so a resumed run needs nothing but its position to go on.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass

from ..errors import OptionError


@dataclass(frozen=True)
class Constant:
    """The peak rate to the end."""

    def factor(self, done: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Step:
    """Times `gamma` at each of `milestones`, which are shares of the whole training, warm-up included, in (0, 1)."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, (tuple, list)) or not all(0 < m < 1 for m in self.milestones):
            raise OptionError(f"milestones are {self.milestones}", hint="shares of the training: (0.5, 0.75)")
        require("gamma", self.gamma, 0 < self.gamma <= 1, "a factor in (0, 1]")

    def factor(self, done: float) -> float:
        return self.gamma ** sum(done >= m for m in self.milestones)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine down to the share `final` of the peak (Loshchilov and Hutter 2017, "SGDR", without restarts)."""

    final: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        require("final", self.final, 0 <= self.final <= 1, "a share of the peak rate in [0, 1]")

    def factor(self, done: float) -> float:
        return _cosine(1.0, self.final, done)


@dataclass(frozen=True)
class OneCycle:
    """Up from `start` to the peak in the first `rise` of the training, then down to `final`, by half cosines (Smith and
    Topin 2018, "Super-convergence"). The momentum stays as it is."""

    rise: float = 0.3
    start: float = 0.04
    final: float = 1e-4

    def __post_init__(self) -> None:
        check_numbers(self)
        require("rise", self.rise, 0 < self.rise < 1, "a share of the training in (0, 1)")
        for name in ("start", "final"):
            require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a share of the peak rate in [0, 1]")

    def factor(self, done: float) -> float:
        if done < self.rise:
            return _cosine(self.start, 1.0, done / self.rise)
        return _cosine(1.0, self.final, (done - self.rise) / (1 - self.rise))


@dataclass(frozen=True)
class Plateau:
    """Times `gamma` after `patience` epochs in a row without a better metric (without one: mean training loss)."""

    gamma: float = 0.1
    patience: int = 2

    def __post_init__(self) -> None:
        check_numbers(self)
        require("gamma", self.gamma, 0 < self.gamma < 1, "a factor in (0, 1)")
        require("patience", self.patience, self.patience >= 0, "a number of epochs")

    def factor(self, done: float) -> float:
        return 1.0

    def reduced(self, epochs_without_gain: int) -> bool:
        """Is the rate to fall after the last of so many epochs in a row without a better value?"""
        return epochs_without_gain > 0 and epochs_without_gain % (self.patience + 1) == 0


Schedule = Constant | Step | Cosine | OneCycle | Plateau


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def check_numbers(options: object) -> None:
    """Raise OptionError where a field that is annotated as a number holds something else."""
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        kind, _, rest = str(field.type).partition(" | ")
        value = getattr(options, field.name)
        if kind not in ("int", "float") or (value is None and rest == "None"):
            continue
        number = isinstance(value, numbers.Integral if kind == "int" else numbers.Real) and not isinstance(value, bool)
        require(field.name, value, number, "a whole number" if kind == "int" else "a number")


def require(name: str, value: object, holds: bool, what: str) -> None:
    """Raise OptionError unless `holds`."""
    if not holds:
        raise OptionError(f"{name} is {value!r}", hint=f"give {what}")
