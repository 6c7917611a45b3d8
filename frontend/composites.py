"""Ops that are a few plain ones put together: recurrent cells, pairwise distance, a variance with its mean. Capture
writes them out.

A cell is two linear layers and some elementwise work (Hochreiter & Schmidhuber 1997, Cho et al. 2014). Written so, it
is pruned, quantized and lowered by what there is for linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def write_out_composites(graph_module: fx.GraphModule) -> None:
    """Replace every composite op by the ops that it is made of, in place."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        write = _COMPOSITES.get(node.target) if node.op == "call_function" else None
        if write is None:
            continue
        with graph.inserting_before(node):
            result = write(_Writer(node), *node.args, **node.kwargs)
        if result is not None:
            _replace(node, result)


class _Writer:
    """Makes nodes that come from the same line as `node`, each with the fake tensor that it gives."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.node.graph.call_function(op, args, kwargs)
        new.meta = {k: v for k, v in self.node.meta.items() if k != "val"}
        new.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return new

    def gates(self, x: Any, h: Any, weights: tuple[Any, ...], count: int) -> tuple[list[fx.Node], list[fx.Node]]:
        """The parts of both linear layers, input's and state's."""
        w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
        sums = self(aten.linear.default, x, w_ih, b_ih), self(aten.linear.default, h, w_hh, b_hh)
        size = h.meta["val"].shape[-1]
        return tuple(  # type: ignore[return-value]
            [self(aten.slice.Tensor, s, -1, i * size, (i + 1) * size, 1) for i in range(count)] for s in sums
        )


def _lstm_cell(g: _Writer, x: Any, hx: Any, *weights: Any) -> tuple[fx.Node, fx.Node]:
    of_input, of_state = g.gates(x, hx[0], weights, 4)
    i, f, c, o = (g(aten.add.Tensor, a, b) for a, b in zip(of_input, of_state))
    i, f, o = (g(aten.sigmoid.default, gate) for gate in (i, f, o))
    kept, new = g(aten.mul.Tensor, f, hx[1]), g(aten.mul.Tensor, i, g(aten.tanh.default, c))
    cell = g(aten.add.Tensor, kept, new)
    return g(aten.mul.Tensor, o, g(aten.tanh.default, cell)), cell


def _gru_cell(g: _Writer, x: Any, hx: Any, *weights: Any) -> fx.Node:
    (rx, zx, nx), (rh, zh, nh) = g.gates(x, hx, weights, 3)
    r, z = (g(aten.sigmoid.default, g(aten.add.Tensor, a, b)) for a, b in ((rx, rh), (zx, zh)))
    new = g(aten.tanh.default, g(aten.add.Tensor, nx, g(aten.mul.Tensor, r, nh)))
    return g(aten.add.Tensor, new, g(aten.mul.Tensor, z, g(aten.sub.Tensor, hx, new)))


def _plain_cell(activation: Any) -> Callable[..., fx.Node]:
    def write(g: _Writer, x: Any, hx: Any, *weights: Any) -> fx.Node:
        (a,), (b,) = g.gates(x, hx, weights, 1)
        return g(activation, g(aten.add.Tensor, a, b))

    return write


def _pairwise_distance(g: _Writer, x1: Any, x2: Any, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> fx.Node:
    difference = g(aten.add.Scalar, g(aten.sub.Tensor, x1, x2), eps)
    return g(aten.linalg_vector_norm.default, difference, p, [-1], keepdim)


def _repeat(g: _Writer, x: Any, repeats: Any) -> fx.Node | None:
    """What repeats dims of size 1 alone is an expansion, whose size may change; other repeats stay."""
    sizes = [1] * (len(repeats) - x.meta["val"].ndim) + list(x.meta["val"].shape)
    ones = [isinstance(s, int) and s == 1 for s in sizes]
    if not all(one or (isinstance(n, int) and n == 1) for one, n in zip(ones, repeats)):
        return None
    return g(aten.expand.default, x, [n if one else -1 for one, n in zip(ones, repeats)])


def _with_mean(spread: Any, over_all: bool = False) -> Callable[..., tuple[fx.Node, fx.Node]]:
    """The variance (or deviation) and the mean, over the same dims. `over_all`: of the overload without dims."""

    def write(
        g: _Writer, x: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, correction: Any = None
    ) -> tuple[fx.Node, fx.Node]:
        correction = int(unbiased) if correction is None else correction
        return g(spread, x, dim, correction=correction, keepdim=keepdim), g(aten.mean.dim, x, dim, keepdim)

    if over_all:
        return lambda g, x, unbiased=True: write(g, x, None, unbiased)
    return write


_COMPOSITES: dict[Any, Callable[..., Any]] = {
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _gru_cell,
    aten.rnn_tanh_cell.default: _plain_cell(aten.tanh.default),
    aten.rnn_relu_cell.default: _plain_cell(aten.relu.default),
    aten.pairwise_distance.default: _pairwise_distance,
    aten.repeat.default: _repeat,
    **dict.fromkeys((aten.var_mean.correction, aten.var_mean.dim), _with_mean(aten.var.correction)),
    **dict.fromkeys((aten.std_mean.correction, aten.std_mean.dim), _with_mean(aten.std.correction)),
    aten.var_mean.default: _with_mean(aten.var.correction, over_all=True),
    aten.std_mean.default: _with_mean(aten.std.correction, over_all=True),
}


def _replace(node: fx.Node, result: Any) -> None:
    """Readers of `node` (of its parts, where it gives several tensors) read the result."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
