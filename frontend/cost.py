"""What a program costs: multiply-accumulates (MACs) of one example, parameters and bytes, layer by layer.

Only shapes are read (`meta["val"]`), so float programs, pruned ones and quantized ones (whose weights pass through
`fxpress.dequantize_channel`) are counted alike. Counted are convolutions, linear layers, matrix
products, attention and recurrent layers; elementwise work and normalization are not, as is the custom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .program import Program, get_attribute, layer_name

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one node: MACs of one example, the number of its parameters and their bytes."""

    name: str
    op: str
    macs: int
    parameters: int
    bytes: int
    node: fx.Node

    def __str__(self) -> str:
        return f"{self.name:40} {self.op:24} {self.macs:>15,} MACs {self.parameters:>12,} parameters"


def count_macs(program: Program) -> int:
    """The MACs of one example (batch 1)."""
    return sum(cost.macs for cost in cost_table(program))


def cost_table(program: Program) -> list[LayerCost]:
    """One row for each node that multiplies or reads parameters, in graph order.

    A parameter that several nodes read is counted at the first of them.
    """
    sizes = Sizes(program)
    seen: set[int] = set()
    rows = []
    for node in program.graph.nodes:
        if node.op != "call_function" or (op_name(node).startswith("fxpress.") and op_name(node) not in _DYNAMIC):
            continue
        macs = _node_macs(node, sizes)
        tensors = [t for t in _parameters_of(program, node) if id(t) not in seen and not seen.add(id(t))]  # type: ignore[func-returns-value]
        if macs or tensors:
            count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
            rows.append(LayerCost(layer_name(node), op_name(node), macs, count, size, node))
    return rows


def parameter_bytes(program: Program) -> int:
    """The bytes of all parameters and buffers that the graph reads, each counted once."""
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.users}
    tensors = {id(t): t for t in (get_attribute(program.graph_module, n) for n in names) if isinstance(t, torch.Tensor)}
    return sum(t.nbytes for t in tensors.values())


def op_name(node: fx.Node) -> str:
    """ "aten.conv2d" of a node that calls an operator, without its overload; "" or a Python name for other nodes."""
    if node.op != "call_function":
        return ""
    target = node.target
    known = _NAMES.get(id(target))
    if known is None or known[0] is not target:
        schema = getattr(target, "_schema", None)
        name = schema.name.replace("::", ".") if schema is not None else getattr(target, "__name__", str(target))
        known = _NAMES[id(target)] = target, name
    return known[1]


_NAMES: dict[int, tuple[Any, str]] = {}  # a cache, by identity: hashing an op takes longer than all else here


def concrete(size: Any) -> int:
    """A size as int, symbolic ones by the size of the example."""
    return size if isinstance(size, int) else int(size.node.hint)


class Sizes:
    """Shapes at batch 1.

    A program with a fixed batch is divided by it instead: by the first size of its first input, when all outputs
    have that first size too.
    """

    def __init__(self, program: Program) -> None:
        first = next(iter(program.tensor_placeholders()[0].meta["val"].shape), 1)
        self.symbol = None if isinstance(first, int) else first.node.expr
        outputs = [node.meta["val"].shape[:1] for node in program.output_nodes()]
        self.divisor = first if isinstance(first, int) and all(tuple(s) == (first,) for s in outputs) else 1

    def of(self, node: Any) -> Shape:
        """The shape of a node's tensor at batch 1."""
        return tuple(self._size(s) for s in node.meta["val"].shape)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.free_symbols == {self.symbol}:
            return int(expression.subs(self.symbol, 1))
        return concrete(size)


def _node_macs(node: fx.Node, sizes: Sizes) -> int:
    name = op_name(node)
    if name in _RECURRENT:
        return _recurrent(node, sizes) // sizes.divisor
    if name == "aten.einsum":
        return _einsum(node, sizes) // sizes.divisor
    counter = MACS.get(name)
    if counter is None:
        return 0
    operands = [sizes.of(a) for a in node.args if isinstance(a, fx.Node) and hasattr(a.meta.get("val"), "shape")]
    return counter(operands, sizes.of(node)) // sizes.divisor


def _parameters_of(program: Program, node: fx.Node) -> Iterator[torch.Tensor]:
    """Parameters (and quantized weights) that a node reads itself or through a dequantize."""
    for used in node.all_input_nodes:
        while op_name(used).startswith("fxpress.dequantize") and isinstance(used.args[0], fx.Node):
            used = used.args[0]
        if used.op == "get_attr":
            tensor = get_attribute(program.graph_module, str(used.target))
            if isinstance(tensor, torch.nn.Parameter) or getattr(tensor, "dtype", None) in _QUANTIZED:
                yield tensor


_QUANTIZED = (torch.int8, torch.uint8, torch.int32)


def _convolution(operands: list[Shape], out: Shape) -> int:
    return prod(out) * prod(operands[1][1:])


def _transposed(operands: list[Shape], out: Shape) -> int:
    return prod(operands[0]) * prod(operands[1][1:])


def _product(operands: list[Shape], out: Shape) -> int:
    return prod(out) * operands[0][-1]


def _product_after_bias(operands: list[Shape], out: Shape) -> int:
    return prod(out) * operands[1][-1]


def _attention(operands: list[Shape], out: Shape) -> int:
    query, key, value = operands[:3]
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_DYNAMIC = ("fxpress.dynamic_linear", "fxpress.dynamic_lstm")
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu", "fxpress.dynamic_lstm")


def _recurrent(node: fx.Node, sizes: Sizes) -> int:
    """Every weight matrix is applied once for each step of each sequence: input [steps, batch, in] or batch first."""
    matrices = [p for p in pytree.tree_leaves(node.args[2]) if len(sizes.of(p)) == 2]
    return prod(sizes.of(node.args[0])[:-1]) * sum(prod(sizes.of(m)) for m in matrices)


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    """The size of the joint index space, for the usual case of two operands without an ellipsis."""
    equation, operands = str(node.args[0]).replace(" ", ""), [sizes.of(o) for o in node.args[1]]  # type: ignore[union-attr]
    if len(operands) != 2 or "." in equation:
        return 0
    letters: dict[str, int] = {}
    for term, shape in zip(equation.split("->")[0].split(","), operands):
        letters.update(zip(term, shape))
    return prod(letters.values())


# What each op multiplies, from the shapes of its tensor arguments and of its output.
MACS: dict[str, Callable[[list[Shape], Shape], int]] = {
    **{f"aten.conv{d}d": _convolution for d in (1, 2, 3)},
    **{f"aten.conv_transpose{d}d": _transposed for d in (1, 2, 3)},
    **{f"aten.{name}": _product for name in ("linear", "matmul", "mm", "bmm", "mv", "dot")},
    **{f"aten.{name}": _product_after_bias for name in ("addmm", "baddbmm")},
    "aten.scaled_dot_product_attention": _attention,
    "fxpress.dynamic_linear": _product,
}
