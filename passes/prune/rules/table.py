"""The table of rules, and the walk that applies them: how ops relate the axes of inputs and outputs.

A rule is a function `(analysis, node) -> axes of the output`. To add one, write it in the file of its family and add
its row there; `tests/test_prune_rules.py` shows how to prove it with the oracle. An op without a row pins all it
touches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ....errors import PruningError
from ....frontend.program import Program, source_of
from ..analysis import Analysis, Value, concrete, flat_axes, op_name, shape_of
from ..axes import Atoms, Axes, Reason
from .einsum import EINSUM_RULES
from .elementwise import ELEMENTWISE_RULES
from .layers import LAYER_RULES
from .movement import MOVEMENT_RULES
from .recurrent import RECURRENT_RULES
from .reduce import REDUCE_RULES
from .shape import SHAPE_RULES

Rule = Callable[[Analysis, fx.Node], Value]

RULES: dict[str, Rule] = {
    **ELEMENTWISE_RULES,
    **LAYER_RULES,
    **EINSUM_RULES,
    **RECURRENT_RULES,
    **REDUCE_RULES,
    **SHAPE_RULES,
    **MOVEMENT_RULES,
}


def relate(analysis: Analysis, node: fx.Node) -> Value:
    """The axes of what `node` gives, by its rule; pinned where there is none, or none that can read this call."""
    rule = RULES.get(op_name(node))
    if rule is None:
        return unknown(analysis, node, f"no pruning rule for {op_name(node)}")
    try:
        return rule(analysis, node)
    except (TypeError, ValueError, IndexError, KeyError, AssertionError) as error:
        # A literal that is computed, a form that the rule does not know. Pinning outweighs what it did until then.
        return unknown(analysis, node, f"the pruning rule for {op_name(node)} cannot read this call ({error!r:.60})")


def unknown(analysis: Analysis, node: fx.Node, reason: str) -> Value:
    """Nothing that goes in or comes out may change."""
    for used in node.all_input_nodes:
        for axes in flat_axes(analysis.values.get(used, ())):
            analysis.pin(axes, node, reason)
    analysis.costs(node)  # whatever it costs, pruning leaves that alone
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return _fixed(analysis.atoms, value)
    return [_fixed(analysis.atoms, v) if isinstance(v, torch.Tensor) else () for v in value]


def _fixed(atoms: Atoms, value: torch.Tensor) -> Axes:
    return tuple(atoms.fixed(concrete(s)) for s in value.shape)


# -- the walk -----------------------------------------------------------------------------------------------------


def analyze(program: Program) -> Analysis:
    """The axes of every tensor of `program`, which must be a float program. Linear in its size.

    Raises PruningError for a quantized program.
    """
    analysis = Analysis(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and op_name(node).startswith("fxpress."):
            raise PruningError(
                f"the program is quantized ({op_name(node)}), and pruning works on float weights",
                where=source_of(node),
                hint="prune first, then quantize",
            )
        _visit(analysis, node)
    _pin_integers(analysis)
    return analysis


def _visit(analysis: Analysis, node: fx.Node) -> None:
    """Give `node` its axes."""
    if node.op == "get_attr":
        name = str(node.target)
        if _gives_tensors(node) or analysis.holds_tensor(name):
            analysis.values[node] = analysis.tensor_axes(name)
    elif node.op == "placeholder":
        if isinstance(node.meta.get("val"), torch.Tensor):
            # A dynamic dimension has no positions of its own: its size here is that of the example.
            dynamic = [not isinstance(n, int) for n in node.meta["val"].shape]
            make = [analysis.atoms.fixed if d else analysis.atoms.fresh for d in dynamic]
            analysis.values[node] = tuple(f(n) for f, n in zip(make, shape_of(node)))
            analysis.pin(analysis.axes(node), node, f"input {node.target} of the model")
    elif node.op == "output":
        for used in node.all_input_nodes:
            for axes in flat_axes(analysis.values.get(used, ())):
                analysis.pin(axes, used, "output of the model")
    elif node.op == "call_function" and _gives_tensors(node):
        analysis.values[node] = relate(analysis, node)


def _pin_integers(analysis: Analysis) -> None:
    """Integer parameters and buffers hold indices, not weights that could be left out."""
    for name in analysis.integers:
        for vector in analysis.tensors[name]:
            analysis.atoms.pin(vector, Reason(f"{name} is not a floating-point tensor"))


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)
