"""The range of least squared quantization error.

Clipping a rare large value costs it some error, and buys all others finer steps (Sung et al. 2015; Banner et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..spec import NumberFormat
from .histogram import Histogram

_SHARES = torch.cat([torch.linspace(1.0, 0.3, 15), 0.3 * 0.75 ** torch.arange(1, 13)]).double()
_FINE = torch.linspace(-0.04, 0.04, 9).double()


def best_range(histogram: Histogram, form: NumberFormat) -> tuple[float, float]:
    """The (low, high) whose quantization has the least squared error over the histogram.

    Both ends are searched in turn, among shares of the observed range, coarsely and then finely, until neither moves.
    """
    centers, counts = histogram.filled()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if not len(centers):
        return low, high
    if form.symmetric:
        bound = max(-low, high)
        best = _search(bound, lambda ends: _errors(centers, counts, -ends, ends, form))
        return -best, best
    ends = (low, high)
    for _ in range(4):
        new_high = _search(high, lambda h: _errors(centers, counts, torch.full_like(h, ends[0]), h, form))  # noqa: B023
        new_low = _search(low, lambda b: _errors(centers, counts, b, torch.full_like(b, new_high), form))  # noqa: B023
        if (new_low, new_high) == ends:
            break
        ends = (new_low, new_high)
    return ends


def _search(end: float, errors: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The share of `end` with the least error, to a hundredth of `end` (less, where the share is small)."""
    if end == 0:
        return end
    coarse = float(_SHARES[errors(_SHARES * end).argmin()])
    shares = (coarse + _FINE * min(1.0, coarse / 0.3)).clamp_max(1.0)
    return float(shares[errors(shares * end).argmin()]) * end


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
    steps = torch.round(centers / scale).add_(zero).clamp_(qmin, qmax)
    return steps.sub_(zero).mul_(scale).sub_(centers).square_() @ counts


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
