"""Prune in several steps with recovery in between: what goes next is judged on a network that has got over the last."""

from __future__ import annotations

import functools
import numbers
from typing import Any, Literal, Protocol

from ....errors import OptionError
from ....frontend.batches import as_batches
from ....frontend.program import Program
from ..plan import PruningPlan
from ..planning import plan_pruning
from .recover import Augmentation, Method, Progress, recover


class Choose(Protocol):
    """`plan_pruning` with some of its options given: `functools.partial(fxpress.plan_pruning, importance="l2")`."""

    def __call__(self, program: Program, **budget: float) -> PruningPlan: ...


def prune_and_recover(
    program: Program,
    calibration: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    steps: int = 1,
    choose: Choose | None = None,
    method: Method = "least-squares",
    ridge: float | None = None,
    epochs: int = 0,
    learning_rate: float | None = None,
    augment: Augmentation | None = None,
    bfloat16: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Program, PruningPlan]:
    """Prune `program`, which is not changed, down to the share `macs` or `params` in `steps` equal factors.

    After each step the program is recovered on `calibration` towards the original; the training of `epochs` follows the
    last step. `choose` makes the plan of each step; by default channels go by importance "hessian", for what they cost,
    on the calibration data. The other options are those of `recover`.

    Returns the recovered program and one plan, with indices of the original. Raises what `recover` and `choose` raise.
    """
    name, share = budget_of(macs, params)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps is {steps!r}", hint="give a positive whole number")
    batches = as_batches(program, calibration)
    if choose is None:
        choose = functools.partial(plan_pruning, importance="hessian", normalize="cost", data=batches, seed=seed)
    recovering = functools.partial(recover, reference=program, method=method, ridge=ridge, seed=seed, progress=progress)
    training = functools.partial(
        recovering, epochs=epochs, learning_rate=learning_rate, augment=augment, bfloat16=bfloat16
    )
    current, plan = program, None
    for number in range(1, steps + 1):
        left = kept_share(plan, name) if plan is not None else 1.0
        step = choose(current, **{name: min(share ** (number / steps) / left, 1.0)})
        pruned = step.apply(current)
        plan = step if plan is None else plan.merge(step)
        last = number == steps
        current = (training if last else recovering)(pruned, batches, plan=plan)
    assert plan is not None
    return current, plan


def budget_of(macs: float | None, params: float | None) -> tuple[Literal["macs", "params"], float]:
    """Which budget is given, and the share. Raises OptionError unless it is exactly one, in (0, 1]."""
    if (macs is None) == (params is None):
        raise OptionError("give exactly one budget, macs or params", hint="for example macs=0.5")
    share = macs if macs is not None else params
    assert share is not None
    if not isinstance(share, numbers.Real) or isinstance(share, bool) or not 0 < share <= 1:
        raise OptionError(f"the budget is {share!r}", hint="give the share that is kept, in (0, 1]")
    return ("macs" if macs is not None else "params"), float(share)


def kept_share(plan: PruningPlan, name: str) -> float:
    """The share of `name` ("macs" or "params") that a plan keeps."""
    before, after = plan.macs if name == "macs" else plan.parameters
    return after / max(before, 1)
