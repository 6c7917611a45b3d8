"""`recover`: give a pruned program back its accuracy, from a few batches without labels. And the pass of that name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from ....errors import OptionError
from ....frontend.batches import Batches, as_batches
from ....frontend.program import Program, StageRecord
from ...base import Change, Context, Pass, register_pass
from ...memory import peak_memory
from ...processor import has_bfloat16
from ..passes import ORIGINAL, RESULT
from ..plan import PruningPlan
from .pairing import Pair, pair_programs
from .reconstruct import reconstruct
from .reestimate import reestimate_statistics
from .refine import Schedule, refine
from .shuffle import AUGMENTATIONS

Method = Literal["least-squares", "batchnorm", "none"]
Augmentation = Literal["none", "flip-shift", "flip-shift-cutmix"]
Progress = Callable[[str, int, int | None], None]

_METHODS = ("least-squares", "batchnorm", "none")
_LEARNING_RATE = 5e-3
_BATCH_SIZE = 50


def recover(
    pruned: Program,
    calibration: Any,
    *,
    reference: Program,
    plan: PruningPlan,
    method: Method = "least-squares",
    ridge: float | None = None,
    epochs: int = 0,
    learning_rate: float | None = None,
    augment: Augmentation | None = None,
    bfloat16: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Program:
    """A new program with the structure of `pruned` and weights that bring its values back to those of `reference`.

    `pruned` is `plan.apply(reference)`, directly or with other weights. `calibration` is any iterable of batches,
    labels are ignored; a few hundred samples do. No argument is changed.

    `method`: "least-squares" reconstructs layer by layer the weights of all that reads what was removed; "batchnorm"
    only computes BatchNorm's running statistics anew; "none" leaves all to the training. `ridge` is the damping of the
    least squares relative to the mean square of a layer's inputs; by default it is chosen for each output on every
    fifth sample, held out from the fit.

    `epochs`: so many times over the data, all weights are then trained together to give what `reference` gives, at the
    peak `learning_rate` (default 5e-3). `augment` varies images: "flip-shift", or "flip-shift-cutmix", which pays with
    more epochs (50 and up). `bfloat16` computes layers in that type (faster on some processors), `seed` draws order and
    augmentation.

    What was done and what was left alone, with the reason, is in the last entry of `log` of the result.
    Raises PruningError (programs and plan do not belong together), DataError, OptionError.
    """
    settings = Recover(method, ridge, epochs, learning_rate, augment, bfloat16)
    settings.check()
    result = pruned.copy()
    start = time.perf_counter()
    with peak_memory() as memory:
        change = settings.improve(pair_programs(result, reference, plan), calibration, seed, progress)
    seconds = time.perf_counter() - start
    result.log.append(StageRecord("recover", seconds, change.count, change.notes, memory.megabytes))
    return result


@register_pass
@dataclass(frozen=True)
class Recover(Pass):
    """Reconstruct what pruning cost, from calibration data without labels.

    Must directly follow `prune`. `method=least-squares` gives each layer behind a removed channel the weights with
    which its output is closest to that of the original, in order, each on the inputs that the recovered layers before
    it give; `method=batchnorm` computes only BatchNorm's statistics anew, `method=none` neither. `ridge` damps the
    least squares. With `epochs` all weights are then trained together to match the original, still without labels;
    `learning_rate`, `augment` (none, flip-shift, flip-shift-cutmix) and `bfloat16` say how.
    """

    method: Method = "least-squares"
    ridge: float | None = None
    epochs: int = 0
    learning_rate: float | None = None
    augment: Augmentation | None = None
    bfloat16: bool = False

    name = "recover"
    preserves = frozenset({"interface"})

    def run(self, program: Program, context: Context) -> Change:
        self.check()
        plan, original = context.results.get(RESULT), context.results.get(ORIGINAL)
        if not isinstance(plan, PruningPlan) or not isinstance(original, Program):
            raise OptionError("recover has nothing to recover", hint="put it directly after prune{...}")
        if context.calibration is None:
            raise OptionError("recover needs calibration data", hint="give calibration (--data); labels are not used")
        pair = pair_programs(program, original, plan)
        return self.improve(pair, context.calibration, context.seed, context.progress)

    def check(self) -> None:
        """Raise OptionError for what is wrong or would have no effect."""
        if self.method not in _METHODS:
            raise OptionError(f"method is {self.method!r}", hint=f"choose {' or '.join(_METHODS)}")
        if self.ridge is not None and self.method != "least-squares":
            raise OptionError(f"ridge has no effect with method={self.method}", hint="leave it out")
        if self.method == "none" and not self.epochs:
            raise OptionError("method=none without epochs does nothing", hint="give epochs, such as epochs=20")
        for name, value in (("ridge", self.ridge), ("learning_rate", self.learning_rate)):
            if value is not None and (isinstance(value, bool) or not value > 0):
                raise OptionError(f"{name} is {value!r}", hint="give a positive number such as 1e-3, or leave it out")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 0:
            raise OptionError(f"epochs is {self.epochs!r}", hint="give a whole number, 0 for none")
        if self.augment is not None and self.augment not in AUGMENTATIONS:
            raise OptionError(f"augment is {self.augment!r}", hint=f"choose one of {', '.join(AUGMENTATIONS)}")
        given = (("learning_rate", self.learning_rate), ("augment", self.augment), ("bfloat16", self.bfloat16))
        idle = [name for name, value in given if value]
        if idle and not self.epochs:
            raise OptionError(f"{idle[0]} has no effect without training", hint="give epochs too, such as epochs=20")
        if self.bfloat16 and not has_bfloat16():
            raise OptionError("bfloat16 has no instructions on this processor: it would be slow", hint="leave it out")

    def improve(self, pair: Pair, calibration: Any, seed: int, progress: Progress | None) -> Change:
        """Change the weights of `pair.pruned` in place."""
        batches = as_batches(pair.pruned, calibration)
        with torch.no_grad():
            change = self._estimate(pair, batches, progress)
            if self.epochs:
                change.notes.append(self._refine(pair, batches, seed, progress))
        return change

    def _estimate(self, pair: Pair, batches: Batches, progress: Progress | None) -> Change:
        tell = _reporter(progress, "recover")
        if self.method == "none":
            return Change(sum(1 for _ in pair.pruned.parameters()))
        if self.method == "batchnorm":
            count, notes = reestimate_statistics(pair.pruned, batches, pair.affected, tell)
            return Change(count, [f"statistics of {count} BatchNorm layers computed anew", *notes])
        done = reconstruct(pair, batches, self.ridge, progress=tell)
        ratios = [after / before for before, after in done.errors.values() if before > 0]
        found = f"{len(done.errors)} layers reconstructed in {done.sweeps} sweeps over the data"
        if ratios:
            found += f"; what their outputs missed is {median(ratios):.2f} (median) of what it was"
        return Change(len(done.errors), [found, *done.notes])

    def _refine(self, pair: Pair, batches: Batches, seed: int, progress: Progress | None) -> str:
        schedule = Schedule(
            epochs=self.epochs,
            learning_rate=self.learning_rate or _LEARNING_RATE,
            batch_size=_BATCH_SIZE,
            augment=AUGMENTATIONS[self.augment or "none"],
            bfloat16=self.bfloat16,
            seed=seed,
        )
        before, after = refine(pair, batches, schedule, _reporter(progress, "train"))
        kept = "" if after < before else "; no better, so the weights stay as they were"
        return f"{self.epochs} epochs of training: squared error of the outputs {before:.3g} to {after:.3g}{kept}"


def _reporter(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(what, done, total)) if progress else None
