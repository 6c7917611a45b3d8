"""Forms that only the written file has: the program that is simulated stays as it is.

A pass marks a node when a target is folded for (`mark`), and what writes the program as ONNX asks for the program with
the marks carried out (`as_written`). What they change is not seen from outside, and no number changes by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...frontend.program import Program
from ..rewrite import argument, aten, call_before, find, is_op, replace
from .columns import rewrite_columns
from .wide_depthwise import widen_depthwise

COLUMNS, CHANNELS, PRODUCT = "columns", "channels", "product"


def write_product(program: Program, linear: fx.Node, _: int) -> None:
    """A linear layer on tokens as matmul(x, W^T) + b, for runtimes that take it so: OpenVINO moves scales through the
    reshape behind a Gemm, where they do not fit (2026.4: "Requested output shape [1,197,1] is incompatible")."""
    x, weight, bias = linear.args[0], linear.args[1], argument(linear, "bias")
    turned = call_before(linear, aten.transpose.int, weight, 0, 1, value=weight.meta["val"].t())  # type: ignore[union-attr]
    product = call_before(linear, aten.matmul.default, x, turned)
    replace(linear, product if bias is None else call_before(linear, aten.add.Tensor, product, bias))


# What carries a mark out, and the op that can have it: what a pass puts before a layer inherits what is said of that.
_REWRITES = {
    COLUMNS: (aten.conv2d.default, rewrite_columns),
    CHANNELS: (aten.conv2d.default, widen_depthwise),
    PRODUCT: (aten.linear.default, write_product),
}


def layers_on_tokens(program: Program) -> list[fx.Node]:
    """Linear layers with quantized weights on more than matrices."""
    found = find(program, aten.linear.default)
    quantized = torch.ops.fxpress.dequantize_channel.default
    return [n for n in found if n.meta["val"].ndim > 2 and is_op(n.args[1], quantized)]


def mark(node: fx.Node, form: str, number: int) -> None:
    """Ask for a form of a node in the file."""
    node.meta["custom"] = {**node.meta.get("custom", {}), form: number}


def as_written(program: Program) -> Program:
    """The same program with the marks carried out; itself where there are none."""
    if not any(_marks(n) for n in program.graph.nodes):
        return program
    written = program.copy(share_weights=True)
    for node in list(written.graph.nodes):
        for form, number in _marks(node).items():
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != form}
            _REWRITES[form][1](written, node, number)
    return written


def _marks(node: fx.Node) -> dict[str, Any]:
    custom = node.meta.get("custom") or {}
    return {form: custom[form] for form, (op, _) in _REWRITES.items() if form in custom and is_op(node, op)}
