"""Products with a vector of ones in front of linear layers, so that a factor per channel has a place to go.

Where others read a tensor too (a LayerNorm whose output is also added, as in BERT), what makes it cannot be divided for
the linear layers alone. A product of their own can: x * (1 / s). It costs one float operation.
"""

from __future__ import annotations

import torch
from torch import fx

from ....frontend.program import Program
from ...fuse_batchnorm import not_owned
from ...rewrite import aten, call_before, constant, find, is_op, put_constant, replace
from .scaling import NORMS, Link


def insert_products(program: Program, links: list[Link], behind_norms: bool = False) -> list[fx.Node]:
    """A product in front of all linear layers that no link reaches (`behind_norms`: and that read a LayerNorm or
    RMSNorm), one for each tensor. Returns the new nodes."""
    reached = {r.node for link in links for r in link.readers}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for layer in find(program, aten.linear.default):
        source = layer.args[0]
        if layer in reached or not isinstance(source, fx.Node) or not_owned(layer) is not None:
            continue
        if not behind_norms or is_op(_unmoved(source), *NORMS):
            readers.setdefault(source, []).append(layer)
    return [_insert(program, source, layers) for source, layers in readers.items()]


def _unmoved(node: fx.Node) -> fx.Node:
    """What makes the values, behind moves that leave the last dim as it is."""
    while is_op(node, *_MOVES) and str(node.meta["val"].shape[-1]) == str(node.args[0].meta["val"].shape[-1]):  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return node


_MOVES = (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.contiguous.default)


def _insert(program: Program, source: fx.Node, layers: list[fx.Node]) -> fx.Node:
    form = source.meta["val"]
    ones = torch.nn.Parameter(torch.ones(form.shape[-1], dtype=form.dtype), requires_grad=False)
    vector = put_constant(program, f"smooth.{source.name}", ones, layers[0])
    product = call_before(layers[0], aten.mul.Tensor, source, vector, value=form)
    for layer in layers:
        layer.replace_input_with(source, product)
    return product


def drop_ones(program: Program, products: list[fx.Node]) -> int:
    """Take out those products that still multiply by one. Returns how many."""
    count = 0
    for product in products:
        source, vector = product.args
        value = constant(program, vector)
        assert value is not None
        if bool((value == 1).all()):
            replace(product, source)  # type: ignore[arg-type]
            program.graph.erase_node(vector)  # type: ignore[arg-type]
            count += 1
    return count
