"""Why a node is computed in float, and what would change it: written when the table decides, read by the report."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ...frontend.program import Program
from .expand import form_turned_off
from .spec import KEPT_FLOAT, KEPT_REASON, Target

_REASON, _HINT = "float_reason", "float_hint"
Reason = tuple[str, str]  # why, and what would change it


def state_reasons(program: Program, target: Target, integer: Collection[fx.Node]) -> None:
    """Write on every node that is not among `integer` why it is computed in float."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in integer:
            reason, hint = explain(node, target)
            node.meta["custom"] = {**(node.meta.get("custom") or {}), _REASON: reason, _HINT: hint}


def stated_reasons(program: Program) -> dict[str, Reason]:
    """Node name -> (reason, hint), as `state_reasons` wrote them; they stay on the nodes when the program is folded."""
    customs = {n.name: n.meta.get("custom") or {} for n in program.graph.nodes}
    return {name: (custom[_REASON], custom[_HINT]) for name, custom in customs.items() if _REASON in custom}


def explain(node: fx.Node, target: Target) -> Reason:
    """Why `node` is computed in float although or because the table says so."""
    if node.meta.get(KEPT_FLOAT):
        return KEPT_REASON, "take it out of keep_float, or allow a larger --max-drop"
    form = form_turned_off(node, target)
    if form is not None:
        reason = next((r.reason for r in target.rows if r.form == form), "")
        return reason or f"the form {form!r} is off", f"quantize{{forms=[{form}]}}, or use_integer with its name"
    row = target.row_for(node)
    if row is None or row.kind == "float":
        return target.explain_float(node)
    return (
        "what it reads is there in float, or nothing reads its result on integers",
        "to quantize for it alone would cost more than it gains",
    )
