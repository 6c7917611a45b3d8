"""Masked attention without denormal numbers.

    softmax(s)    ->    softmax(clamp_min(s - amax(s), -60))            where a mask hides tokens in s
    attention(q, k, v, mask)    ->    the same, written out; zeros for a query that may look at nothing

Softmax is the same for scores less their largest. What a mask hides has a weight of exp(-100) or exp(-inf) then, which
ONNX Runtime computes by way of denormal float32 numbers: a softmax over hidden tokens takes five to ten times as long
as one without (docs/results.md), and a product with denormals is as slow. exp(-60) is 1e-26: a normal number, and
nothing beside the largest weight, which is at least one over the number of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...frontend.program import Program
from ..rewrite import SAME_VALUES, argument, aten, call_before, find, put_constant, replace
from .attention import attention_mix, attention_scores, known_value, largest_scores, shielded
from .expand import inherit, name_after

_HIDES = -80.0  # numbers from here down are meant to hide: exp of them is close to the smallest normal float32
_MOVES = SAME_VALUES | {aten.clone.default, aten._to_copy.default, aten.to.dtype}
_CHOICES = (aten.where.self, aten.where.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
# What may stand between the weights and the product with the values, and leaves zeros and tiny numbers as they are.
_PASSES = {
    aten.dropout.default, aten.nan_to_num.default, aten.isnan.default, aten.masked_fill.Scalar, aten.where.self,
    aten.where.ScalarSelf, aten.where.ScalarOther, aten.permute.default, aten.transpose.int, aten.squeeze.dim,
    aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.expand.default,
}  # fmt: skip
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.minimum.default)


def shield_masks(program: Program) -> int:
    """Rewrite every softmax over the last dim that sees hidden tokens. Returns how many."""
    count, biases = 0, dict[fx.Node, fx.Node]()
    for attention in find(program, aten.scaled_dot_product_attention.default):
        count += _write_out(program, attention, biases)
    for softmax in find(program, aten.softmax.int, aten._softmax.default):
        scores = softmax.args[0]
        if _is_masked_attention(program, softmax, scores):
            softmax.update_arg(0, shielded(softmax, scores, largest_scores(softmax, scores)))
            count += 1
    return count


def _is_masked_attention(program: Program, softmax: fx.Node, scores: Any) -> bool:
    """Does a softmax over the last dim of float32 see hidden tokens, and weigh values with what it gives? (Who reads
    the weights themselves, their logarithm say, is to find zeros there.)"""
    forms = softmax.meta["val"], scores.meta["val"]
    last = softmax.args[1] in (-1, forms[0].ndim - 1) and all(f.dtype is torch.float32 for f in forms)
    return last and _hides(program, scores) and _only_weighs(softmax)


def _only_weighs(weights: fx.Node) -> bool:
    """Do only products read it, as it is or with other numbers in some places?"""
    pending, seen = [weights], {weights}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target in _PRODUCTS or user in seen:
                continue
            if user.target not in _MOVES and user.target not in _PASSES:
                return False
            seen.add(user)
            pending.append(user)
    return True


def _write_out(program: Program, node: fx.Node, known: dict[fx.Node, fx.Node]) -> bool:
    """Attention with a mask as products and a shielded softmax. `known` are the biases of masks met before."""
    value, start = node.args[2], node.prev
    mask, causal = argument(node, "attn_mask"), argument(node, "is_causal")
    forms = [n.meta["val"] for n in node.args[:3]]  # type: ignore[union-attr]
    lengths = (forms[0].shape[-2], forms[1].shape[-2])
    if (
        (mask is None and not causal)
        or (causal and not all(isinstance(s, int) for s in lengths))
        or any(f.dtype is not torch.float32 for f in forms)
        or argument(node, "dropout_p")
        or argument(node, "enable_gqa")
    ):
        return False
    scores = attention_scores(node)
    if scores is None:
        return False
    biases = []
    if mask is not None:
        if mask not in known:
            known[mask] = _bias(node, mask)
        biases.append(known[mask])
    if causal:
        later = torch.full(lengths, -math.inf).triu(1)  # query i looks at keys up to i
        biases.append(put_constant(program, f"mask.{node.name}", later, node))
    for bias in biases:
        form = scores.meta["val"]
        scores = call_before(node, aten.add.Tensor, scores, bias, value=form)
    mixed = attention_mix(program, node, scores, value, mask)
    inherit(start, node)
    name_after(mixed, node.name)
    replace(node, mixed)
    return True


def _bias(node: fx.Node, mask: fx.Node) -> fx.Node:
    """What is added to the scores: the mask, or 0 and -inf for one that says which tokens are seen. It is small beside
    the scores, which have heads."""
    form = mask.meta["val"]
    if form.dtype is not torch.bool:
        return mask
    return call_before(node, aten.where.Scalar, mask, 0.0, -math.inf, value=torch.empty_like(form, dtype=torch.float32))


def _hides(program: Program, scores: Any) -> bool:
    """Do these scores come from a sum with a mask, or from one that was written into them?"""
    if not isinstance(scores, fx.Node) or scores.op != "call_function":
        return False
    if scores.target in _MOVES:
        return _hides(program, scores.args[0])
    if scores.target in _SUMS:
        return any(_hides(program, a) or _is_mask(program, a) for a in scores.args[:2])
    return _writes_hiding(program, scores)


def _is_mask(program: Program, node: Any) -> bool:
    """Is a summand a constant that hides, or made to hide: (1 - seen) * -10000?"""
    if not isinstance(node, fx.Node):
        return False
    known = known_value(program, node)
    if known is not None:
        return bool(known.is_floating_point() and (known <= _HIDES).any())
    if node.op != "call_function":
        return False
    if node.target in _MOVES or node.target in _SUMS:
        return any(_is_mask(program, a) for a in node.all_input_nodes)
    if node.target is aten.mul.Tensor:
        return any(_is_low(program, a) for a in node.args[:2])
    return _writes_hiding(program, node)


def _writes_hiding(program: Program, node: fx.Node) -> bool:
    """Does a node write numbers that hide?"""
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _is_low(program, node.args[2])
    return node.target in _CHOICES and any(_is_low(program, a) for a in node.args[1:])


def _is_low(program: Program, number: Any) -> bool:
    """A number, or a constant of one, that hides."""
    if isinstance(number, fx.Node):
        known = known_value(program, number)
        return known is not None and known.numel() > 0 and bool((known <= _HIDES).all())
    return isinstance(number, (int, float)) and number <= _HIDES
