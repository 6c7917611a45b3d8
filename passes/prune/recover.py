"""`recover`: give a pruned program back its accuracy, from a few batches without labels. And the pass of that name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from ...errors import OptionError
from ...frontend.batches import as_batches
from ...frontend.program import Program, StageRecord
from ..base import Change, Context, Pass, register_pass
from ..memory import peak_memory
from .pairing import Pair, pair_programs
from .passes import ORIGINAL, RESULT
from .plan import PruningPlan
from .reconstruct import reconstruct
from .reestimate import reestimate_statistics

Method = Literal["least-squares", "batchnorm"]
Progress = Callable[[str, int, int | None], None]


def recover(
    pruned: Program,
    calibration: Any,
    *,
    reference: Program,
    plan: PruningPlan,
    method: Method = "least-squares",
    ridge: float | None = None,
    progress: Progress | None = None,
) -> Program:
    """A new program with the structure of `pruned` and weights that bring its values back to those of `reference`.

    `pruned` is `plan.apply(reference)`, directly or with other weights. `calibration` is any iterable of batches,
    labels are ignored; a few hundred samples do. No argument is changed.

    `method`: "least-squares" reconstructs layer by layer the weights of all that reads what was removed; "batchnorm"
    only computes BatchNorm's running statistics anew. `ridge` is the damping of the least squares relative to the mean
    square of a layer's inputs; by default it is chosen for each output on every fifth sample, held out from the fit.

    What was done and what was left alone, with the reason, is in the last entry of `log` of the result.
    Raises PruningError (programs and plan do not belong together), DataError, OptionError.
    """
    settings = Recover(method, ridge)
    settings.check()
    result = pruned.copy()
    start = time.perf_counter()
    with peak_memory() as memory:
        change = settings.improve(pair_programs(result, reference, plan), calibration, progress)
    seconds = time.perf_counter() - start
    result.log.append(StageRecord("recover", seconds, change.count, change.notes, memory.megabytes))
    return result


@register_pass
@dataclass(frozen=True)
class Recover(Pass):
    """Reconstruct what pruning cost, from calibration data without labels.

    Must directly follow `prune`. `method=least-squares` gives each layer behind a removed channel the weights with
    which its output is closest to that of the original, in order, each on the inputs that the recovered layers before
    it give; `method=batchnorm` computes only BatchNorm's statistics anew. `ridge` damps the least squares.
    """

    method: Method = "least-squares"
    ridge: float | None = None

    name = "recover"
    preserves = frozenset({"interface"})

    def run(self, program: Program, context: Context) -> Change:
        self.check()
        plan, original = context.results.get(RESULT), context.results.get(ORIGINAL)
        if not isinstance(plan, PruningPlan) or not isinstance(original, Program):
            raise OptionError("recover has nothing to recover", hint="put it directly after prune{...}")
        if context.calibration is None:
            raise OptionError("recover needs calibration data", hint="give calibration (--data); labels are not used")
        return self.improve(pair_programs(program, original, plan), context.calibration, context.progress)

    def check(self) -> None:
        """Raise OptionError for what is wrong or would have no effect."""
        if self.method not in ("least-squares", "batchnorm"):
            raise OptionError(f"method is {self.method!r}", hint="choose least-squares or batchnorm")
        if self.ridge is None:
            return
        if self.method == "batchnorm":
            raise OptionError("ridge has no effect with method=batchnorm", hint="leave it out")
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not self.ridge > 0:
            raise OptionError(f"ridge is {self.ridge!r}", hint="give a positive number such as 1e-3, or leave it out")

    def improve(self, pair: Pair, calibration: Any, progress: Progress | None) -> Change:
        """Change the weights of `pair.pruned` in place."""
        batches = as_batches(pair.pruned, calibration)
        tell = (lambda done, total: progress("recover", done, total)) if progress else None
        with torch.no_grad():
            if self.method == "batchnorm":
                count, notes = reestimate_statistics(pair.pruned, batches, pair.affected, tell)
                return Change(count, [f"statistics of {count} BatchNorm layers computed anew", *notes])
            done = reconstruct(pair, batches, self.ridge, progress=tell)
        ratios = [after / before for before, after in done.errors.values() if before > 0]
        found = f"{len(done.errors)} layers reconstructed in {done.sweeps} sweeps over the data"
        if ratios:
            found += f"; what their outputs missed is {median(ratios):.2f} (median) of what it was"
        return Change(len(done.errors), [found, *done.notes])
