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
_NONE = 1e-9  # seconds
_STEPS = 50  # of a clock, that a run has to take at least
_LOOK = 0.03  # seconds for which a clock is watched
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
    processes on a busy machine disturb less. Some machines account for it in ticks of milliseconds: where a run takes
    fewer than 50 steps of the clock, the clock on the wall decides.
    """
    others = inputs if second_inputs is None else second_inputs
    start, shortest = time.perf_counter(), float("inf")
    for _ in range(_WARM):
        runs = (_time(first, inputs, time.perf_counter), _time(second, others, time.perf_counter))
        shortest = min(shortest, *runs)
        if time.perf_counter() - start > _WARM_SECONDS:
            break
    if clock is not time.perf_counter and smallest_step(clock) * _STEPS > shortest:
        clock = time.perf_counter
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < least or time.perf_counter() < end:
        # Whoever runs second finds warmer clocks and colder caches: take turns.
        if len(pairs) % 2:
            b, a = _time(second, others, clock), _time(first, inputs, clock)
        else:
            a, b = _time(first, inputs, clock), _time(second, others, clock)
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


def smallest_step(clock: Callable[[], float]) -> float:
    """The smallest step, in seconds, by which a clock moves while it is watched; infinite for one that does not."""
    steps, last, end = [float("inf")], clock(), time.perf_counter() + _LOOK
    while len(steps) < _STEPS and time.perf_counter() < end:
        now = clock()
        if now > last:
            steps.append(now - last)
            last = now
    return min(steps)


def _time(session: Runnable, inputs: tuple[np.ndarray, ...], clock: Callable[[], float]) -> float:
    start = clock()
    session.run(*inputs)
    return max(clock() - start, _NONE)  # a ratio of nothing to nothing is no ratio
