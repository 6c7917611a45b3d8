"""One placement, made and timed as a whole model: how much faster than float it is, and how faithful."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..backends.onnx.lower import lower
from ..errors import QuantizationError
from ..frontend.program import Program
from ..frontend.sqnr import LIMIT_DB, Sqnr
from ..passes.base import Context, Pass
from ..passes.manager import PassManager
from ..passes.quantize.passes import Annotate, Quantize
from ..passes.quantize.placement.trials import with_options
from .benchmark import Timing, compare_on_example
from .feed import examples
from .session import Session, make_session

_AGAIN = 3


@dataclass(frozen=True)
class Placement:
    """What stays in float and which forms are on; `integers` are the nodes that are on integers then.

    All in float where `integers` is empty: such a model is made without quantizing at all.
    """

    name: str
    keep_float: tuple[str, ...]
    forms: tuple[str, ...]
    integers: frozenset[str]


@dataclass(frozen=True)
class Trial:
    """A placement as it was measured: speed over float with its 95 % interval, milliseconds, SQNR of the outputs."""

    placement: Placement
    speed: float
    low: float
    high: float
    milliseconds: float
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.placement.name}: {self.speed:.2f}x, {self.sqnr_db:.1f} dB"


@dataclass
class TrialBench:
    """Makes and times placements of one program.

    `passes` are those from quantization on. Ranges and weights do not change what kernels do, so they are found in the
    cheapest way here, from `samples`, and passes that only move values are left out.
    """

    program: Program
    passes: Sequence[Pass]
    context: Context
    samples: tuple[torch.Tensor, ...]
    threads: int = 1
    seconds: float = 1.0
    _expected: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    _float: Session | None = None

    def quick(self, placement: Placement) -> list[Pass]:
        """The passes of a trial."""
        kept = [p for p in placed(self.passes, placement) if _moves_kernels(p)]
        return with_options(kept, {"ranges": "minmax", "weights": "minmax"})

    def measure(self, placement: Placement) -> Trial:
        """Quantize, load, compare with float. Raises QuantizationError where nothing is on integers."""
        session = make_session(self.compiled(placement), threads=self.threads)
        timing = self.time(session)
        return Trial(
            placement, timing.ratio, timing.low, timing.high, timing.second_ms, self._sqnr(session)
        )

    def again(self, trial: Trial) -> Trial:
        """The same with fresh sessions, several times: where tensors lie in memory moves a model by some per cent. The
        medians of the figures are taken; `low` and `high` reach from the slowest session to the fastest."""
        model = self.compiled(trial.placement)
        timings = [self.time(make_session(model, threads=self.threads)) for _ in range(_AGAIN)]
        middle = {
            name: statistics.median(getattr(t, name) for t in timings) for name in ("ratio", "low", "high", "second_ms")
        }
        return dataclasses.replace(
            trial,
            speed=middle["ratio"],
            low=min(middle["low"], *(t.ratio for t in timings)),
            high=max(middle["high"], *(t.ratio for t in timings)),
            milliseconds=middle["second_ms"],
        )

    def compiled(self, placement: Placement) -> bytes:
        """The placement as ONNX."""
        context = dataclasses.replace(self.context, calibration=[self.samples], results={}, progress=None)
        passes = self.quick(placement) if placement.integers else []
        return lower(PassManager(passes, check_numbers=False).run(self.program, context)).SerializeToString()

    def time(self, session: Session) -> Timing:
        """Float and `session` in turns on one example."""
        return compare_on_example(self.floating, session, self.program, self.threads, self.seconds)

    @property
    def floating(self) -> Session:
        """The program as it is, in float."""
        if self._float is None:
            self._float = make_session(lower(self.program).SerializeToString(), threads=self.threads)
        return self._float

    def _sqnr(self, session: Session) -> float:
        batches = [tuple(x.numpy() for x in e) for e in examples(self.program, self.samples)]
        if not self._expected:
            self._expected = [self.floating.run(*b) for b in batches]
        found = Sqnr()
        for expected, batch in zip(self._expected, batches):
            for a, b in zip(expected, session.run(*batch)):
                if a.dtype.kind == "f":
                    found.add(a, b)
        return LIMIT_DB if found.decibel is None else found.decibel


def placed(passes: Sequence[Pass], placement: Placement) -> list[Pass]:
    """The passes with the placement written into the one that decides what is quantized."""
    return with_options(passes, {"keep_float": placement.keep_float, "forms": placement.forms})


def deciding(passes: Sequence[Pass]) -> Annotate:
    """What the passes annotate with. Raises QuantizationError for passes that never do."""
    for item in passes:
        if isinstance(item, Annotate):
            return item
        if isinstance(item, Quantize):
            return item.steps()[0]  # type: ignore[return-value]
    raise QuantizationError("there is nothing to place: the passes do not quantize", hint="add quantize to them")


def _moves_kernels(item: Pass) -> bool:
    """Accuracy passes change numbers, not kernels."""
    return ".accuracy." not in type(item).__module__
