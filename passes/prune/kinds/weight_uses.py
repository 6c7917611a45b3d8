"""Which parameters are weights: what layers multiply their inputs by, and which of its dimensions are summed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ....frontend.cost import op_name
from ....frontend.program import Program, get_attribute
from ...rewrite import argument
from ..analysis import rows


@dataclass(frozen=True)
class WeightUse:
    """`node` multiplies by the parameter `name`: its dimension `inputs` is summed over, `outputs` is what comes out.

    None where it cannot be told (einsum, a weight that is reshaped first).
    """

    node: fx.Node
    name: str
    inputs: int | None
    outputs: int | None


def weight_uses(program: Program) -> list[WeightUse]:
    """All uses of weights, in graph order. Biases, norms, embeddings and tables are none.

    A tensor that is known under two names is reported under the first.
    """
    first_names: dict[int, str] = {}
    uses = []
    for node in program.graph.nodes:
        for operand, inputs, outputs, only_trainable in _OPERANDS.get(op_name(node), _nothing)(node):
            source, dims = _traced(operand)
            tensor = _float_tensor(program, source)
            if tensor is None or tensor.ndim < 2 or (only_trainable and not isinstance(tensor, torch.nn.Parameter)):
                continue
            name = first_names.setdefault(id(tensor), str(source.target))
            rank = operand.meta["val"].ndim
            known = [None if d is None or dims is None else dims[d % rank] for d in (inputs, outputs)]
            uses.append(WeightUse(node, name, *known))
    return uses


def _float_tensor(program: Program, node: fx.Node) -> torch.Tensor | None:
    found = get_attribute(program.graph_module, str(node.target)) if node.op == "get_attr" else None
    return found if isinstance(found, torch.Tensor) and found.is_floating_point() else None


def _traced(node: fx.Node) -> tuple[fx.Node, list[int] | None]:
    """Back through movements to where an operand comes from; for each of its dimensions that of the source."""
    dims: list[int] | None = list(range(node.meta["val"].ndim))
    while op_name(node) in _MOVEMENTS and isinstance(node.args[0], fx.Node):
        step = _MOVEMENTS[op_name(node)](node)
        dims = [step[d] for d in dims] if dims is not None and step is not None else None
        node = node.args[0]
    return node, dims


def _transposed(node: fx.Node) -> list[int]:
    order = list(range(node.meta["val"].ndim))
    a, b = (0, -1) if op_name(node) == "aten.t" else (argument(node, "dim0"), argument(node, "dim1"))
    order[a], order[b] = order[b], order[a]
    return order


def _permuted(node: fx.Node) -> list[int]:
    return [d % node.meta["val"].ndim for d in argument(node, "dims")]


def _unmoved(node: fx.Node) -> list[int]:
    return list(range(node.meta["val"].ndim))


def _unknown(node: fx.Node) -> None:
    return None


# For each movement: dimension of the output -> dimension of the input, None where there is no such map.
_MOVEMENTS: dict[str, Callable[[fx.Node], list[int] | None]] = {
    **rows("t transpose", _transposed),
    **rows("permute", _permuted),
    **rows("contiguous clone detach alias to _weight_norm", _unmoved),
    **rows("view reshape unsqueeze squeeze expand flatten unflatten", _unknown),
}


# -- the operands of each op: (node, inputs, outputs, must it be a trainable parameter) ------------------------------

_Operand = tuple[fx.Node, int | None, int | None, bool]


def _nothing(node: fx.Node) -> Iterator[_Operand]:
    return iter(())


def _weight(inputs: int, outputs: int) -> Callable[[fx.Node], Iterator[_Operand]]:
    def operands(node: fx.Node) -> Iterator[_Operand]:
        yield argument(node, "weight"), inputs, outputs, False

    return operands


def _factors(first: int) -> Callable[[fx.Node], Iterator[_Operand]]:
    """Both sides of a matrix product; buffers in it are tables (of rotary embeddings, say), not weights."""

    def operands(node: fx.Node) -> Iterator[_Operand]:
        left, right = node.args[first], node.args[first + 1]
        if isinstance(left, fx.Node) and left.meta["val"].ndim > 1:
            yield left, -1, -2, True
        if isinstance(right, fx.Node) and right.meta["val"].ndim > 1:
            yield right, -2, -1, True

    return operands


def _anywhere(node: fx.Node) -> Iterator[_Operand]:
    """Every operand; nothing is known of its dimensions."""
    for leaf in pytree.tree_leaves(node.args):
        if isinstance(leaf, fx.Node):
            yield leaf, None, None, True


def _recurrent(node: fx.Node) -> Iterator[_Operand]:
    leaves: list[Any] = pytree.tree_leaves(argument(node, "params"))
    yield from ((leaf, 1, 0, False) for leaf in leaves if leaf.meta["val"].ndim == 2)


_OPERANDS: dict[str, Callable[[fx.Node], Iterator[_Operand]]] = {
    **rows("conv1d conv2d conv3d linear", _weight(1, 0)),
    **rows("conv_transpose1d conv_transpose2d conv_transpose3d", _weight(0, 1)),
    **rows("matmul mm bmm", _factors(0)),
    **rows("addmm baddbmm", _factors(1)),
    **rows("einsum", _anywhere),
    **rows("lstm gru rnn_tanh rnn_relu", _recurrent),
}
