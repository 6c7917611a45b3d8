"""How much each quantized weight and activation costs, measured at the program's outputs.

For every point (see `points`) two questions, answered on a few calibration samples without labels:

    alone      SQNR of the outputs when only this point is quantized
    without    SQNR of the outputs when every other point is quantized (asked for the worst points only)

`noise` is error power over signal power of the outputs with only this point quantized. Rounding errors of different
points are nearly uncorrelated, so the noise of a set is close to the sum over its points; that is what the search for a
float fallback ranks by (its judgement is the user's metric, never this sum).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .points import Switchboard

SILENT = 1e-20  # noise below -200 dB is none
_WORST = 16
_LOUDEST = 1e20


@dataclass(frozen=True)
class Sensitivity:
    """One point. `macs`: of the operations that must be in float for it to vanish (MACs of one example). SQNR in dB,
    within +-200; `without_db` is None where it was not asked. `noise` as above, at most 1e20."""

    name: str
    kind: Literal["weights", "activation"]
    operations: frozenset[str]
    macs: int
    noise: float
    alone_db: float
    without_db: float | None = None


def measure_sensitivity(
    board: Switchboard, batches: Sequence[tuple[torch.Tensor, ...]], macs: dict[str, int], worst: int = _WORST
) -> list[Sensitivity]:
    """One row for each point, the worst first.

    `batches` are flat inputs; memory is that of all activations of one batch, twice. `macs` are the MACs of the float
    program's nodes by name.
    """
    everything = range(len(board.points))
    alone = _noises(board, batches, (), everything)
    order = sorted(everything, key=lambda i: -alone[i])
    without = _noises(board, batches, everything, order[:worst])
    return [
        Sensitivity(
            name=board.points[i].name,
            kind=board.points[i].kind,
            operations=board.points[i].operations,
            macs=sum(macs.get(o, 0) for o in board.points[i].operations),
            noise=alone[i],
            alone_db=decibel(alone[i]),
            without_db=decibel(without[i]) if i in without else None,
        )
        for i in order
    ]


def _noises(
    board: Switchboard, batches: Sequence[tuple[torch.Tensor, ...]], base: Collection[int], flipped: Collection[int]
) -> dict[int, float]:
    """The noise when the points `base` are on and one of `flipped` is the other way round, for each of them."""
    sums = {i: _Noise() for i in flipped}
    for batch in batches:
        exact = board.values(batch, ())
        expected = board.result(exact)
        values = board.values(batch, base) if base else exact
        for i, noise in sums.items():
            on = set(base) ^ {i}
            noise.add(expected, board.outputs(values, on, {i}))
    return {i: noise.value for i, noise in sums.items()}


class _Noise:
    """Error and signal power of each output, over all batches."""

    def __init__(self) -> None:
        self.error: list[float] = []
        self.signal: list[float] = []

    def add(self, expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> None:
        errors = [float((e.double() - g.double()).square().sum()) for e, g in zip(expected, got)]
        signals = [float(e.double().square().sum()) for e in expected]
        self.error = [a + b for a, b in zip(self.error or [0.0] * len(errors), errors)]
        self.signal = [a + b for a, b in zip(self.signal or [0.0] * len(signals), signals)]

    @property
    def value(self) -> float:
        """The mean over the outputs of error over signal."""
        shares = [e / max(s, 1e-30) for e, s in zip(self.error, self.signal)]
        mean = sum(shares) / len(shares) if shares else 0.0
        return min(mean, _LOUDEST) if math.isfinite(mean) else _LOUDEST


def decibel(noise: float) -> float:
    """Noise as SQNR in dB, within +-200."""
    return -10 * math.log10(min(max(noise, SILENT), _LOUDEST))
