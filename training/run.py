"""The steps of one training, from a position to the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FxpressError, TrainingError, first_line, line_of
from ..frontend.program import Program
from ..passes.prune.recovery.muon import lookup_tables
from .average import Average, Tensors, assign, copied, values
from .batch_statistics import one_value_norms, require_statistics
from .checkpoint import Checkpoint, CheckpointFolder, EpochRecord, Position
from .diagnosis import checked_scalar, not_finite
from .engine import Engine, Step
from .examples import Augment, Examples, Slot
from .objectives import Batch, reads_labels
from .options import TrainingOptions
from .parameters import decay_groups, norm_parameters
from .schedules import Plateau
from .schedules import Step as Milestones
from .seeding import generator_for, seed_all

Progress = Callable[[str, int, int | None], None]
# A scaled loss may overflow float16 for a few steps, until its scale, halved each time, is small enough: 2^16 at first.
_MOST_SKIPPED = 31


@dataclass(frozen=True)
class Hooks:
    """What the caller has a say in: the metric of the program as it is, how inputs are varied, what happens before an
    epoch and after a step, and who is told of the progress."""

    judge: Callable[[], float] | None = None
    augment: Augment | None = None
    on_epoch: Callable[[Program, int], None] | None = None
    after_step: Callable[[Program], None] | None = None
    progress: Progress | None = None
    name: str = "finetune"


@dataclass(frozen=True)
class Saving:
    """Where checkpoints go; also every so many steps, beside after every epoch."""

    folder: CheckpointFolder
    every: int | None = None


class Run:
    """A training under way: everything that changes is in `position`, the step's tensors, optimizer, average, best."""

    def __init__(
        self, program: Program, step: Step, examples: Examples, options: TrainingOptions, engine: Engine, hooks: Hooks
    ) -> None:
        self.program, self.examples, self.options, self.engine, self.hooks = program, examples, options, engine, hooks
        self.step, self.wrapped = step, engine.prepare(step)
        self.named = {n: p for n, p in step.named_parameters() if p.requires_grad}
        norms = {f"model.{n}" for n in norm_parameters(program)}
        tables = {f"model.{n}" for n in lookup_tables(program)}
        groups = decay_groups(self.named, norms, tables, options.optimizer.weight_decay)
        self.optimizer = options.optimizer.make(groups)
        self.live = step.state_dict(keep_vars=False)
        self.average = Average(self.live, options.ema) if options.ema else None
        self.best: Tensors | None = None
        self.keeps_best = options.keep == "best" or (options.keep is None and hooks.judge is not None)
        self.position = Position()
        self.skipped = 0  # steps in a row without a finite gradient
        self.total = options.epochs * examples.steps
        self.one_value_norms = one_value_norms(program)

    def to_end(self, saving: Saving | None) -> EpochRecord:
        """Train what is left, and leave the weights to keep in the program. Returns the record of their epoch."""
        while not self.position.finished:
            with self._explained():
                self._epoch(saving)
        assign(self.live, self.best if self.best is not None else self._weights())
        self.engine.share(self.step.buffers())  # averages of statistics that each process gathered for itself
        history = self.position.history
        values = [self._value(r) for r in history]
        return history[values.index(max(values))] if self.best is not None else history[-1]

    # -- steps --------------------------------------------------------------------------------------------------------

    def _epoch(self, saving: Saving | None) -> None:
        here = self.position
        self.program.train()
        if self.hooks.on_epoch:
            self.hooks.on_epoch(self.program, here.epoch)
        for slot in self.examples.epoch(here.epoch, here.batch, self.engine.part):
            self._train_on(slot)
            if self.hooks.progress:
                self.hooks.progress(self.hooks.name, here.step, self.total)
            if saving and saving.every and here.step % saving.every == 0 and here.batch < self.examples.steps:
                self._save(saving)
        self._close_epoch()
        if saving:
            self._save(saving)

    def _train_on(self, slot: Slot) -> None:
        here = self.position
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        batch = self._batch(slot)
        place = (self.options.seed, "step", here.step, self.engine.part.rank)
        seed_all(*place)
        loss = checked_scalar(self.engine.loss(self.wrapped, batch)) * slot.weight
        if self.engine.part.smallest(slot.total) == 1:  # the same in all processes; objectives may freeze norms
            require_statistics(self.one_value_norms, here.step)
        self.engine.backward(loss)
        norm = self.engine.update(self.optimizer, list(self.named.values()), self.options.clip_norm)
        value = float(loss.detach())
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not math.isfinite(value) or self.skipped > (_MOST_SKIPPED if self.engine.scaler.is_enabled() else 0):
            seed_all(*place)
            raise not_finite(self.program, batch, value)
        self.optimizer.zero_grad()
        if self.hooks.after_step:
            self.hooks.after_step(self.program)
        if self.average:
            self.average.update(self.live, here.step)
        here.loss, here.step, here.batch = here.loss + value, here.step + 1, here.batch + 1

    def _batch(self, slot: Slot) -> Batch:
        inputs, here = slot.inputs, self.position
        if self.hooks.augment:
            generator = generator_for(self.options.seed, "augment", here.step, self.engine.part.rank)
            inputs = self.hooks.augment(inputs, generator)
        device = self.engine.device
        weight = self.engine.label_weight(slot.labels, slot.weight) if reads_labels(self.step.objective) else 1.0
        moved = tuple(t.to(device) for t in inputs)
        return Batch(moved, slot.labels.to(device), here.step, here.step / self.total, weight)

    def _rate(self) -> float:
        """The learning rate of the next step."""
        options, done = self.options, self.position.step / self.total
        peak = options.optimizer.learning_rate * self.position.factor
        warmed = max(done - options.warmup, 0.0) / (1 - options.warmup)
        rate = peak * options.schedule.factor(done if isinstance(options.schedule, Milestones) else warmed)
        if done < options.warmup:
            rate *= (self.position.step + 1) / (options.warmup * self.total + 1)
        return rate

    # -- epochs -------------------------------------------------------------------------------------------------------

    def _close_epoch(self) -> None:
        here, options = self.position, self.options
        rate = self.optimizer.param_groups[0]["lr"]
        self.engine.share(self.step.buffers())
        loss = self.engine.mean(here.loss) / here.batch
        record = EpochRecord(here.epoch + 1, loss, self._metric(), rate)
        here.history.append(record)
        better = here.best is None or self._value(record) > here.best
        here.best = self._value(record) if better else here.best
        here.stale = 0 if better else here.stale + 1
        if better and self.keeps_best:
            self.best = copied(self._weights())
        if isinstance(options.schedule, Plateau) and options.schedule.reduced(here.stale):
            here.factor *= options.schedule.gamma
        here.epoch, here.batch, here.loss = here.epoch + 1, 0, 0.0
        tired = options.patience is not None and here.stale >= options.patience
        here.finished = tired or here.epoch == options.epochs

    def _metric(self) -> float | None:
        """The caller's metric, measured by the first process, in evaluation mode and with the averaged weights."""
        if self.hooks.judge is None:
            return None
        value = 0.0
        if self.engine.is_first:
            self.program.eval()
            with values(self.live, self.average.tensors if self.average else None):
                value = self.hooks.judge()
        return self.engine.from_first(value)

    @staticmethod
    def _value(record: EpochRecord) -> float:
        return record.metric if record.metric is not None else -record.loss

    def _weights(self) -> Tensors:
        return self.average.tensors if self.average else self.live

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, saving: Saving) -> None:
        self.position.loss = self.engine.mean(self.position.loss)
        if not self.engine.is_first:
            return
        names = {id(p): n for n, p in self.named.items()}
        moments = {f"{names[id(p)]}:{k}": v for p, s in self.optimizer.state.items() for k, v in s.items()}
        tensors = {
            "model": self.live,
            "optimizer": {n: t for n, t in moments.items() if isinstance(t, torch.Tensor)},
            "average": self.average.tensors if self.average else {},
            "best": self.best or {},
        }
        saving.folder.write(Checkpoint(self.position, tensors, {"scaler": self.engine.scaler.state_dict()}))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`."""
        tensors = checkpoint.tensors
        self.position = checkpoint.position
        assign(self.live, tensors["model"])
        if self.average:
            assign(self.average.tensors, tensors["average"])
        best = tensors.get("best")
        self.best = {n: t.to(self.engine.device) for n, t in best.items()} if best else None
        self.engine.scaler.load_state_dict(checkpoint.extra["scaler"])
        self._restore_optimizer(tensors.get("optimizer", {}))

    def _restore_optimizer(self, moments: Tensors) -> None:
        names = {id(p): n for n, p in self.named.items()}
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in moments.items():
            parameter, _, key = name.rpartition(":")
            state.setdefault(order.index(parameter), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    # -- faults -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what other code raises into an error that says at which step, and what to do."""
        try:
            yield
        except FxpressError:
            raise
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"step {self.position.step}: out of memory on {self.engine.device}", hint="lower batch_size"
            ) from error
        except Exception as error:
            if self.engine.part.count > 1 and _is_lost_contact(error):
                raise TrainingError(
                    f"step {self.position.step}: process {self.engine.part.rank} of {self.engine.part.count} lost "
                    f"contact with another one: {first_line(error)}",
                    hint="look at what the other printed; start all again, with checkpoint=FOLDER they go on",
                ) from error
            raise TrainingError(
                f"step {self.position.step} fails: {type(error).__name__}: {first_line(error)}",
                where=line_of(error),
                hint="objective, augment and on_epoch are called there",
            ) from error


def _is_lost_contact(error: Exception) -> bool:
    words = ("gloo", "connection", "nccl", "timed out", "broken pipe")
    distributed = getattr(torch.distributed, "DistError", ())
    told = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    return told or isinstance(error, distributed)
