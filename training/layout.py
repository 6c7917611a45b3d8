"""Which dimension of a value its channels are in: [N, C, H, W] of a convolution, [N, tokens, C] of a linear layer.

Shapes do not say it, but the graph does: where a value comes from, through moves and elementwise ops. What is compared
over places (attention maps, classes of each token) must know it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..frontend.cost import op_name
from ..passes.rewrite import argument

Known = Mapping[fx.Node, "int | None"]


def channel_dim(node: fx.Node) -> int | None:
    """The dimension of a node's value that holds its channels; None where the graph does not say.

    Layers put channels in the second dimension (convolution, BatchNorm, pooling) or the last (linear, LayerNorm,
    attention), moves take them along, and all other ops that keep the number of dimensions keep their place.
    """
    known: dict[fx.Node, int | None] = {}
    for earlier in node.graph.nodes:
        known[earlier] = _dim(earlier, known)
        if earlier is node:
            break
    return known[node]


def _dim(node: fx.Node, known: Known) -> int | None:
    value = _first_tensor(node)
    if node.op != "call_function" or value is None:
        return None
    name = op_name(node).removeprefix("aten.")
    if name in _SECOND:
        return 1
    if name in _LAST and not (name == "layer_norm" and len(argument(node, "normalized_shape")) > 1):
        return value.ndim - 1
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if name in _MOVES:
        dim = None if source is None else known[source]
        return None if dim is None else _MOVES[name](node, dim)
    if name in _UNKNOWN:
        return None
    alike = [n for n in node.all_input_nodes if (v := _first_tensor(n)) is not None and v.ndim == value.ndim]
    return next((d for n in alike if (d := known[n]) is not None), None)


def _first_tensor(node: Any) -> torch.Tensor | None:
    """The value of a node, or the first tensor of several."""
    tensors = (t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor))
    return next(tensors, None)


# -- moves: where a dimension of the input is in the output -----------------------------------------------------------


def _permuted(node: fx.Node, dim: int) -> int:
    dims = argument(node, "dims")
    return [d % len(dims) for d in dims].index(dim)


def _transposed(node: fx.Node, dim: int) -> int:
    one, other = (argument(node, d) % node.meta["val"].ndim for d in ("dim0", "dim1"))
    return {one: other, other: one}.get(dim, dim)


def _reshaped(node: fx.Node, dim: int) -> int | None:
    """A dimension that is still there, with all before it or all behind it. (Symbolic sizes are compared by name.)"""
    before, after = (list(map(str, n.meta["val"].shape)) for n in (node.all_input_nodes[0], node))
    if after[: dim + 1] == before[: dim + 1]:
        return dim
    behind = len(before) - dim
    return len(after) - behind if after[-behind:] == before[-behind:] else None


_MOVES: dict[str, Callable[[fx.Node, int], int | None]] = {
    "permute": _permuted,
    "transpose": _transposed,
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshaped),
}
# fmt: off
_SECOND = frozenset((
    *(f"conv{d}d" for d in (1, 2, 3)), *(f"conv_transpose{d}d" for d in (1, 2, 3)), "batch_norm", "instance_norm",
    "group_norm", *(f"{kind}_pool{d}d" for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")),
    *(f"max_pool{d}d_with_indices" for d in (2, 3)), "pixel_shuffle", "pixel_unshuffle",
))
_LAST = frozenset((
    "linear", "layer_norm", "rms_norm", "embedding", "addmm", "baddbmm", "mm", "bmm", "matmul",
    "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu",
))
_UNKNOWN = frozenset(("einsum", "gather", "im2col", "unfold", "mT", "numpy_T", "movedim"))
# fmt: on
