"""Try a change on calibration samples and keep it only if it helps: what every accuracy pass is judged by.

The measure is the SQNR of the program's outputs against the float program, on samples that the change was not fitted
to.
A pass on a float program is judged by quantizing it, with and without the change, by the defaults of `quantize` but
for the rule of the ranges: that of the fewest samples, `minmax`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ....errors import DataError, QuantizationError
from ....frontend.batch_dim import batch_name, count_examples, some_examples
from ....frontend.program import Program
from ...base import Context
from ..passes import Quantize
from ..ranges.choose import mean_sqnr, program_outputs
from ..spec import Target

Batch = tuple[torch.Tensor, ...]
_EVERY = 4  # one sample in four is kept for judging


@dataclass(frozen=True)
class Samples:
    """Calibration samples to fit with, and others to judge by (the same, where there is but one batch)."""

    fit: list[Batch]
    judge: list[Batch]


@dataclass(frozen=True)
class Verdict:
    """SQNR in dB of the outputs without the change and with it."""

    without: float
    having: float

    @property
    def helps(self) -> bool:
        return self.having > self.without

    def told(self, what: str) -> str:
        """The figures, for people."""
        figures = f"SQNR of the outputs on held-out samples: {self.without:.2f} dB without, {self.having:.2f} dB with"
        return f"{what} ({figures})" if self.helps else f"left alone: {what} does not help ({figures})"


def split_samples(program: Program, calibration: Iterable[Batch] | None, fit: int, judge: int, who: str) -> Samples:
    """The first `fit` and `judge` samples, every fourth for judging; whole batches where the program's batch is fixed.

    Raises DataError where there are no data.
    """
    fitted, judged = _Taken(fit), _Taken(judge)
    parts = _batch_parts if batch_name(program.inputs) is None else functools.partial(_sample_parts, program)
    for to_judge, part in parts(calibration or ()):
        (judged if to_judge else fitted).take(part, count_examples(program.inputs, part))
        if fitted.full and judged.full:
            break
    if not fitted.batches and not judged.batches:
        raise DataError(f"{who} needs calibration data", hint="pass --data, or calibration=batches from Python")
    return Samples(fitted.batches or judged.batches, judged.batches or fitted.batches)


@dataclass
class _Taken:
    """Batches up to a number of samples."""

    wanted: int
    count: int = 0
    batches: list[Batch] = dataclasses.field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.count >= self.wanted

    def take(self, batch: Batch, size: int) -> None:
        if self.full or not size:
            return
        self.batches.append(batch)
        self.count += size


def _sample_parts(program: Program, calibration: Iterable[Batch]) -> Iterator[tuple[bool, Batch]]:
    seen = 0
    for batch in calibration:
        count = count_examples(program.inputs, batch)
        judged = (torch.arange(count) + seen) % _EVERY == _EVERY - 1
        seen += count
        for to_judge, mask in ((False, ~judged), (True, judged)):
            if mask.any():
                yield to_judge, some_examples(program.inputs, batch, mask)


def _batch_parts(calibration: Iterable[Batch]) -> Iterator[tuple[bool, Batch]]:
    for number, batch in enumerate(calibration):
        yield number % _EVERY == _EVERY - 1, batch


def judge_outputs(reference: Program, programs: Iterable[Program], batches: list[Batch]) -> list[float]:
    """SQNR in dB of the outputs of each program against the reference."""
    expected = [program_outputs(reference, batch) for batch in batches]
    return [mean_sqnr(expected, (program_outputs(p, batch) for batch in batches)) for p in programs]


def judge_quantized(before: Program, after: Program, samples: Samples, context: Context) -> Verdict:
    """Quantize two float programs that compute the same, and compare both with the first."""
    trials = [_quantized(p, samples, context) for p in (before, after)]
    return Verdict(*judge_outputs(before, trials, samples.judge))


def required_target(context: Context) -> Target:
    """The context's target. Raises QuantizationError where there is none."""
    if context.target is None:
        raise QuantizationError("quantization needs a target", hint="pass --target, for example ort-x86")
    return context.target


def _quantized(program: Program, samples: Samples, context: Context) -> Program:
    required_target(context)
    trial = program.copy(share_weights=True)
    quiet = dataclasses.replace(context, calibration=samples.fit, progress=None, results={}, wanted=frozenset())
    Quantize(ranges="minmax").run(trial, quiet)
    trial.graph_module.recompile()
    return trial
