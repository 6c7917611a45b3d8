"""Masks of attention that hide by a large negative number are made to hide wholly.

    softmax(s + m),  m = -100 where a token must not be seen    ->    m = -10000 there

exp(-100) is a denormal float32, and a product with denormals takes several times as long: in Swin, whose shifted
windows are masked so, the second product of attention takes ten times as long as without a mask (docs/results.md). With
-10000 the weight is 0, as is meant. A hidden token's weight was at most exp(-80 + d), where d is how far its score lies
above the best visible one: nothing in float32 for d < 60, and scores that differ more break such a mask in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...frontend.program import Program, get_attribute
from ..rewrite import aten, find, put_constant
from .spec import KEPT_FLOAT

_HIDES = -80.0  # exp of this is close to the smallest normal float32
_DEEP = -1e4
# These take nothing but a dtype and a device from the tensor that they read.
_CREATIONS = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
_MOVES = (aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int)


def deepen_masks(program: Program) -> int:
    """Deepen the constant masks that are added before a softmax over the last dim. Returns how many."""
    count = 0
    for softmax in find(program, aten.softmax.int, aten._softmax.default):
        form = softmax.meta["val"]
        if softmax.args[1] in (-1, form.ndim - 1) and not softmax.meta.get(KEPT_FLOAT):
            count += _deepen(program, softmax.args[0], form.shape[-1])
    return count


def _deepen(program: Program, scores: Any, tokens: Any) -> int:
    """Follow the scores back through sums and moves that leave the last dim alone."""
    if not isinstance(scores, fx.Node) or scores.op != "call_function" or scores.meta["val"].shape[-1] != tokens:
        return 0
    if scores.target in _MOVES:
        return _deepen(program, scores.args[0], tokens)
    if scores.target is not aten.add.Tensor:
        return 0
    count = 0
    for position, addend in enumerate(scores.args[:2]):
        mask = _value(program, addend) if isinstance(addend, fx.Node) else None
        if mask is None:
            count += _deepen(program, addend, tokens)
        elif _hides_some(mask):
            deep = torch.where(mask <= _HIDES, torch.full_like(mask, _DEEP), mask)
            scores.update_arg(position, put_constant(program, f"mask.{scores.name}", deep, scores))
            count += 1
    return count


def _hides_some(mask: torch.Tensor) -> bool:
    """Are there numbers that hide a token without being deep, and does every row show one?"""
    hidden = mask <= _HIDES
    finite = torch.isfinite(mask).all() and float(mask.min()) > _DEEP
    return bool(finite and mask.is_floating_point() and hidden.any() and not hidden.all(-1).any())


def _value(program: Program, node: fx.Node) -> torch.Tensor | None:
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
            if not all(isinstance(s, int) for s in at.args[1]):  # type: ignore[union-attr]
                return None
            like = torch.empty(0, dtype=at.meta["val"].dtype)
            known[pending.pop()] = at.target(like, *at.args[1:])  # type: ignore[operator]
        else:
            args, kwargs = fx.map_arg((at.args, at.kwargs), known.__getitem__)
            with torch.no_grad():
                known[pending.pop()] = at.target(*args, **kwargs)  # type: ignore[operator]
    return known[node] if isinstance(known[node], torch.Tensor) else None
