"""Attention written out: its scores, their largest, and what a query gives that may look at nothing.

PyTorch's attention gives zeros for a query whose keys are all hidden, where softmax alone would give NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...frontend.program import Program, get_attribute
from ..rewrite import argument, aten, call_before

_NOTHING = -60.0  # exp of it is 1e-26: a normal number, and nothing beside the largest weight
_LOWEST = torch.finfo(torch.float32).min
# These take nothing but a dtype and a device from the tensor that they read.
_CREATIONS = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)


def attention_scores(node: fx.Node) -> fx.Node | None:
    """The scores of attention before its mask, written before it; None where their scale is not known."""
    query, key = node.args[:2]
    wide, tall = query.meta["val"], key.meta["val"]  # type: ignore[union-attr]
    width, factor = wide.shape[-1], argument(node, "scale")
    if factor is None and isinstance(width, int):
        factor = 1 / math.sqrt(width)
    if not isinstance(factor, (int, float)):
        return None
    scaled = call_before(node, aten.mul.Tensor, query, factor, value=wide)
    keys = call_before(node, aten.transpose.int, key, -2, -1, value=tall.transpose(-2, -1))
    return call_before(node, aten.matmul.default, scaled, keys, value=torch.matmul(wide, keys.meta["val"]))


def largest_scores(before: fx.Node, scores: Any) -> fx.Node:
    """The largest score of each query, [.., 1]."""
    return call_before(before, aten.amax.default, scores, [-1], True, value=scores.meta["val"][..., :1])


def shielded(before: fx.Node, scores: Any, largest: fx.Node) -> fx.Node:
    """The scores less their largest, none below what counts. (NaN for a query that may look at nothing.)"""
    form = scores.meta["val"]
    less = call_before(before, aten.sub.Tensor, scores, largest, value=form)
    return call_before(before, aten.clamp_min.default, less, _NOTHING, value=form)


def attention_mix(program: Program, node: fx.Node, scores: fx.Node, value: Any, mask: fx.Node | None) -> fx.Node:
    """softmax(scores) V before `node`, the scores shielded; zeros for a query of which `mask` may hide all."""
    may_be_blind = mask is not None and may_hide_a_row(program, mask)
    largest = largest_scores(node, scores)
    one = largest.meta["val"]
    finite = call_before(node, aten.clamp_min.default, largest, _LOWEST, value=one) if may_be_blind else largest
    less = shielded(node, scores, finite)
    weights = call_before(node, aten.softmax.int, less, -1, value=less.meta["val"])
    mixed = call_before(node, aten.matmul.default, weights, value)
    if not may_be_blind:
        return mixed
    blind = call_before(node, aten.eq.Scalar, largest, -math.inf, value=torch.empty_like(one, dtype=torch.bool))
    return call_before(node, aten.masked_fill.Scalar, mixed, blind, 0.0)


def may_hide_a_row(program: Program, mask: fx.Node) -> bool:
    """May a query look at nothing?"""
    while mask.target is aten.expand.default and mask.meta["val"].shape[-1] == mask.args[0].meta["val"].shape[-1]:  # type: ignore[union-attr]
        mask = mask.args[0]  # type: ignore[assignment]
    known = known_value(program, mask)
    if known is None:
        return True
    hidden = ~known if known.dtype is torch.bool else known == -math.inf
    return bool(hidden.all(-1).any())


def known_value(program: Program, node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node computes from constants alone; None where it depends on an input."""
    known: dict[fx.Node, Any] = {}
    pending = [node]
    while pending:
        at = pending[-1]
        waiting = [n for n in at.all_input_nodes if n not in known] if at.target not in _CREATIONS else []
        if at.op == "get_attr":
            known[pending.pop()] = get_attribute(program.graph_module, str(at.target))
        elif at.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(at.target, "tags", ()):
            return None
        elif waiting:
            pending += waiting
        elif at.target in _CREATIONS:
            if at.all_input_nodes[1:] or not all(isinstance(s, int) for s in at.args[1]):  # type: ignore[union-attr]
                return None
            like = torch.empty(0, dtype=at.meta["val"].dtype)
            known[pending.pop()] = at.target(like, *at.args[1:])  # type: ignore[operator]
        else:
            args, kwargs = fx.map_arg((at.args, at.kwargs), known.__getitem__)
            with torch.no_grad():
                known[pending.pop()] = at.target(*args, **kwargs)  # type: ignore[operator]
    return known[node] if isinstance(known[node], torch.Tensor) else None
