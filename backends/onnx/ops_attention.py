"""Scaled dot product attention, written out: softmax(q k^T * scale + mask) v."""

from __future__ import annotations

import math

import torch
from onnx_ir import Value

from .emit import Emitter, Operand
from .sizes import Size
from .table import row


@row("aten.scaled_dot_product_attention.default")
def attention(
    g: Emitter,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | torch.SymFloat | None,
    enable_gqa: bool,
) -> Value:
    """query [.., L, E], key [.., S, E], value [.., S, Ev] -> [.., L, Ev]."""
    if dropout_p:
        raise g.reject("attention with dropout is random", hint="capture in evaluation mode")
    dtype = query.dtype
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    keys, values = (_repeated(g, query, t, enable_gqa) for t in (key, value))
    last = key.rank
    scores = g.op("MatMul", query, g.op("Transpose", keys, perm=[*range(last - 2), last - 1, last - 2]))
    scores = g.op("Mul", scores, g.number(factor, dtype))
    if is_causal:
        scores = g.op("Where", _causal(g, query.shape[-2], key.shape[-2]), scores, g.scalar(-math.inf, dtype))
    if attn_mask is not None:
        scores = _masked(g, scores, attn_mask, dtype)
    weights = g.op("Softmax", scores, axis=-1)
    if attn_mask is not None and _may_hide_a_row(attn_mask):
        # torch gives zeros for a query that may look at nothing, softmax gives NaN.
        weights = g.op("Where", g.op("IsNaN", weights), g.scalar(0.0, dtype), weights)
    return g.op("MatMul", weights, values)


def _masked(g: Emitter, scores: Value, mask: Operand, dtype: torch.dtype) -> Value:
    if mask.dtype == torch.bool:
        return g.op("Where", mask, scores, g.scalar(-math.inf, dtype))
    return g.op("Add", scores, g.cast(mask, dtype))


def _may_hide_a_row(mask: Operand) -> bool:
    if mask.contents is None:
        return True
    hidden = ~mask.contents if mask.dtype == torch.bool else mask.contents == -math.inf
    return bool(hidden.all(dim=-1).any())


def _causal(g: Emitter, queries: Size, keys: Size) -> Value:
    """[L, S]: may query i look at key j? (j <= i)"""
    if isinstance(queries, int) and isinstance(keys, int):
        return g.constant(torch.ones(queries, keys, dtype=torch.bool).tril())
    rows, columns = (g.op("Range", *_range(g, s)) for s in (queries, keys))
    return g.op("LessOrEqual", g.op("Unsqueeze", columns, g.ints([0])), g.op("Unsqueeze", rows, g.ints([1])))


def _range(g: Emitter, size: Size) -> tuple[Value, Value, Value]:
    return g.scalar(0, torch.int64), g.number(size, torch.int64), g.scalar(1, torch.int64)


def _repeated(g: Emitter, query: Operand, x: Operand, grouped: bool) -> Value:
    """Grouped-query attention: each key and value head serves several query heads."""
    heads, own = query.shape[-3] if query.rank > 2 else 1, x.shape[-3] if x.rank > 2 else 1
    if not grouped or (isinstance(heads, int) and heads == own):
        return x.value
    if not isinstance(heads, int) or not isinstance(own, int):
        raise g.reject("grouped-query attention needs a fixed number of heads")
    axis = x.rank - 2
    counts = [1] * (x.rank + 1)
    counts[axis] = heads // own
    wide = g.op("Expand", g.op("Unsqueeze", x, g.ints([axis])), g.ints(counts))
    before = [*x.shape[:axis], heads // own, *x.shape[axis:]]
    return g.reshape(wide, before, [*x.shape[: axis - 1], heads, *x.shape[axis:]])
