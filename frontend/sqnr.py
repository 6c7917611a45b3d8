"""How close values are to what they should be: the signal-to-quantization-noise ratio, summed over batches.

    SQNR = 10 log10(sum of reference^2 / sum of (reference - value)^2)    in dB
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

LIMIT_DB = 200.0  # of size: equal values would have infinitely many, which JSON has no number for


@dataclass
class Sqnr:
    """Sums of squares, in float64, of references and of what differs from them."""

    signal: float = 0.0
    error: float = 0.0
    seen: bool = False

    def add(self, reference: Any, value: Any) -> None:
        """Take in tensors or arrays of as many values."""
        reference, value = (torch.as_tensor(v).double() for v in (reference, value))
        self.signal += float(reference.square().sum())
        self.error += float((reference - value.reshape(reference.shape)).square().sum())
        self.seen = True

    @property
    def decibel(self) -> float | None:
        """Within +-200; None where nothing was compared."""
        if not self.seen:
            return None
        if self.error == 0:
            return LIMIT_DB
        if self.signal == 0:
            return -LIMIT_DB
        return min(max(10 * math.log10(self.signal / self.error), -LIMIT_DB), LIMIT_DB)
