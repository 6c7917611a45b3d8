"""Remove what does nothing: dead code, dropout and identities in evaluation, and arithmetic on constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..frontend.program import Program
from .base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from .rewrite import (
    SAME_VALUES,
    argument,
    aten,
    constant,
    erase_dead,
    find,
    is_constant,
    put_constant,
    replace,
    set_argument,
)

_DROPOUTS = {
    aten.dropout.default,
    aten.alpha_dropout.default,
    aten.feature_dropout.default,
    aten.feature_alpha_dropout.default,
}
_COPIES = {aten.contiguous.default, aten.clone.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.to.device}
_RANDOM = {
    aten.rand.default,
    aten.randn.default,
    aten.bernoulli.default,
    aten.rand_like.default,
    aten.randn_like.default,
}


@register_pass
@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead code, dropout, identities and arithmetic on constants.

    1. Nodes without readers go, and parameters without nodes.
    2. Dropout in evaluation mode is the identity.
    3. `contiguous`, `clone`, a cast to the same dtype, `x + 0`, `x * 1` and a reshape to the same shape are identities.
    4. A node whose inputs are all constants is computed now. Its result is kept only up to `max_fold_mb`, so that a
       small recipe (`zeros`, `arange`, `expand`) is not replaced by a large table.
    5. A mask of attention that hides nothing goes: models make one where the caller gives none.
    """

    name = "cleanup"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False
    tolerance = 1e-6

    max_fold_mb: float = 16.0

    def run(self, program: Program, context: Context) -> Change:
        before = len(program.graph.nodes)
        folded = fold_constants(program, self.max_fold_mb)
        identities = drop_identities(program)
        masks = drop_masks(program)
        erase_dead(program)
        removed = before - len(program.graph.nodes)
        return Change(folded + identities + masks, [f"{removed} nodes fewer"] if removed > 0 else [])


def drop_identities(program: Program) -> int:
    """Rules 2 and 3."""
    dropped = 0
    for node in list(program.graph.nodes):
        if node.op == "call_function" and is_identity(node):
            replace(node, node.args[0])
            dropped += 1
    return dropped


def is_identity(node: fx.Node) -> bool:
    """Does this node give its first argument unchanged?"""
    target = node.target
    if target in _DROPOUTS:
        return not argument(node, "train") or argument(node, "p") == 0
    if target in _COPIES:
        return True
    if target in _CASTS or target in _RESHAPES:
        return _same_form(node)
    if target in (aten.add.Tensor, aten.sub.Tensor):
        return node.args[1] == 0 and _same_form(node)
    if target in (aten.mul.Tensor, aten.div.Tensor):
        return node.args[1] == 1 and _same_form(node)
    return False


_RESHAPES = {aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.expand.default, aten.unflatten.int}


def _same_form(node: fx.Node) -> bool:
    before, after = node.args[0], node.meta.get("val")
    value = before.meta.get("val") if isinstance(before, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return value.dtype == after.dtype and str(tuple(value.shape)) == str(tuple(after.shape))


def drop_masks(program: Program) -> int:
    """Rule 5."""
    dropped = 0
    for node in find(program, aten.scaled_dot_product_attention.default):
        mask = argument(node, "attn_mask")
        while isinstance(mask, fx.Node) and mask.target in SAME_VALUES:
            mask = mask.args[0]
        known = constant(program, mask) if is_constant(mask) else None
        if known is not None and known.requires_grad:  # a bias that is still to be learned
            continue
        if known is not None and bool(known.all() if known.dtype is torch.bool else (known == 0).all()):
            set_argument(node, "attn_mask", None)
            dropped += 1
    return dropped


def fold_constants(program: Program, max_mb: float) -> int:
    """Rule 4. A maximal constant subgraph is computed once and its results become buffers."""
    constants = _constant_nodes(program.graph)
    computed = [n for n in constants if n.op == "call_function"]
    frontier = [n for n in computed if any(u not in constants for u in n.users)]
    folded = 0
    for node in frontier:
        value = _evaluate(program, node)
        if not isinstance(value, torch.Tensor) or not _worth_keeping(program, node, value, max_mb):
            continue
        stored = put_constant(program, f"folded.{node.name}", value.detach().clone().contiguous(), node)
        stored.meta |= {k: v for k, v in node.meta.items() if k != "val"}
        replace(node, stored)
        folded += 1
    return folded


def _constant_nodes(graph: fx.Graph) -> dict[fx.Node, None]:
    """Nodes that depend on no input, in order. A trainable parameter by itself is not arithmetic on constants."""
    constants: dict[fx.Node, None] = {}
    for node in graph.nodes:
        stored = node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)
        computed = node.op == "call_function" and _is_pure(node) and all(n in constants for n in node.all_input_nodes)
        if stored or computed:
            constants[node] = None
    return constants


def _is_pure(node: fx.Node) -> bool:
    """Dequantized weights stay as they are: folding would undo the quantization. Random numbers are no constants."""
    if node.target in _RANDOM:
        return False
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return not callable(getattr(node.target, "__wrapped__", None)) and bool(node.all_input_nodes)
    return not schema.name.startswith("fxpress::") and not schema.is_mutable


def _evaluate(program: Program, node: fx.Node) -> Any:
    """The value of a constant node, computed from the parameters it depends on."""
    values: dict[fx.Node, Any] = {}
    order = [n for n in program.graph.nodes if n in _ancestors(node)]
    with torch.no_grad():
        for n in order:
            if n.op == "get_attr":
                values[n] = constant(program, n)
            else:
                args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: values[a])
                values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return found


def _worth_keeping(program: Program, node: fx.Node, value: torch.Tensor, max_mb: float) -> bool:
    """Keep a result that is small, or no larger than the constants that it replaces."""
    sources = sum(t.nbytes for n in _ancestors(node) if n.op == "get_attr" and (t := constant(program, n)) is not None)
    return value.nbytes <= max(sources, 0) or value.nbytes <= max_mb * 1e6


