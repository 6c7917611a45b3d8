"""The range that loses the least information: entropy calibration (Migacz, "8-bit Inference with TensorRT", GTC 2017).

For each candidate threshold, P is the distribution of the values within it, those beyond counted at its edge, and Q is
P's own distribution without them, told apart only as finely as the quantized levels are: the mass of each level spread
evenly over those of its bins that hold anything. The threshold of least KL(P || Q) = sum P log(P / Q) is taken.

Migacz quantizes symmetrically. Here both ends of an affine range are multiplied by the same share, which is the same
for tensors of one sign (after ReLU). Exact zeros, which every range stores exactly, take no part.
"""

from __future__ import annotations

import torch

from ..spec import NumberFormat
from .histogram import Histogram

_SHARES = tuple(0.96**i for i in range(76))  # 1 down to 0.047
_SMALL = 1e-4  # of the mean: what no bin of Q falls below, so that the divergence stays finite


def most_informative_range(histogram: Histogram, form: NumberFormat) -> tuple[float, float]:
    """The (low, high) of least divergence. The whole range where the format has as many levels as there are bins."""
    assert histogram.exponent is not None
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if form.symmetric:
        low, high = -max(-low, high), max(-low, high)
    levels = form.limits[1] - form.limits[0] + 1
    centers, counts = histogram.filled()
    width = 2.0**histogram.exponent
    best, least = 1.0, float("inf")
    for share in _SHARES if len(centers) else ():
        if (high - low) * share < levels * width:
            break  # no level holds more than one bin: nothing more would be seen to be lost
        divergence = _divergence(centers, counts, low * share, high * share, levels)
        if divergence < least:
            best, least = share, divergence
    return low * best, high * best


def _divergence(centers: torch.Tensor, counts: torch.Tensor, low: float, high: float, levels: int) -> float:
    """KL(P || Q) of quantizing to `levels` levels on [low, high]; infinite where nothing is inside."""
    inside = (centers >= low) & (centers <= high)
    kept = counts[inside]
    if not len(kept):
        return float("inf")
    reference = kept.clone()
    reference[0] += counts[centers < low].sum()
    reference[-1] += counts[centers > high].sum()
    level = ((centers[inside] - low) * (levels / (high - low))).long().clamp_(0, levels - 1)
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, torch.ones_like(kept))
    spread = (mass / bins.clamp_min(1))[level]
    p, q = reference / reference.sum(), (spread / spread.sum()).clamp_min(_SMALL / len(kept))
    return float((p * torch.log(p / q)).sum())
