"""AdaRound's relaxation: a weight may be rounded down or up, and gradients find which is better.

    w = s * clip(floor(w / s) + h(v))        h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

h starts at the fraction that rounding down leaves, so that the relaxed layer starts as the float one; a regularizer
that sharpens over time pushes it to 0 or 1 (Nagel et al. 2020, arXiv 2004.10568).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....frontend.operators import pixel_blocks

_LOW, _HIGH = -0.1, 1.1


@dataclass
class SoftWeight:
    """The weights of one layer on the way to integers: `v` is what is learned."""

    floor: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor  # of the weights' form, 1 along all dims but one
    limits: tuple[int, int]

    @property
    def share(self) -> torch.Tensor:
        """h(v): 0 for down, 1 for up."""
        return (torch.sigmoid(self.v) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)

    def value(self) -> torch.Tensor:
        """The relaxed weights, with gradients."""
        return (self.floor + self.share).clamp(*self.limits) * self.scales

    def integers(self) -> torch.Tensor:
        """The weights rounded as v says."""
        return (self.floor + (self.share >= 0.5)).clamp(*self.limits)

    def undecided(self, sharpness: float) -> torch.Tensor:
        """Sum of 1 - |2 h - 1|^sharpness: 0 when every weight is down or up."""
        return (1.0 - (2.0 * self.share - 1.0).abs().clamp_min(1e-9) ** sharpness).sum()


def soften(weight: torch.Tensor, scales: torch.Tensor, axis: int, limits: tuple[int, int]) -> SoftWeight:
    """The relaxation that starts at the float weights (where the scales can express them)."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    shaped = scales.reshape(shape).float()
    steps = weight.detach().float() / shaped
    floor = torch.floor(steps)
    share = (steps - floor).clamp(1e-4, 1 - 1e-4)
    v = -torch.log((_HIGH - _LOW) / (share - _LOW) - 1.0)
    return SoftWeight(floor, v.requires_grad_(True), shaped, limits)


def sharpness(done: float, warm_up: float) -> float:
    """The exponent of the regularizer, from 20 to 2 between the warm-up and the end (shares of the training)."""
    share = max(0.0, done - warm_up) / (1 - warm_up)
    return 2 + (20 - 2) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _quantize(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    """Integers as real numbers; the gradient passes through the rounding and stops at what saturates."""
    info = torch.iinfo(dtype)
    steps = (x / scale + zero_point).clamp(info.min, info.max)
    return steps + (steps.round() - steps).detach()


def _dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return (q.to(torch.float32) - zero_point) * scale


def differentiable() -> Mapping[Any, Callable[..., Any]]:
    """What to call in place of fxpress's operators where gradients are wanted."""
    ops = torch.ops.fxpress
    return {
        ops.quantize.default: _quantize,
        ops.dequantize.default: _dequantize,
        ops.pixel_blocks.default: pixel_blocks,
    }
