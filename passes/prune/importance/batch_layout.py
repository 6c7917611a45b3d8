"""Along which dimension of a tensor the examples lie, and how: the axis algebra follows the batch through the graph.

A dimension may hold the batch together with others: windows of an image have it outermost, the tokens of
torch.nn.MultiheadAttention innermost ([tokens * batch, features]).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ....errors import FxpressError
from ....frontend.cost import concrete
from ....frontend.program import Program
from ...rewrite import fake_mode_of
from ...verify import refresh_values
from ..analysis import Analysis
from ..axes import Vector
from ..rules.table import analyze


@dataclass(frozen=True)
class BatchAxis:
    """Dimension `dim` reads as (outer, batch, inner); `inner` is None where the batch is outermost."""

    dim: int
    inner: int | None

    def split(self, tensor: torch.Tensor, count: int) -> torch.Tensor:
        """The dimension as three: outer, `count` examples, inner."""
        size = tensor.shape[self.dim]
        inner = size // count if self.inner is None else self.inner
        return tensor.unflatten(self.dim, (size // (count * inner), count, inner))


class BatchLayout:
    """Where the examples are in the tensors of one program with a dynamic batch; nowhere where the batch is fixed."""

    def __init__(self, program: Program) -> None:
        self._symbol = batch_symbol(program)
        self._static = None if self._symbol is None else _with_batch_atoms(program)
        self._nodes = {n.name: n for n in program.graph.nodes}
        self._values = {n.name: v for n, v in self._static.values.items()} if self._static else {}
        self._batch = self._batch_literals()

    def of(self, name: str) -> BatchAxis | None:
        """The axis of the (first) tensor of the node of that name, None where it holds no batch."""
        if self._symbol is None:
            return None
        return self._by_algebra(name) or self._by_size(self._nodes[name])

    def _batch_literals(self) -> Vector:
        if self._static is None:
            return np.zeros(0, dtype=np.int64)
        first = next(n for n in self._static.program.tensor_placeholders() if n.meta["val"].ndim)
        return self._static.atoms.find(self._static.axes(first)[0])

    def _by_algebra(self, name: str) -> BatchAxis | None:
        """The dimension in which the batch's atoms occur, each for every position of its example."""
        if self._static is None:
            return None
        value = self._values.get(name, ())
        axes = value[0] if isinstance(value, list) else value
        literals = self._static.atoms.find(self._batch)
        if len(np.unique(literals)) < len(literals):
            return None
        for dim, vector in enumerate(axes):
            for slot in self._static.atoms.resolve(vector):
                inner = _run_length(slot, literals)
                if inner is not None:
                    return BatchAxis(dim, inner)
        return None

    def _by_size(self, node: fx.Node) -> BatchAxis | None:
        """Beyond an op without a rule: the first dimension whose size depends on the batch."""
        value = node.meta["val"]
        sizes = (value[0] if isinstance(value, (tuple, list)) else value).shape
        dims = [i for i, n in enumerate(sizes) if not isinstance(n, int) and self._symbol in n.node.expr.free_symbols]
        return BatchAxis(dims[0], None) if dims else None


def batch_symbol(program: Program) -> Any:
    """The symbol of the first size of the first input that has one, or None where that is a number."""
    first = next((n.meta["val"].shape[0] for n in program.tensor_placeholders() if n.meta["val"].ndim), 1)
    return None if isinstance(first, int) else first.node.expr


def _run_length(slot: Vector, literals: Vector) -> int | None:
    """k where position i belongs to example i // k modulo their number, else None."""
    if not np.isin(slot, literals).all():
        return None
    changes = np.flatnonzero(slot[1:] != slot[:-1])
    length = int(changes[0]) + 1 if len(changes) else len(slot)
    expected = literals[np.arange(len(slot)) // length % len(literals)]
    return length if np.array_equal(slot, expected) else None


def _with_batch_atoms(program: Program) -> Analysis | None:
    """The axes where sizes are those of the example inputs, so that the batch has atoms; None where that cannot run."""
    copy = program.copy()
    mode = fake_mode_of(copy.graph)
    for node in copy.tensor_placeholders():
        value = node.meta["val"]
        with mode:
            node.meta["val"] = torch.empty(list(map(concrete, value.shape)), dtype=value.dtype)
    try:
        refresh_values(copy, "finding the batch")
        return analyze(copy)
    except FxpressError:
        return None
