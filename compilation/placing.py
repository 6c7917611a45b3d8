"""The speed of a compilation: measured placement where it is asked for, and never slower than float.

`tune` asks which ops to leave in float before anything is quantized. Whether it was asked for or not, the finished
model is timed against the float model; where it is slower, it is tuned, and where that does not help it stays in float.
The outcome is a pipeline that makes the model without measuring anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch

from ..backends.onnx.lower import lower
from ..errors import QuantizationError
from ..frontend.program import Program, StageRecord
from ..passes.base import Context, Pass
from ..passes.memory import return_memory
from ..passes.quantize.spec import Target
from ..runtime.benchmark import Timing, compare_on_example
from ..runtime.latency import cache_folder
from ..runtime.model_file import ModelFile
from ..runtime.placement_trials import placed
from ..runtime.processor import family, native_target, saturates
from ..runtime.report.build import Promise
from ..runtime.session import Session, make_session
from ..runtime.tuning import Trial, Tuning, tune

# Less than what a call of the runtime from Python costs besides its kernels: no reason to change a model.
LEAST_MS = 0.02
_SESSIONS = 3


@dataclass(frozen=True)
class Timed:
    """The float model and the compiled one, loaded and timed against each other."""

    float_model: ModelFile
    model: onnx.ModelProto
    float_session: Session | None
    session: Session
    timing: Timing

    @property
    def slower(self) -> bool:
        """Is the compiled model slower, beyond the noise of the measurement and by more than a trifle?"""
        timing = self.timing
        return timing.high < 1 and timing.second_ms - timing.first_ms > LEAST_MS


def lower_and_time(float_program: Program, final: Program, reference: Program, threads: int) -> Timed:
    """Both as ONNX, and their latencies on one example. Where the compiled model seems slower, fresh sessions have a
    say: where tensors lie in memory moves a model by some per cent, and the pair with the median ratio counts."""
    float_model, model = ModelFile(float_program), lower(final)
    float_session = make_session(float_model.source, threads=threads)
    return_memory()
    session = make_session(model, threads=threads)
    return_memory()
    timing = compare_on_example(float_session, session, reference, threads)
    timed = Timed(float_model, model, float_session, session, timing)
    if not timed.slower:
        return timed
    timings = [timing]
    while len(timings) < _SESSIONS:
        first, second = (make_session(m, threads=threads) for m in (float_model.source, model))
        timings.append(compare_on_example(first, second, reference, threads))
    return dataclasses.replace(timed, timing=sorted(timings, key=lambda t: t.ratio)[_SESSIONS // 2])


@dataclass
class Placing:
    """What is decided about speed in one compilation. `promised`: the model is not to be slower than float; `tuning`:
    the search, where there was one."""

    context: Context
    samples: tuple[torch.Tensor, ...]
    threads: int = 1
    seconds: float = 60.0
    promised: bool = True
    tuning: Tuning | None = None

    def tuned(self, floating: Program, tail: Sequence[Pass], record: StageRecord) -> list[Pass]:
        """The passes from quantization on with the fastest placement; none where float is the fastest."""
        self.tuning = tune(
            floating,
            tail,
            self.context,
            self.samples,
            threads=self.threads,
            cache=cache_folder(),
            seconds=self.seconds,
            tell=self.context.progress,
        )
        record.notes += self.tuning.notes
        best = self.tuning.best.placement
        if best == self.tuning.integer.placement:
            return list(tail)
        return placed(tail, best) if best.integers else []

    def not_slower(
        self,
        floating: Program,
        tail: Sequence[Pass],
        timed: Timed,
        record: StageRecord,
        make: Callable[[list[Pass]], Timed],
        allowed: Callable[[], bool],
    ) -> tuple[list[Pass], Timed]:
        """Other passes from quantization on, with which the model is not slower than float, and that model; the same
        where it is not slower now. `make` runs passes on `floating` and times the result, `allowed` says whether the
        metric of what was made last is good enough: more in float is not better in every case."""
        if not timed.slower:
            return list(tail), timed
        record.notes.append(f"{speed_text(timed)}: slower than float")
        if self.tuning is None:
            tail = self._try_tuning(floating, tail, record)
            timed = make(list(tail))
        why = ""
        if tail and timed.slower:
            why = "slower than float all the same"
        elif tail and not allowed():
            why = "as fast as float, but the metric falls further than allowed"
        if why:
            record.notes.append(f"{speed_text(timed)}: {why}; the model stays in float")
            tail, timed = [], make([])
        if not tail:
            record.notes.append("nothing is on integers: this is what the recipe `float` makes")
        record.changes = 1
        return list(tail), timed

    def _try_tuning(self, floating: Program, tail: Sequence[Pass], record: StageRecord) -> list[Pass]:
        try:
            return self.tuned(floating, tail, record)
        except QuantizationError as error:
            record.notes.append(f"it cannot be tuned: {error.message}")
            return []


def runs_here(target: Target) -> bool:
    """Do models for the target run in ONNX Runtime on this machine, so that what is measured says something?"""
    return _meant_for_here(target) and not without_vnni(target)


def without_vnni(target: Target) -> str:
    """What to know of a target for processors with VNNI on one that has none; "" elsewhere."""
    if not (_meant_for_here(target) and target.may_saturate and saturates()):
        return ""
    return (
        f"this processor has no VNNI, which {target.name} is for: numbers are verified by ONNX Runtime's exact kernels "
        "(session option session.x64quantprecision = 1; without it 8-bit products saturate here), and speed here says "
        f"nothing about {target.name}; for processors like this one compile for {native_target()}"
    )


def _meant_for_here(target: Target) -> bool:
    return target.runtime == "onnxruntime" and target.processor == family()


def speed_promise(timed: Timed) -> Promise:
    """The compiled model is not slower than the float model."""
    trifle = timed.timing.high < 1 and not timed.slower
    extra = f"; a difference of less than {LEAST_MS} ms a call is let pass" if trifle else ""
    return Promise("not-slower", not timed.slower, speed_text(timed) + extra)


def tuning_json(tuning: Tuning | None) -> dict[str, Any] | None:
    """A search for the report, as plain JSON values."""
    if tuning is None:
        return None
    return {
        "placement": tuning.best.placement.name,
        "before": _trial_json(tuning.integer),
        "after": _trial_json(tuning.best),
        "seconds": round(tuning.seconds, 1),
        "measured": tuning.measured,
        "trials": [_trial_json(t) for t in tuning.trials],
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    values = dataclasses.asdict(trial)
    del values["placement"]
    return {
        "name": trial.placement.name,
        "keep_float": list(trial.placement.keep_float),
        "forms": list(trial.placement.forms),
        **values,
    }


def speed_text(timed: Timed) -> str:
    """How fast a model is beside float, for people."""
    timing = timed.timing
    return (
        f"{timing.second_ms:.3f} ms against {timing.first_ms:.3f} ms in float, {timing.ratio:.2f}x "
        f"({timing.low:.2f} to {timing.high:.2f} with 95 % confidence)"
    )
