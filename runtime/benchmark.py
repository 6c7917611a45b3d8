"""Latency of two models, measured against each other: runs interleave, so that a busy machine slows both alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..frontend.program import Program
from .feed import example_tensors, take
from .session import Runnable

_DEVIATIONS = 1.96  # of a normal distribution: 95 %
_TRIES = 20  # pairs run for each that is needed, before a clock is given up
_WARM, _WARM_SECONDS = 3, 0.2  # pairs run before: the first prepares memory, more are for what caches learn


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds, and the median of the ratios first / second within each pair of runs.

    `low` to `high`: where that median lies with 95 % confidence, whatever the distribution of the ratios.
    """

    first_ms: float
    second_ms: float
    ratio: float
    runs: int
    low: float = 0.0
    high: float = float("inf")


def compare_latency(
    first: Runnable,
    second: Runnable,
    inputs: tuple[np.ndarray, ...],
    second_inputs: tuple[np.ndarray, ...] | None = None,
    *,
    seconds: float = 1.0,
    least: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Run both in turns for about `seconds` (at least `least` pairs each, after a warm-up) on the same inputs.

    With `clock=time.thread_time` sessions of one thread are compared by the processor time that they take, which other
    processes on a busy machine disturb less. Pairs for which such a clock stood still (virtual machines account for
    time in ticks) are left out, and where it hardly ever moves, the clock on the wall decides.
    """
    others = inputs if second_inputs is None else second_inputs
    start = time.perf_counter()
    for _ in range(_WARM):
        first.run(*inputs)
        second.run(*others)
        if time.perf_counter() - start > _WARM_SECONDS:
            break
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    tried = 0
    while len(pairs) < least or time.perf_counter() < end:
        if tried > _TRIES * least and len(pairs) < least:
            return compare_latency(first, second, inputs, second_inputs, seconds=seconds, least=least)
        tried += 1
        # Whoever runs second finds warmer clocks and colder caches: take turns.
        if tried % 2:
            a, b = _time(first, inputs, clock), _time(second, others, clock)
        else:
            b, a = _time(second, others, clock), _time(first, inputs, clock)
        if a > 0 and b > 0:
            pairs.append((a, b))
    low, high = median_interval([a / b for a, b in pairs])
    return Timing(
        first_ms=statistics.median(a for a, _ in pairs) * 1e3,
        second_ms=statistics.median(b for _, b in pairs) * 1e3,
        ratio=statistics.median(a / b for a, b in pairs),
        runs=len(pairs),
        low=low,
        high=high,
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what `values` were drawn from lies with 95 % confidence, from their order alone.

    The number of values below the median is binomial: the bounds are the values 0.98 sqrt(n) places to either side.
    """
    ordered, n = sorted(values), len(values)
    reach = _DEVIATIONS * math.sqrt(n) / 2
    first, last = math.floor((n - 1) / 2 - reach), math.ceil((n - 1) / 2 + reach)
    return ordered[max(first, 0)], ordered[min(last, n - 1)]


def compare_on_example(
    first: Runnable, second: Runnable, program: Program, threads: int = 1, seconds: float = 1.0
) -> Timing:
    """Both on the same single example of `program` (on the whole example batch where the batch is fixed).

    One thread is judged by the processor time that it takes: what else runs on the machine is no part of the model.
    """
    single = tuple(x.contiguous().numpy() for x in take(program, example_tensors(program), 1))
    clock = time.thread_time if threads == 1 else time.perf_counter
    return compare_latency(first, second, single, seconds=seconds, clock=clock)


def _time(session: Runnable, inputs: tuple[np.ndarray, ...], clock: Callable[[], float]) -> float:
    start = clock()
    session.run(*inputs)
    return clock() - start
