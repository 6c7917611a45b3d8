"""One training loop for everything: plain fine-tuning, distillation and quantization-aware training differ in their
objective, a function `(program, batch) -> loss`.

    import fxpress
    from fxpress.training.options import SGD, TrainingOptions

    tuned = fxpress.finetune(program, (images, labels), TrainingOptions(epochs=3, optimizer=SGD(0.01)), evaluate=top1)

A Program trains like the module it came from: BatchNorm and dropout are on while it trains and off in what is returned.
Random numbers depend on the seed and the step alone, so a run that was killed goes on from its checkpoint to the same
result, bit for bit on a CPU; and the batch of a step is the same however many processes share it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, OptionError, did_you_mean, explained
from ..frontend.batches import NO_LABEL
from ..frontend.program import Program, StageRecord, require_program
from ..frontend.train_modes import training_notes
from ..passes.memory import peak_memory
from ..passes.prune.kinds.sparsify import zero_weights
from ..passes.prune.plan import PruningPlan
from ..passes.prune.recovery.shuffle import AUGMENTATIONS
from ..runtime.evaluate import Evaluate, Runner, Top1, measure, torch_runner
from ..runtime.feed import leaves
from .checkpoint import CheckpointFolder, EpochRecord, digest
from .describe import described
from .engine import Engine, Step, make_engine, move
from .examples import Augment, Examples, Held, Indexed, Streamed, as_examples
from .objectives import Batch, CrossEntropy, Objective, reads_labels, tells_classes
from .options import TrainingOptions
from .parameters import given_back, only, trainable
from .run import Hooks, Progress, Run, Saving
from .schedules import OneCycle, require
from .seeding import generators_kept

OnEpoch = Callable[[Program, int], None]


@dataclass(frozen=True)
class Trained:
    """The trained program in evaluation mode, what each epoch came to, and the epoch whose weights these are."""

    program: Program
    history: tuple[EpochRecord, ...]
    kept: EpochRecord

    def notes(self) -> list[str]:
        """For people: the losses, and which epoch was kept."""
        losses = ", ".join(f"{r.loss:.4f}" for r in self.history)
        metric = "" if self.kept.metric is None else f", metric {self.kept.metric:.4f}"
        kept = f"weights of epoch {self.kept.epoch}{metric}"
        return [*training_notes(self.program), f"mean loss by epoch: {losses}", kept]


def finetune(program: Program, data: Any, options: TrainingOptions | None = None, **choices: Any) -> Program:
    """Train a copy of `program` on labelled `data`, and return it in evaluation mode. All options: `train`."""
    return train(program, data, options, **choices).program


def train(
    program: Program,
    data: Any,
    options: TrainingOptions | None = None,
    *,
    objective: Objective | None = None,
    evaluate: Evaluate | None = None,
    augment: Augment | str | None = None,
    workers: int = 0,
    on_epoch: OnEpoch | None = None,
    plan: PruningPlan | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
    name: str = "finetune",
) -> Trained:
    """Train a copy of `program` and say what each epoch came to.

    `data`: (inputs..., labels), a list of labelled batches, a torch `Dataset` (read with `workers` processes) or
    anything that streams batches (`training.examples.as_examples`); without labels where the objective reads none.
    `objective(program, batch)` is the loss, by default cross entropy. `evaluate(run)` judges each epoch, higher is
    better. `augment(inputs, generator)` varies the inputs of a step; "flip-shift" mirrors pictures and moves them by up
    to an eighth of their size.
    `on_epoch(program, number)` is called before each epoch, from 0, and before the rest of one that is resumed; it may
    switch what the program does, by the number alone. Weights of an `objective` are trained with the program's, and are
    as they were where the training is broken off, so that the same call goes on from its checkpoint.

    `plan`: the sparse plan that the program was pruned by; its zeros stay zero.

    `checkpoint`: a folder for the state of the run, after every epoch and every `checkpoint_every` steps. A run that
    finds its own checkpoint there goes on from it; one that was finished returns what it came to.

    Raises OptionError, DataError, TrainingError (a loss that is not finite, a lost process), OutputError.
    """
    require_program(program)
    options = options or TrainingOptions()
    _check_choices(options, objective, evaluate, plan, checkpoint, checkpoint_every)
    augment = _augmentation(augment, objective)
    labelled = reads_labels(objective) or bool(options.hold_out)
    with generators_kept():
        whole = read_examples(program, data, options, workers, labelled)
    examples, held_out = _hold_out(whole, options.hold_out)
    engine = make_engine(options)
    copy, objective = program.copy(), objective or CrossEntropy(options.label_smoothing)
    chosen = trainable(copy, options.freeze)
    start = time.perf_counter()
    with generators_kept(), only(copy, chosen), given_back(objective), peak_memory() as memory:
        step = Step(copy, objective)
        run_of = {
            **options.described(),
            "start": digest(copy.state_dict()),
            "steps": examples.steps,
            **{k: described(v) for k, v in (("objective", objective), ("plan", plan))},
            **{k: _called(f) for k, f in (("augment", augment), ("evaluate", evaluate))},
        }
        saving = _saving(checkpoint, checkpoint_every, run_of, engine.is_first)
        move(copy, engine.device)
        judge = _judge(copy, objective, evaluate, held_out, engine)
        zeros = _keep_zeros(plan) if plan is not None else None
        hooks = Hooks(judge, augment, on_epoch, zeros, progress if engine.is_first else None, name)
        run = Run(copy, step, examples, options, engine, hooks)
        before = saving.folder.read() if saving else None
        if before:
            run.restore(before)
        engine.require_same(run.position.step)
        kept = run.to_end(saving)
        move(copy.eval(), torch.device("cpu"))
    trained = Trained(copy, tuple(run.position.history), kept)
    record = StageRecord(name, time.perf_counter() - start, run.position.step, trained.notes(), memory.megabytes)
    copy.log.append(record)
    return trained


# -- what judges --------------------------------------------------------------------------------------------------


def _hold_out(examples: Examples, share: float) -> tuple[Examples, Held | None]:
    if not share:
        return examples, None
    if not isinstance(examples, Held):
        raise OptionError("hold_out works on data that are held in memory", hint="split them, and give evaluate")
    return examples.split(share)


def _judge(
    program: Program, objective: Objective, evaluate: Evaluate | None, held_out: Held | None, engine: Engine
) -> Callable[[], float] | None:
    """The metric of the program as it is then: `evaluate`, or top-1 on what is held out, or there minus the loss."""
    if evaluate is None:
        if held_out is None:
            return None
        labels = held_out.labels
        if labels.is_floating_point() or labels.ndim != 1 or not tells_classes(objective):
            return lambda: -_mean_loss(program, objective, held_out, engine.device)
        evaluate = _top1(held_out)
    metric, runner = evaluate, _runner_on(program, engine.device)
    return lambda: measure(metric, runner).value


def _top1(held_out: Held) -> Evaluate:
    """Top-1 on the examples with a label. Raises DataError where none has one."""
    counted = held_out.rows((held_out.labels != NO_LABEL).nonzero().flatten())
    if not len(counted.labels):
        raise DataError("no example that is held out has a label", hint="give a larger hold_out, or evaluate")
    return Top1([(*inputs, labels) for inputs, labels in counted.batches()])


def _runner_on(program: Program, device: torch.device) -> Runner:
    """A runner for a program on any device: the metric gives and gets tensors on the CPU."""

    def flat(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        there = tuple(t.to(device) for t in batch)
        return tuple(t.cpu() for t in program.run_flat(leaves(program, there)))

    return replace(torch_runner(program), flat=flat)


@torch.no_grad()
def _mean_loss(program: Program, objective: Objective, held_out: Held, device: torch.device) -> float:
    total = 0.0
    for inputs, labels in held_out.batches():
        batch = Batch(tuple(t.to(device) for t in inputs), labels.to(device))
        total += float(objective(program, batch)) * len(labels)
    return total / len(held_out.labels)


# -- checks -------------------------------------------------------------------------------------------------------


def _check_choices(
    options: TrainingOptions,
    objective: Objective | None,
    evaluate: Evaluate | None,
    plan: PruningPlan | None,
    checkpoint: str | Path | None,
    checkpoint_every: int | None,
) -> None:
    """Raise OptionError for what has another type than it should, or would have no effect."""
    require("options", options, isinstance(options, TrainingOptions), "TrainingOptions(epochs=3, ...)")
    require("plan", plan, plan is None or isinstance(plan, PruningPlan), "a PruningPlan, or None")
    if objective is not None and options.label_smoothing:
        raise OptionError("label_smoothing has no effect on an objective of your own", hint="leave one of them out")
    if checkpoint is None and checkpoint_every is not None:
        raise OptionError("checkpoint_every has no effect without a checkpoint folder", hint="give checkpoint=FOLDER")
    if evaluate is not None and options.hold_out:
        raise OptionError("hold_out has no effect beside evaluate", hint="leave one of them out")
    if evaluate is None and not options.hold_out:
        for name in ("patience", "keep"):
            if getattr(options, name) not in (None, "last"):
                raise OptionError(f"{name} has no effect without a metric", hint="give evaluate, or hold_out=0.1")
    if isinstance(options.schedule, OneCycle) and options.warmup:
        raise OptionError("warmup has no place before a one-cycle schedule", hint="its `rise` is the warm-up")


def read_examples(
    program: Program, data: Any, options: TrainingOptions, workers: int = 0, labelled: bool = True
) -> Held | Indexed | Streamed:
    """The data of a training. Raises DataError, also where code of the user's that gives them fails."""
    hint = "give (inputs..., labels), a list of such batches, a Dataset or a DataLoader"
    with explained(DataError, "the training data cannot be read", hint):
        return as_examples(program, data, options.batch_size, options.seed, workers, labelled)


