"""The passes `prune` and `verify-pruning`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import OptionError, VerificationError
from ...frontend.agreement import draws_random
from ...frontend.program import Program
from ..base import Change, Context, Pass, register_pass
from .budgets.budget import Scope
from .importance.criteria import Aggregate, Normalize
from .importance.registry import find_criterion
from .kinds.block_importance import DATA_IMPORTANCES
from .kinds.plans import Kind
from .masking import oracle_error
from .plan import PruningPlan
from .planning import plan_pruning

RESULT = "prune"  # the plan, in context.results; of several pruning passes in a row the merged one
ORIGINAL = "prune.original"  # the program that it belongs to, as it was before
LAST = "prune.last"  # the last pruning pass by itself

TOLERANCE = 1e-9  # largest relative difference from the oracle in float64: float reordering, nothing else


@register_pass
@dataclass(frozen=True)
class Prune(Pass):
    """Remove channels, hidden units, single weights or residual blocks until a budget is met.

    `kind`: channels (and other positions of dimensions), neurons, unstructured, n:m or blocks. Of channels, the axis
    algebra finds what must go together; importance decides what goes. `macs`, `params`, `size` and `latency` are the
    share that is kept, `ratio` the share of every group that is removed; `ratios` are texts "glob:share", such as
    `layer1.*:0.3`, with the share to remove where a group runs through such a layer. With `verify` the result is
    compared with the oracle, the original with the removed positions zeroed, in float64. The plan is left in
    `context.results["prune"]`; when another prune pass ran before, both plans are merged there.
    """

    kind: Kind = "channels"
    macs: float | None = None
    params: float | None = None
    size: float | None = None
    latency: float | None = None
    ratio: float | None = None
    scope: Scope | None = None
    ratios: tuple[str, ...] = ()
    threshold: float | None = None
    pattern: str | None = None
    importance: str = "l2"
    aggregate: Aggregate | None = None
    normalize: Normalize | None = None
    round_to: int | None = None
    exclude: tuple[str, ...] = ()
    max_ratio: float | None = None
    min_channels: int | None = None
    verify: bool = True

    name = "prune"
    preserves = frozenset({"interface"})

    def run(self, program: Program, context: Context) -> Change:
        plan = plan_pruning(
            program,
            kind=self.kind,
            macs=self.macs,
            params=self.params,
            size=self.size,
            latency=self.latency,
            ratio=self.ratio,
            scope=self.scope,
            ratios=self.ratios,
            threshold=self.threshold,
            pattern=self.pattern,
            importance=self.importance,
            aggregate=self.aggregate,
            normalize=self.normalize,
            round_to=self._rounding(context),
            exclude=self.exclude,
            max_ratio=self.max_ratio,
            min_channels=self.min_channels,
            data=self._data(context),
            seed=context.seed,
            latencies=context.latencies if self.latency is not None else None,
        )
        original = program.copy()
        program.graph_module = plan.apply(program).graph_module
        notes = [_figures(plan), *plan.effects, *plan.notes, *_remember(context, plan, original, program)]
        if self.verify:
            notes.append(_verified(plan, original, program, TOLERANCE, context.seed))
        return Change(sum(len(r.removed) for r in plan.removals) + plan.zeros + len(plan.blocks), notes)

    def _data(self, context: Context) -> Any:
        """The calibration data, where the importance reads data."""
        if self.kind == "channels":
            reads_data = find_criterion(self.importance).needs_data
        else:
            reads_data = self.kind == "blocks" and self.importance in DATA_IMPORTANCES
        return context.calibration if reads_data else None

    def _rounding(self, context: Context) -> int | None:
        if self.round_to is None and context.target is not None and self.kind in ("channels", "neurons"):
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
        last = context.results.get(LAST)
        if not isinstance(last, _Step):
            raise OptionError("verify-pruning has nothing to verify", hint="put it directly after prune{...}")
        return Change(0, [_verified(last.plan, last.original, program, self.tolerance_relative, context.seed)])


@dataclass(frozen=True)
class _Step:
    """One pruning pass: its plan, the program before it, and the shapes of the parameters after it."""

    plan: PruningPlan
    original: Program
    shapes: dict[str, tuple[int, ...]]


def _remember(context: Context, plan: PruningPlan, original: Program, pruned: Program) -> list[str]:
    """Put the plan into the results, merged with the plan before it where parameters are still those that it left."""
    last = context.results.get(LAST)
    context.results[LAST] = _Step(plan, original, _shapes(pruned))
    earlier = context.results.get(RESULT)
    if isinstance(last, _Step) and isinstance(earlier, PruningPlan):
        if last.shapes == _shapes(original):
            context.results[RESULT] = earlier.merge(plan)
            return ["merged with the plan of the pruning pass before it"]
        context.results[RESULT], context.results[ORIGINAL] = plan, original
        return ["not merged with the plan before it: a pass in between changed which parameters there are"]
    context.results[RESULT], context.results[ORIGINAL] = plan, original
    return []


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in program.state_dict().items()}


def _verified(plan: PruningPlan, original: Program, pruned: Program, tolerance: float, seed: int) -> str:
    if draws_random(original):
        return "not compared with the masked original: the model draws random numbers, other ones for other shapes"
    error = oracle_error(plan.mask(original), pruned, seed=seed)
    if not error <= tolerance:
        raise VerificationError(
            f"the pruned program differs from its oracle by {error:.2e} relative (allowed {tolerance:.0e})",
            hint="this is a bug in fxpress if nothing ran in between; exclude the layers that you suspect",
        )
    return f"equal to the masked original: {error:.1e} relative in float64"


def _figures(plan: PruningPlan) -> str:
    kept = plan.macs[1] / max(plan.macs[0], 1), plan.parameters[1] / max(plan.parameters[0], 1)
    groups = f" in {len(plan.groups)} groups" if plan.groups else ""
    return f"kept {kept[0]:.1%} of the MACs and {kept[1]:.1%} of the parameters{groups}"
