"""Latency of two models, measured against each other: runs interleave, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .session import Runnable


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds, and the median of the ratios first / second within each pair of runs."""

    first_ms: float
    second_ms: float
    ratio: float
    runs: int


def compare_latency(
    first: Runnable,
    second: Runnable,
    inputs: tuple[np.ndarray, ...],
    second_inputs: tuple[np.ndarray, ...] | None = None,
    *,
    seconds: float = 1.0,
    least: int = 11,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Run both in turns for about `seconds` (at least `least` pairs each, after a warm-up) on the same inputs.

    With `clock=time.thread_time` sessions of one thread are compared by the processor time that they take, which other
    processes on a busy machine disturb less.
    """
    others = inputs if second_inputs is None else second_inputs
    for _ in range(3):
        first.run(*inputs)
        second.run(*others)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < least or time.perf_counter() < end:
        # Whoever runs second finds warmer clocks and colder caches: take turns.
        if len(pairs) % 2:
            a, b = _time(first, inputs, clock), _time(second, others, clock)
        else:
            b, a = _time(second, others, clock), _time(first, inputs, clock)
        pairs.append((a, b))
    return Timing(
        first_ms=statistics.median(a for a, _ in pairs) * 1e3,
        second_ms=statistics.median(b for _, b in pairs) * 1e3,
        ratio=statistics.median(a / b for a, b in pairs),
        runs=len(pairs),
    )


def _time(session: Runnable, inputs: tuple[np.ndarray, ...], clock: Callable[[], float]) -> float:
    start = clock()
    session.run(*inputs)
    return clock() - start
