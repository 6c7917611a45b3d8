"""An observer for each channel of a tensor, for formats with a scale per channel; and the choice between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ....errors import QuantizationError
from ..spec import NumberFormat
from .observers import Observer, RangeObserver, make_observer
from .rules import check_rule

CHANNEL = 1  # [N, C, ...]


@dataclass(frozen=True)
class ChannelParams:
    """`scales` float32 [C] and `zero_points` int64 [C] along dim `axis` of a tensor."""

    scales: torch.Tensor
    zero_points: torch.Tensor
    dtype: torch.dtype
    axis: int = CHANNEL


@dataclass
class ChannelObserver:
    """One observer per index of dim 1 of a batch [N, C, ...]; the laws of observers hold for each."""

    ranges: str = "mse"
    percentile: float | None = None
    channels: list[RangeObserver] = field(default_factory=list)

    def observe(self, x: torch.Tensor, samples: int | None = None) -> None:
        """Take in a batch. Raises QuantizationError where the channels are not those seen before."""
        if x.ndim < 2:
            raise QuantizationError(f"a tensor of shape {list(x.shape)} has no channels", hint="use a scale per tensor")
        if not self.channels:
            self.channels = [make_observer(self.ranges, self.percentile) for _ in range(x.shape[CHANNEL])]
        if len(self.channels) != x.shape[CHANNEL]:
            raise QuantizationError(f"a tensor had {len(self.channels)} channels and now has {x.shape[CHANNEL]}")
        for channel, observer in enumerate(self.channels):
            observer.observe(x.select(CHANNEL, channel), samples)

    def merge(self, other: ChannelObserver) -> None:
        """Take in what another saw after this one."""
        if not self.channels:
            self.channels = [make_observer(self.ranges, self.percentile) for _ in other.channels]
        for mine, others in zip(self.channels, other.channels, strict=True):
            mine.merge(others)

    def params(self, form: NumberFormat) -> Any:
        """Scales and zero points of all channels: ChannelParams."""
        if not self.channels:
            raise QuantizationError(
                "a tensor was never observed", hint="give calibration data that reaches every part of the model"
            )
        each = [observer.params(form) for observer in self.channels]
        scales = torch.tensor([p.scale for p in each], dtype=torch.float32)
        return ChannelParams(scales, torch.tensor([p.zero_point for p in each]), form.dtype)


@dataclass(frozen=True)
class RangeChoice:
    """How ranges are found: a rule by name or "auto", its percentile, the number format that is not told otherwise.

    Raises OptionError for an unknown rule, and for a percentile that has no effect.
    """

    ranges: str
    percentile: float | None = None
    form: NumberFormat | None = None

    def __post_init__(self) -> None:
        check_rule(self.ranges, self.percentile)

    def observer(self, form: NumberFormat | None = None) -> Observer:
        """A fresh observer for a tensor of number format `form` (the usual one where None)."""
        used = form or self.form
        if used is not None and used.per_channel:
            return ChannelObserver(self.ranges, self.percentile)
        return make_observer(self.ranges, self.percentile)
