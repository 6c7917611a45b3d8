"""The kinds of pruning beside channels, as plans of the same form: single weights, n of m, whole residual blocks.

`planning.plan_pruning(kind=...)` is what users call; hidden units (`kind="neurons"`) are channels of certain groups and
are planned there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from ....errors import OptionError, PruningError
from ....frontend.batches import as_batches
from ....frontend.cost import cost_table, count_macs, op_name
from ....frontend.program import Program, source_of
from ..excluding import as_patterns, excluded
from ..plan import PruningPlan
from .block_importance import block_importances
from .blocks import Block, DataFlow, find_blocks
from .magnitude import below_threshold, n_of_m, parse_pattern, smallest_share, weight_scores
from .sparsify import SparseMask
from .weight_uses import WeightUse, weight_uses

Kind = Literal["channels", "neurons", "unstructured", "n:m", "blocks"]

# What each kind reads; channels and hidden units read all options but these.
_READ = {
    "unstructured": frozenset({"ratio", "threshold", "importance", "scope", "max_ratio", "exclude", "seed"}),
    "n:m": frozenset({"pattern", "importance", "exclude", "seed"}),
    "blocks": frozenset({"macs", "params", "ratio", "importance", "exclude", "data", "seed"}),
}
_NOT_READ = {
    "channels": frozenset({"threshold", "pattern"}),
    "neurons": frozenset({"pattern", "data", "loss", "aggregate", "normalize"}),
}
_INSTEAD = {
    "channels": "threshold is for kind=unstructured and kind=neurons, pattern for kind=n:m",
    "neurons": "give ratio, threshold, macs or params",
    "unstructured": "give ratio (the share of weights that goes) or threshold",
    "n:m": 'give pattern="2:4"',
    "blocks": "give macs or params (the share that is kept) or ratio (the share of blocks that goes)",
}


def check_effects(kind: object, given: Iterable[str]) -> None:
    """Raise OptionError for an unknown kind, and for options that are `given` though the kind does not read them."""
    if kind not in get_args(Kind):
        raise OptionError(f"kind is {kind!r}", hint=f"choose one of {', '.join(get_args(Kind))}")
    name = str(kind)
    idle = [n for n in given if (n not in _READ[name] if name in _READ else n in _NOT_READ[name])]
    if idle:
        raise OptionError(f"{', '.join(idle)} has no effect on kind={name}", hint=_INSTEAD[name])


def given_options(function: Callable[..., Any], values: Mapping[str, object]) -> list[str]:
    """The names of the options of `function` whose values are not the default (or empty)."""
    defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    return [n for n, default in defaults.items() if n != "kind" and not _is_default(values[n], default)]


def _is_default(value: object, default: object) -> bool:
    plain = isinstance(value, (str, int, float, tuple, list, set, dict)) or value is None
    return plain and (value == default or (default == () and not value))


# -- single weights -----------------------------------------------------------------------------------------------


def plan_unstructured(
    program: Program,
    ratio: float | None,
    threshold: float | None,
    importance: str,
    scope: str | None,
    max_ratio: float | None,
    exclude: Iterable[str],
    seed: int,
) -> PruningPlan:
    """The smallest weights become zero: the share `ratio` of all (`scope="layer"`: of each layer), or all below
    `threshold`."""
    _check_amounts(ratio, threshold, scope, max_ratio)
    names = list(_weights(program, exclude))
    scores = weight_scores(program, names, importance, seed)
    if threshold is not None:
        masks = below_threshold(scores, threshold, max_ratio)
    elif scope == "layer":
        masks = [m for n, s in scores.items() for m in smallest_share({n: s}, float(ratio or 0), max_ratio)]
    else:
        masks = smallest_share(scores, float(ratio or 0), max_ratio)
    amount = f"ratio={ratio:g}" if ratio is not None else f"threshold={threshold:g}"
    layer = ", scope=layer" if scope == "layer" else ""
    notes = [] if any(m.zeros for m in masks) else [f"no weight goes: all are above what {amount} means"]
    return _sparse(program, masks, f"kind=unstructured, {amount}{layer}, importance={importance}", notes)


def _check_amounts(ratio: object, threshold: object, scope: object, max_ratio: object) -> None:
    if (ratio is None) == (threshold is None):
        raise OptionError("give either ratio or threshold", hint=_INSTEAD["unstructured"])
    for name, value in (("ratio", ratio), ("max_ratio", max_ratio)):
        if value is not None and not (_is_number(value) and 0 < float(value) < 1):  # type: ignore[arg-type]
            raise OptionError(f"{name} is {value!r}", hint="give the share of weights that goes, in (0, 1)")
    if threshold is not None and not (_is_number(threshold) and float(threshold) > 0):  # type: ignore[arg-type]
        raise OptionError(f"threshold is {threshold!r}", hint="give a positive number, in units of the importance")
    if scope not in (None, "global", "layer"):
        raise OptionError(f"scope is {scope!r}", hint="choose global or layer")
    if scope is not None and threshold is not None:
        raise OptionError("scope has no effect beside a threshold", hint="a threshold is the same for all layers")


def plan_n_of_m(program: Program, pattern: object, importance: str, exclude: Iterable[str], seed: int) -> PruningPlan:
    """Of every m weights along the input dimension the n largest stay, the others become zero."""
    n, m = parse_pattern(pattern)
    weights = _weights(program, exclude)
    scores = weight_scores(program, weights, importance, seed)
    masks, note = n_of_m(scores, weights.values(), n, m)
    if not masks:
        raise PruningError(f"no weight can be pruned {n}:{m}: {note}", hint="choose a pattern that divides the layers")
    return _sparse(program, masks, f"kind=n:m, pattern={pattern}, importance={importance}", [note] if note else [])


def _weights(program: Program, exclude: Iterable[str]) -> dict[str, WeightUse]:
    """Name -> its first use, of all weights that may be pruned."""
    check_float(program)
    uses: dict[str, WeightUse] = {}
    for use in weight_uses(program):
        uses.setdefault(use.name, use)
    left_out = excluded({n: [n] for n in uses}, as_patterns(exclude))
    found = {n: use for n, use in uses.items() if n not in left_out}
    if not found:
        raise PruningError("this program has no weights that may be pruned", hint="exclude less")
    return found


def _sparse(program: Program, masks: list[SparseMask], request: str, notes: list[str]) -> PruningPlan:
    macs, parameters = count_macs(program), program.parameter_count
    some = tuple(m for m in masks if m.zeros)
    return PruningPlan((), (), (macs, macs), (parameters, parameters), request, tuple(notes), some)


def check_float(program: Program) -> None:
    """Raise PruningError for a quantized program."""
    for node in program.graph.nodes:
        if op_name(node).startswith("fxpress."):
            raise PruningError(
                f"the program is quantized ({op_name(node)}), and pruning works on float weights",
                where=source_of(node),
                hint="prune first, then quantize",
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- blocks -------------------------------------------------------------------------------------------------------


def plan_blocks(
    program: Program,
    macs: float | None,
    params: float | None,
    ratio: float | None,
    importance: str,
    exclude: Iterable[str],
    data: Any,
) -> PruningPlan:
    """The residual blocks that matter least are left out, until a budget is met."""
    name, share = _block_budget(macs, params, ratio)
    check_float(program)
    found = find_blocks(program)
    names = {b.node: [b.name, *b.tensors] for b in found}
    left_out = excluded(names, as_patterns(exclude))
    blocks = [b for b in found if b.node not in left_out]
    if not blocks:
        raise PruningError(
            "this program has no residual block that may be removed",
            hint="a block is x + f(x) of one shape, with parameters in f; exclude less, or prune channels",
        )
    scores = block_importances(program, blocks, importance, None if data is None else as_batches(program, data))
    order = [b for _, _, b in sorted((s, i, b) for i, (s, b) in enumerate(zip(scores, blocks)))]
    costs = BlockCosts(program)
    notes: list[str] = []
    if name == "ratio":
        chosen = order[: round(share * len(order))]
        if not chosen:
            hint = f"give at least {0.5 / len(order):.3g}, which is one"
            raise OptionError(f"ratio={share:g} of {len(order)} blocks is less than half a block", hint=hint)
    else:
        chosen = _within(order, share * costs.of([])[name], name, costs)
        notes = _short_of(costs.of(chosen)[name] / costs.of([])[name], share, name)
    return _without(program, blocks, chosen, costs, f"kind=blocks, {name}={share:g}, importance={importance}", notes)


def _block_budget(macs: float | None, params: float | None, ratio: float | None) -> tuple[str, float]:
    given = [(n, v) for n, v in (("macs", macs), ("params", params), ("ratio", ratio)) if v is not None]
    if len(given) != 1:
        names = ", ".join(n for n, _ in given) or "none"
        raise OptionError(f"give exactly one budget, got {names}", hint=_INSTEAD["blocks"])
    name, value = given[0]
    if not _is_number(value) or not 0 < value <= 1:
        raise OptionError(f"{name} is {value!r}", hint="give a share in (0, 1]")
    return name, float(value)


class BlockCosts:
    """MACs and parameters of a program without some of its blocks, read off what stays alive."""

    def __init__(self, program: Program) -> None:
        self._flow = DataFlow(program)
        self._rows = cost_table(program)
        self._parameters = dict(program.graph_module.named_parameters(remove_duplicate=False))

    def of(self, removed: Iterable[Block]) -> dict[str, int]:
        """{"macs": ..., "params": ...} without these blocks."""
        live = self._flow.live_nodes([(b.node, b.identity) for b in removed])
        read = [self._parameters.get(str(n.target)) for n in live if n.op == "get_attr"]
        sizes = {id(p): p.numel() for p in read if p is not None}  # a tied parameter counts once
        return {"macs": sum(row.macs for row in self._rows if row.node in live), "params": sum(sizes.values())}


def _within(order: list[Block], budget: float, name: str, costs: BlockCosts) -> list[Block]:
    """The least important blocks until the cost is within the budget; then those that are not needed come back."""
    chosen: list[Block] = []
    for block in order:
        if costs.of(chosen)[name] <= budget:
            break
        chosen.append(block)
    reached = costs.of(chosen)[name]
    if reached > budget:
        least = reached / costs.of([])[name]
        raise PruningError(
            f"{name}={budget / costs.of([])[name]:.4g} cannot be reached by removing residual blocks: without any of "
            f"the {len(order)} it is {name}={least:.4g}",
            hint="raise the budget, exclude less, or prune channels as well",
        )
    for block in reversed(chosen):
        fewer = [b for b in chosen if b is not block]
        if costs.of(fewer)[name] <= budget:
            chosen = fewer
    return chosen


def _short_of(reached: float, share: float, name: str) -> list[str]:
    if reached >= 0.99 * share:
        return []
    return [f"{name} ended at {reached:.4f} instead of {share:g}: blocks are removed whole, in the order of importance"]


def _without(
    program: Program, blocks: list[Block], chosen: list[Block], costs: BlockCosts, request: str, notes: list[str]
) -> PruningPlan:
    before, after = costs.of([]), costs.of(chosen)
    return PruningPlan(
        removals=(),
        groups=(),
        macs=(before["macs"], after["macs"]),
        parameters=(before["params"], after["params"]),
        request=request,
        notes=tuple(notes),
        blocks=tuple(b for b in blocks if b in chosen),
    )
