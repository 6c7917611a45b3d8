"""The passes `prune` and `verify-pruning`."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import OptionError, VerificationError
from ...frontend.program import Program
from ..base import Change, Context, Pass, register_pass
from .masking import oracle_error
from .plan import PruningPlan
from .planning import plan_pruning

RESULT = "prune"  # the plan, in context.results
ORIGINAL = "prune.original"  # the program before pruning, for verify-pruning

TOLERANCE = 1e-9  # largest relative difference from the oracle in float64: float reordering, nothing else


@register_pass
@dataclass(frozen=True)
class Prune(Pass):
    """Remove whole channels (and other positions of dimensions) until a budget is met.

    The axis algebra finds what must go together; importance decides what goes. `macs` and `params` are the share that
    is kept, `ratio` the share of every group that is removed. With `verify` the result is compared with the oracle,
    the original with the removed positions zeroed, in float64. The plan is left in `context.results["prune"]`.
    """

    macs: float | None = None
    params: float | None = None
    ratio: float | None = None
    importance: str = "l2"
    round_to: int | None = None
    exclude: tuple[str, ...] = ()
    max_ratio: float | None = None
    verify: bool = True

    name = "prune"
    preserves = frozenset({"interface"})

    def run(self, program: Program, context: Context) -> Change:
        plan = plan_pruning(
            program,
            macs=self.macs,
            params=self.params,
            ratio=self.ratio,
            importance=self.importance,
            round_to=self._rounding(context),
            exclude=self.exclude,
            max_ratio=self.max_ratio,
            seed=context.seed,
        )
        original = program.copy()
        context.results[RESULT], context.results[ORIGINAL] = plan, original
        program.graph_module = plan.apply(program).graph_module
        notes = [_figures(plan), *plan.notes]
        if self.verify:
            notes.append(_verified(plan, original, program, TOLERANCE, context.seed))
        return Change(sum(len(r.removed) for r in plan.removals), notes)

    def _rounding(self, context: Context) -> int | None:
        if self.round_to is None and context.target is not None:
            return context.target.round_to
        return self.round_to


@register_pass
@dataclass(frozen=True)
class VerifyPruning(Pass):
    """Compare the program with the oracle of the pruning pass before it, in float64.

    Must directly follow `prune`: what later passes round would count as error of the pruning.
    """

    tolerance_relative: float = TOLERANCE

    name = "verify-pruning"
    preserves = frozenset({"interface", "values"})

    def run(self, program: Program, context: Context) -> Change:
        plan, original = context.results.get(RESULT), context.results.get(ORIGINAL)
        if not isinstance(plan, PruningPlan) or not isinstance(original, Program):
            raise OptionError("verify-pruning has nothing to verify", hint="put it directly after prune{...}")
        return Change(0, [_verified(plan, original, program, self.tolerance_relative, context.seed)])


def _verified(plan: PruningPlan, original: Program, pruned: Program, tolerance: float, seed: int) -> str:
    error = oracle_error(plan.mask(original), pruned, seed=seed)
    if not error <= tolerance:
        raise VerificationError(
            f"the pruned program differs from its oracle by {error:.2e} relative (allowed {tolerance:.0e})",
            hint="this is a bug in fxpress if nothing ran in between; exclude the layers that you suspect",
        )
    return f"equal to the masked original: {error:.1e} relative in float64"


def _figures(plan: PruningPlan) -> str:
    kept = plan.macs[1] / max(plan.macs[0], 1), plan.parameters[1] / max(plan.parameters[0], 1)
    return f"kept {kept[0]:.1%} of the MACs and {kept[1]:.1%} of the parameters in {len(plan.groups)} groups"
