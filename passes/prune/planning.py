"""`plan_pruning`: from a budget and an importance to a `PruningPlan`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ...errors import OptionError, PruningError
from ...frontend.program import Program
from .analysis import Analysis
from .axes import Reason, Vector
from .budgets.budget import Budget, Ratios, Scope, Selection, select
from .budgets.choices import Choice, make_choices
from .budgets.costs import channel_cost, macs_cost, parameter_cost, size_cost
from .budgets.latency import select_latency
from .budgets.measuring import OpLatencies
from .budgets.units import at_batch_one
from .excluding import as_patterns, excluded
from .groups import Group, find_groups, places
from .importance.criteria import Aggregate, Normalize
from .importance.scores import Importance
from .importance.sensitivity import Loss
from .kinds.neurons import unit_scores
from .kinds.plans import Kind, check_effects, given_options, plan_blocks, plan_n_of_m, plan_unstructured
from .plan import GroupSummary, PruningPlan, Removal
from .rules.table import analyze

_COSTS = {"macs": macs_cost, "params": parameter_cost, "size": size_cost}


def plan_pruning(
    program: Program,
    *,
    kind: Kind = "channels",
    macs: float | None = None,
    params: float | None = None,
    size: float | None = None,
    latency: float | None = None,
    ratio: float | None = None,
    scope: Scope | None = None,
    ratios: Ratios = (),
    threshold: float | None = None,
    pattern: str | None = None,
    importance: str = "l2",
    aggregate: Aggregate | None = None,
    normalize: Normalize | None = None,
    round_to: int | None = None,
    exclude: Iterable[str] = (),
    max_ratio: float | None = None,
    min_channels: int | None = None,
    data: Any = None,
    loss: Loss | None = None,
    seed: int = 0,
    latencies: OpLatencies | None = None,
) -> PruningPlan:
    """Choose what to remove from `program`, which is not changed.

    Exactly one budget: `macs`, `params`, `size` (bytes of parameters and buffers) or `latency` (time of one example,
    measured by `latencies`), the share that is kept, or `ratio`, the share that is removed (all in (0, 1); a share of 1
    keeps everything). `scope`: "global", all groups compete for the budget, or "layer", every layer (of a ratio: every
    group) meets it by itself; a ratio is meant by layer, anything else globally. `ratios`: shares to remove by glob of
    layer names, {"layer1.*": 0.3}; the groups that run through those layers do not compete for the budget. Of a
    dimension that is a product, heads times features, each factor bears its part of a ratio.
    `importance`: the name of a criterion (`passes.prune.importance.registry`,
    docs/pruning.md): l1, l2, bn-scale, fpgm, lamp, random; with `data` wanda, reconstruction, compensated, taylor,
    hessian; or one of your own. `aggregate` (mean, sum, max, prod: over coupled layers) and `normalize` (mean, max,
    sum, gaussian, lamp, none: within a layer; cost: by what a channel costs) replace what suits the criterion.
    `round_to`: group sizes are multiples of it, those of groups below 4 `round_to` of its half, of still narrower ones
    (below `round_to`) of its quarter, 4 at least (default 1; for a latency what the target's kernels like).
    `exclude`: globs of names of parameters or layers that keep their shape. `max_ratio`: the largest share removed
    from any dimension. `min_channels`: no dimension gets shorter. `data`: batches of inputs, for the importances that
    need them; labels are ignored unless `loss(outputs, labels)` is given, which taylor and hessian then use. What is
    random is drawn from `seed`.

    `kind`: "channels" is all of the above. "neurons": hidden units of linear layers only, by the l1 or l2 norm of their
    outgoing weights; `threshold`, a norm, is another budget for them. "unstructured": the single weights that are
    smallest become zero, by `ratio` or `threshold`. "n:m": of every m weights the n largest stay, `pattern` "2:4".
    "blocks": whole residual blocks go, by macs, params or ratio (docs/pruning.md).

    Raises OptionError (a bad or effectless option) and PruningError (a quantized program, an impossible budget).
    """
    check_effects(kind, given_options(plan_pruning, locals()))
    if kind == "unstructured":
        return plan_unstructured(program, ratio, threshold, importance, scope, max_ratio, exclude, seed)
    if kind == "n:m":
        return plan_n_of_m(program, pattern, importance, exclude, seed)
    if kind == "blocks":
        return plan_blocks(program, macs, params, ratio, importance, exclude, data)
    shares = {"macs": macs, "params": params, "size": size, "latency": latency, "ratio": ratio, "threshold": threshold}
    if round_to is None and latency is not None and latencies is not None:
        round_to = latencies.round_to
    budget = Budget.checked(shares, scope, ratios, round_to, max_ratio, min_channels)
    _check_clock(budget, latencies)
    criterion = Importance.checked(importance, aggregate, normalize, data, loss, seed)
    analysis = analyze(at_batch_one(program) if latencies else program)
    _pin_excluded(analysis, as_patterns(exclude))
    if kind == "neurons":
        groups, scores = unit_scores(analysis, importance, relative=threshold is None)
    else:
        groups = find_groups(analysis)
        _check_any(groups)
        scores = criterion.of(analysis, groups, _COSTS.get(budget.name, macs_cost)(analysis), program)
    judged = [g for g in groups if np.isfinite(scores[g.literals]).all()]
    choices = make_choices(analysis, judged, scores, budget.limits)
    request = ("" if kind == "channels" else f"kind={kind}, ") + f"{budget}, importance={importance}"
    if latencies is None:
        selection = _select(analysis, groups, choices, budget)
    else:
        ratio_of = lambda keep: latencies.ratio(program, _plan(analysis, groups, keep, request).apply(program))  # noqa: E731
        selection = select_latency(analysis, choices, budget, latencies, ratio_of)
    notes = (*selection.notes, *_silence(importance, len(groups) - len(judged)))
    return _plan(analysis, groups, selection.keep, request, notes)


def _select(analysis: Analysis, groups: list[Group], choices: list[Choice], budget: Budget) -> Selection:
    """Meet any budget but latency."""
    if budget.name in ("ratio", "threshold"):
        return select(analysis, choices, budget, channel_cost(analysis, groups))
    return select(analysis, choices, budget, _COSTS[budget.name](analysis))


def _plan(
    analysis: Analysis, groups: list[Group], keep: Vector, request: str, notes: tuple[str, ...] = ()
) -> PruningPlan:
    """What a mask over atoms means for the parameters, with its figures."""
    everything = np.ones(analysis.atoms.count, dtype=bool)
    costs = (macs_cost(analysis), parameter_cost(analysis))
    macs_pair, params_pair = ((round(c(everything)), round(c(keep))) for c in costs)
    return PruningPlan(
        removals=_removals(analysis, keep),
        groups=tuple(_summary(g, keep) for g in groups),
        macs=macs_pair,
        parameters=params_pair,
        request=request,
        notes=notes,
    )


# -- options ------------------------------------------------------------------------------------------------------


def _check_clock(budget: Budget, latencies: OpLatencies | None) -> None:
    """A latency budget needs measurements, and nothing else has a use for them."""
    if budget.name == "latency" and latencies is None:
        hint = "use fxpress.plan_pruning or fxpress.compile, which measure, or give Context(latencies=...)"
        raise OptionError("latency needs measurements of the runtime, and there are none here", hint=hint)
    if budget.name != "latency" and latencies is not None:
        raise OptionError(f"latencies have no effect on {budget.name}", hint="leave them out, or ask for latency=0.6")


def _check_any(groups: list[Group]) -> None:
    if not groups:
        raise PruningError(
            "nothing in this program can be pruned", hint="`fxpress inspect` says what is pinned and why"
        )


def _silence(importance: str, groups: int) -> list[str]:
    return [f"importance {importance} says nothing about {groups} groups, which are kept whole"] if groups else []


def _pin_excluded(analysis: Analysis, patterns: list[str]) -> None:
    """Parameters whose name, or the name of whose layer, matches a glob keep their shape."""
    names = {name: (name,) for name in analysis.tensors}
    for pattern in patterns:
        for name in excluded(names, [pattern]):
            for vector in analysis.tensors[name]:
                analysis.atoms.pin(vector, Reason(f"excluded by {pattern!r}"))


# -- from literals to indices ----------------------------------------------------------------------------------------


def _removals(analysis: Analysis, keep: Vector) -> tuple[Removal, ...]:
    result = []
    for place, vector in places(analysis):
        kept = keep[analysis.atoms.resolve(vector)].all(axis=0)
        if not kept.all():
            removed = tuple(map(int, np.flatnonzero(~kept)))
            result.append(Removal(place.name, place.dim, len(vector), removed))
    return tuple(result)


def _summary(group: Group, keep: Vector) -> GroupSummary:
    return GroupSummary(len(group), int(keep[group.literals].sum()), tuple(map(str, group.places)))
