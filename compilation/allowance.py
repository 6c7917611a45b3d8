"""What `compile` does where the metric falls further than `max_drop` allows: remedies, then layers in float.

The search (`passes/quantize/placement/fallback.py`) is given the user's metric of the compiled model in ONNX Runtime.
Its outcome is a pipeline that makes the model without a search.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import torch

from .._version import __version__
from ..backends.onnx.lower import lower
from ..errors import FxpressError
from ..frontend.program import Program
from ..passes.base import Context, Pass
from ..passes.pipeline import print_pipeline
from ..passes.quantize.passes import Annotate, Calibrate, Fold, Observe
from ..passes.quantize.placement.fallback import (
    FACTS,
    Budget,
    Exhausted,
    Instead,
    Search,
    Setting,
    Trial,
    float_path,
    give_back,
    give_back_singly,
    grow,
    refine,
    try_remedies,
)
from ..passes.quantize.placement.journal import Journal, add_tensor, fingerprint
from ..passes.quantize.placement.sensitivity import Sensitivity
from ..passes.quantize.placement.trials import Trials, flat_steps, without_fitting
from ..runtime.evaluate import Evaluate, Metric, least_allowed, measure, session_runner, torch_runner
from ..runtime.report.build import Promise
from ..runtime.report.environment import processor_kind
from ..runtime.session import Session, make_session


@dataclass(frozen=True)
class Allowance:
    """How far the metric may fall from that of the float model in PyTorch, and how long to look for a way.

    `judged_on` is a hash of the inputs that the metric was judged on.
    """

    before: Metric
    judged_on: str
    drop: float
    budget: Budget = field(default_factory=Budget)
    journal: Path | None = None

    @property
    def needed(self) -> float:
        """The least metric that is allowed."""
        return least_allowed(self.before.value, self.drop)


@dataclass
class Outcome:
    """What a search found: the passes that replace those from quantization on, all trials, and why it ended early.

    `kept` names what stays in float, and what has 16 bits, because of it.
    """

    passes: list[Pass]
    best: Trial
    allowance: Allowance
    total_macs: int
    trials: list[Trial]
    sensitivity: list[Sensitivity] = field(default_factory=list)
    kept: dict[Instead, list[str]] = field(default_factory=lambda: {"float": [], "int16": []})
    notes: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        return self.best.metric is not None and self.best.metric >= self.allowance.needed


@dataclass(frozen=True)
class Settled:
    """What `settle` decided: the passes from quantization on, the metrics of float and compiled (None: not judged yet),
    and the search where there was one."""

    passes: list[Pass]
    metrics: tuple[Metric, Metric | None]
    outcome: Outcome | None = None


def settle(
    floating: Program | None,
    final: Program,
    tail: Sequence[Pass],
    context: Context,
    allowance: Allowance,
    judge: Callable[[Program], Metric],
    lossless: bool = True,
) -> Settled:
    """Judge `final`, which `tail` made of `floating`, and search for another tail where it is not good enough.

    `lossless`: `floating` computes what the float model computes (it was not pruned, say).
    """
    first: Metric | FxpressError
    try:
        first = judge(final)
    except FxpressError as error:
        if floating is None or not can_fall_back(tail):
            raise
        first = error
    if isinstance(first, Metric) and (floating is None or not can_fall_back(tail) or first.value >= allowance.needed):
        return Settled(list(tail), (allowance.before, first))
    assert floating is not None
    context = dataclasses.replace(context, judge=lambda program: judge(program).value)
    outcome = find_allowed(floating, tail, context, allowance, first, lossless)
    after = first if outcome.best is outcome.trials[0] and isinstance(first, Metric) else None
    return Settled(outcome.passes, (allowance.before, after), outcome)


def judge_float(evaluate: Evaluate, reference: Program) -> tuple[Metric, str]:
    """The metric of the float model in PyTorch, and a hash of what it was judged on."""
    digest = hashlib.sha256()
    runner = torch_runner(reference)
    compute = runner.flat

    def seen(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        for tensor in batch:
            add_tensor(digest, tensor)
        return compute(batch)

    runner.flat = seen
    return measure(evaluate, runner), digest.hexdigest()


def runtime_judge(evaluate: Evaluate, threads: int) -> Callable[[Program], Metric]:
    """The metric of a program compiled for ONNX Runtime."""
    return lambda program: measure(evaluate, session_runner(program, make_session(lower(program), threads=threads)))


def allowance_of(
    settled: Settled | None, drop: float | None, evaluate: Evaluate | None, threads: int
) -> Callable[[Program], bool]:
    """Is the metric of a program still within the allowance, or no worse than the best that was found?"""
    if settled is None or drop is None or evaluate is None:
        return lambda program: True
    before, after = settled.metrics
    found = settled.outcome.best.metric if settled.outcome else after.value if after else None
    needed = least_allowed(before.value, drop)
    judge = runtime_judge(evaluate, threads)
    return lambda program: judge(program).value >= (needed if found is None else min(needed, found))


def find_allowed(
    floating: Program,
    tail: Sequence[Pass],
    context: Context,
    allowance: Allowance,
    first: Metric | FxpressError,
    lossless: bool = True,
) -> Outcome:
    """Search for the fewest MACs in float (or, where the target has them, in 16 bits) that keep the allowance.

    `floating` is the program before `tail`, the passes from quantization on; `first` is what judging the whole pipeline
    gave. `context.judge` judges the trials. Raises the error of `first` where no trial could be judged at all.
    """
    options = print_pipeline(tail)
    trials = Trials(floating, context)
    journal = Journal(allowance.journal, _fingerprint(floating, context, allowance))
    # Another metric of the same name is told by what it says of the model that was asked for.
    journal.expect(f"as asked: {options}", {"value": first.value if isinstance(first, Metric) else None})
    search = Search(_attempt(trials, context), allowance.needed, allowance.budget, journal)
    if context.progress:
        progress = context.progress
        search.tell = lambda done, most: progress("fall back to float", done, most)
    search.add(_first_trial(trials, options, first))
    outcome = Outcome(list(tail), search.trials[0], allowance, sum(trials.macs.values()), search.trials)
    try:
        _search(search, trials, options, outcome, lossless)
    except Exhausted as end:
        outcome.notes.append(str(end))
    if search.hopeless:
        outcome.notes.append("float before quantization misses the allowance too: leaving layers in float is no remedy")
    outcome.notes += search.journal.notes
    if search.best is None:
        raise first if isinstance(first, FxpressError) else FxpressError("no trial could be judged")
    outcome.best = search.best
    if outcome.best is not search.trials[0]:
        setting = trials.simplified(outcome.best.setting)
        outcome.best = dataclasses.replace(outcome.best, setting=setting)
        outcome.passes = trials.passes(setting)
        outcome.kept = {instead: trials.added(setting, options, instead) for instead in ("float", "int16")}
    return outcome


def _search(search: Search, trials: Trials, options: str, outcome: Outcome, lossless: bool) -> None:
    if search.budget.trials <= 1:
        raise Exhausted(f"the budget of {search.budget.trials} trials leaves none for a search")
    options = try_remedies(search, trials.remedies(options))
    if search.meets(search.best):
        return
    search.hopeless = not lossless and _float_falls(trials, outcome.allowance)
    if search.hopeless:
        return
    if trials.has_int16:
        _leave_eight_bits(search, trials, options, outcome, "int16")
        if search.meets(search.best):
            return
        options = _better(search, options, trials.with_int16(options))
    _leave_eight_bits(search, trials, options, outcome, "float")
    if trials.has_int16 and search.best is not None and search.meets(search.best):
        narrow = trials.with_eight_bits(trials.simplified(search.best.setting))
        _leave_eight_bits(search, trials, narrow, outcome, "int16")


def _leave_eight_bits(search: Search, trials: Trials, options: str, outcome: Outcome, instead: Instead) -> None:
    """Find the fewest MACs that must be in float, or in 16 bits."""
    fast = trials.settled(without_fitting(options))
    points = trials.sensitivities(fast)
    outcome.sensitivity = outcome.sensitivity or points
    if instead == "int16":  # weights have 8 bits all the same
        widened = trials.widened(fast)
        points = [p for p in points if p.kind == "activation" and p.operations & widened]
    path = float_path(points, trials.macs)
    grow(search, Setting(fast, instead=instead), path)
    give_back(search, points, trials.macs)
    if without_fitting(options) != options:
        refine(search, Setting(options, instead=instead), path)
    give_back_singly(search, points, trials.macs)


def _better(search: Search, first: str, second: str) -> str:
    """The options with the better metric."""
    metrics = [search.judge(Setting(options)).metric for options in (first, second)]
    one, other = (-math.inf if m is None else m for m in metrics)
    return second if other > one else first


def _float_falls(trials: Trials, allowance: Allowance) -> bool:
    """Does the program miss the allowance before it is quantized?"""
    assert trials.context.judge is not None
    try:
        return trials.context.judge(trials.floating) < allowance.needed
    except FxpressError:
        return True


def _first_trial(trials: Trials, options: str, first: Metric | FxpressError) -> Trial:
    macs = trials.other_macs(Setting(options))
    if isinstance(first, FxpressError):
        return Trial(Setting(options), None, *macs, 0.0, first.message)
    return Trial(Setting(options), first.value, *macs, 0.0)


def _attempt(trials: Trials, context: Context) -> Callable[[Setting], tuple[float, int, int]]:
    judge = context.judge
    assert judge is not None

    def attempt(setting: Setting) -> tuple[float, int, int]:
        program, floats, wide = trials.make(setting)
        return judge(program), floats, wide

    return attempt


def _fingerprint(floating: Program, context: Context, allowance: Allowance) -> str:
    """What the facts of a journal hold for. Not the allowance and the budget: a trial is what it is under any."""
    before = allowance.before
    facts = (before.name, before.value, before.count, allowance.judged_on)
    versions = (__version__, torch.__version__, onnxruntime.__version__, processor_kind())
    target = context.target
    formats = (target.name, str(target.activation), str(target.weight)) if target else ()
    return fingerprint(floating, context.calibration or (), *facts, *versions, *formats, *FACTS, context.seed)


def can_fall_back(passes: Sequence[Pass]) -> bool:
    """Is there a whole quantization, whose options a search could change?"""
    present = {type(s) for s in flat_steps(passes)}
    return {Annotate, Observe, Calibrate, Fold} <= present


# -- the metric of a compilation ----------------------------------------------------------------------------------


def judge_both(
    evaluate: Evaluate | None,
    reference: Program,
    final: Program,
    session: Session,
    known: tuple[Metric, Metric | None] | None = None,
) -> tuple[Metric | None, Metric | None]:
    """The metric of the float model in PyTorch and of the compiled one in ONNX Runtime, as far as it is not `known`."""
    if evaluate is None:
        return None, None
    before, after = known or (measure(evaluate, torch_runner(reference)), None)
    return before, after or measure(evaluate, session_runner(final, session))


def drop_promise(metrics: tuple[Metric | None, Metric | None], allowed: float | None) -> list[Promise]:
    """The metric falls by no more than was allowed."""
    before, after = metrics
    if allowed is None or before is None or after is None:
        return []
    drop = before.value - after.value
    detail = (
        f"{after.name} went from {before.value:.4f} to {after.value:.4f}, a drop of {drop:.4f}; allowed {allowed:.4f}"
    )
    return [Promise("max-drop", after.value >= least_allowed(before.value, allowed), detail)]