def _augmentation(augment: Augment | str | None, objective: Objective | None) -> Augment | None:
    """An augmentation by its name. Mixed pictures have no label: they need an objective that does without."""
    if not isinstance(augment, str):
        return augment
    if augment not in AUGMENTATIONS:
        raise OptionError(f"unknown augmentation {augment!r}", hint=did_you_mean(augment, AUGMENTATIONS))
    if "cutmix" in augment and reads_labels(objective):
        raise OptionError(f"{augment} mixes pictures, not their labels", hint="use flip-shift, or distillation")
    return None if augment == "none" else AUGMENTATIONS[augment]


def _keep_zeros(plan: PruningPlan) -> Callable[[Program], None]:
    if not plan.masks:
        raise OptionError("plan has no effect: it zeroes no single weights", hint="leave it out")
    return lambda program: zero_weights(program, plan.masks)


def _called(function: Any) -> str:
    """What a callable is called; an instance by its class."""
    return str(getattr(function, "__name__", type(function).__name__))


def _saving(path: str | Path | None, every: int | None, run_of: dict[str, Any], writes: bool) -> Saving | None:
    if path is None:
        return None
    if every is not None and every < 1:
        raise OptionError(f"checkpoint_every is {every}", hint="give a number of steps")
    folder = CheckpointFolder(path, run_of)
    if writes:
        folder.check()
    return Saving(folder, every)
