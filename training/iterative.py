"""Prune in steps with training in between, on labels or by distillation, down to a budget.

    program, plan, steps = fxpress.prune_and_finetune(program, data, options, macs=0.5, steps=3, evaluate=top1)

A step makes a plan on the network as it is, lets what will go shrink first (if asked to), prunes, and trains. Without
labels: `fxpress.prune_and_recover`.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import OptionError, TrainingError
from ..frontend.program import Program, require_program
from ..passes.prune.plan import PruningPlan
from ..passes.prune.planning import plan_pruning
from ..passes.prune.recovery.schedule import Choose, budget_of, kept_share
from ..runtime.evaluate import Evaluate, least_allowed, measure, torch_runner
from .distill import Distillation
from .examples import Augment
from .loop import Progress, Trained, train
from .objectives import CrossEntropy, Objective
from .options import TrainingOptions
from .schedules import check_numbers, require
from .sparsity import GroupLasso, GrowingPenalty


@dataclass(frozen=True)
class Shrink:
    """How what will be pruned is made small before: by training with `options` and a penalty.

    "growing": the plan is made first, and the penalty on what it removes grows by `strength` with each step, up to 1.
    "group-lasso": all channels are penalized by `strength`, and the plan is made afterwards.
    """

    method: Literal["growing", "group-lasso"] = "growing"
    strength: float = 1e-2
    options: TrainingOptions | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        require("method", self.method, self.method in ("growing", "group-lasso"), "growing or group-lasso")
        require("strength", self.strength, self.strength > 0, "a positive number")


@dataclass(frozen=True)
class PruningStep:
    """What a step came to: the MACs and parameters that are left, the metric before and after its training (None
    without one), the mean loss of its last epoch."""

    number: int
    macs: int
    parameters: int
    pruned_metric: float | None
    metric: float | None
    loss: float

    def __str__(self) -> str:
        judged = "" if self.metric is None else f", metric {_figure(self.pruned_metric)} -> {_figure(self.metric)}"
        return f"step {self.number}: {self.macs:,} MACs, {self.parameters:,} parameters{judged}, loss {self.loss:.4f}"


class PrunedProgram(NamedTuple):
    """The smallest program that kept the promise, the plan that leads to it from the original, and all steps."""

    program: Program
    plan: PruningPlan
    steps: tuple[PruningStep, ...]


def prune_and_finetune(
    program: Program,
    data: Any,
    options: TrainingOptions | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    steps: int = 1,
    choose: Choose | None = None,
    shrink: Shrink | None = None,
    objective: Objective | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
    augment: Augment | str | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> PrunedProgram:
    """Prune `program`, which is not changed, down to the share `macs` or `params` in `steps` equal factors, with a
    training of `options` after each.

    `choose` makes the plan of a step, by default `plan_pruning` with its own defaults. `objective(program, batch)` is
    the loss of the trainings, by default cross entropy. `evaluate(run)` judges; with `max_drop` the first step whose
    metric is lower than the original's by more is the last, and the step before is what is returned. `checkpoint`: a
    folder with one checkpoint a training; a killed run goes on from there. What each step came to is returned, and kept
    in the notes of the plan, which are part of the report.

    Raises what `train` and `choose` raise; TrainingError where the first step drops more than `max_drop`.
    """
    require_program(program)
    name, share = budget_of(macs, params)
    require("max_drop", max_drop, max_drop is None or _is_share(max_drop), "a share such as 0.01")
    require("shrink", shrink, shrink is None or isinstance(shrink, Shrink), 'Shrink("growing"), or None')
    require("steps", steps, isinstance(steps, int) and not isinstance(steps, bool) and steps > 0, "1 or more")
    if max_drop is not None and evaluate is None:
        raise OptionError("max_drop has no effect without a metric", hint="give evaluate")
    job = _Job(data, options or TrainingOptions(), shrink, objective, evaluate, augment, checkpoint, progress)
    floor = None if max_drop is None else least_allowed(job.metric(program), max_drop)
    current, plan, done = program, None, list[PruningStep]()
    for number in range(1, steps + 1):
        left = kept_share(plan, name) if plan is not None else 1.0
        choosing = functools.partial(choose or plan_pruning, **{name: min(share ** (number / steps) / left, 1.0)})
        trained, step, record = job.step(current, choosing, number)
        done.append(record)
        if floor is not None and record.metric is not None and record.metric < floor:
            break
        current, plan = trained, step if plan is None else plan.merge(step)
    if plan is None:
        raise TrainingError(
            f"the first of {steps} steps drops more than max_drop={max_drop}: {done[0]}",
            hint="take more steps, train longer, or keep more",
        )
    return PrunedProgram(current, replace(plan, notes=(*plan.notes, *map(str, done))), tuple(done))


@dataclass(frozen=True)
class _Job:
    """What all steps have in common."""

    data: Any
    options: TrainingOptions
    shrink: Shrink | None
    objective: Objective | None
    evaluate: Evaluate | None
    augment: Augment | str | None
    checkpoint: str | Path | None
    progress: Progress | None

    def step(
        self, program: Program, choose: Callable[[Program], PruningPlan], number: int
    ) -> tuple[Program, PruningPlan, PruningStep]:
        """Shrink, prune and train once."""
        shrunk, plan = self._shrunk(program, choose, number)
        pruned = plan.apply(shrunk)
        before = self.metric(pruned) if self.evaluate else None
        name = f"finetune {number}"
        sparse, objective = plan if plan.masks else None, self._objective(pruned)
        trained = self._trained(pruned, self.options, objective, self.evaluate, name, sparse)
        record = PruningStep(number, plan.macs[1], plan.parameters[1], before, trained.kept.metric, trained.kept.loss)
        return trained.program, plan, record

    def _shrunk(
        self, program: Program, choose: Callable[[Program], PruningPlan], number: int
    ) -> tuple[Program, PruningPlan]:
        if self.shrink is None:
            return program, choose(program)
        options = replace(self.shrink.options or self.options, keep="last", patience=None)
        label_smoothing, options = options.label_smoothing, replace(options, label_smoothing=0.0)
        base, strength = self._objective(program) or CrossEntropy(label_smoothing), self.shrink.strength
        name = f"shrink {number}"
        if self.shrink.method == "growing":
            plan = choose(program)
            growing = GrowingPenalty(program, plan, base, growth=strength)
            return self._trained(program, options, growing, None, name).program, plan
        lasso = GroupLasso(program, base, strength=strength)
        shrunk = self._trained(program, options, lasso, None, name).program
        return shrunk, choose(shrunk)

    def _objective(self, program: Program) -> Objective | None:
        """The caller's objective for a program as narrow as this one: adapters of a distillation are of its widths."""
        return self.objective.made_for(program) if isinstance(self.objective, Distillation) else self.objective

    def _trained(
        self,
        program: Program,
        options: TrainingOptions,
        objective: Objective | None,
        evaluate: Evaluate | None,
        name: str,
        sparse: PruningPlan | None = None,
    ) -> Trained:
        folder = None if self.checkpoint is None else Path(self.checkpoint) / name.replace(" ", "-")
        return train(
            program, self.data, options, objective=objective, evaluate=evaluate, augment=self.augment, plan=sparse,
            checkpoint=folder, progress=self.progress, name=name,
        )  # fmt: skip

    def metric(self, program: Program) -> float:
        """The caller's metric, in PyTorch."""
        assert self.evaluate is not None
        return measure(self.evaluate, torch_runner(program)).value


def _is_share(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
