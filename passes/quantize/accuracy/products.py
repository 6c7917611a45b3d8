"""Products with a vector of ones in front of linear layers, so that a factor per channel has a place to go.

Where others read a tensor too (a LayerNorm whose output is also added, as in BERT), what makes it cannot be divided for
the linear layers alone. A product of their own can: x * (1 / s). It costs one float operation.
"""

from __future__ import annotations

import torch
from torch import fx

from ....frontend.program import Program
from ...fuse_batchnorm import not_owned
from ...rewrite import aten, call_before, constant, find, put_constant, replace
from .scaling import Link


def insert_products(program: Program, links: list[Link]) -> list[fx.Node]:
    """A product in front of all linear layers that no link reaches, one for each tensor. Returns the new nodes."""
    reached = {r.node for link in links for r in link.readers}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for layer in find(program, aten.linear.default):
        source = layer.args[0]
        if layer not in reached and isinstance(source, fx.Node) and not_owned(layer) is None:
            readers.setdefault(source, []).append(layer)
    return [_insert(program, source, layers) for source, layers in readers.items()]


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
