"""Running a program so that the operands which its nodes sum over can be looked at: where pruned channels are consumed.

To remove a channel is to multiply it by zero at each of these operands (see `masking`). A *gate* is that factor, 1 in
the program as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ....frontend.batch_dim import count_examples
from ....frontend.cost import op_name
from ....frontend.program import Program
from ...rewrite import argument_names, aten
from ..analysis import Analysis, Contraction
from ..axes import Vector
from .batch_layout import BatchAxis, BatchLayout, batch_symbol

_PIECE = 32  # examples that run at once


@dataclass(frozen=True, eq=False)
class Gate:
    """Channels at one operand: position p of it belongs to `literals[index[p]]`, or to none (index = their number).

    One operand has several gates where its positions are products (heads and features).
    """

    contraction: Contraction
    literals: Vector  # sorted
    index: torch.Tensor
    batch: BatchAxis | None  # of the operand
    output_batch: BatchAxis | None  # of the node's (first) output

    def by_example(self, operand: torch.Tensor, count: int) -> torch.Tensor:
        """[examples, other values, positions]; a single example where the operand has no batch."""
        dim = self.contraction.dim
        if self.batch is None:
            return operand.movedim(dim, -1).reshape(1, -1, len(self.index))
        # Splitting the batch axis adds two dimensions before those that come after it.
        last = dim + 2 if dim > self.batch.dim else dim
        first = self.batch.dim + 1
        split = self.batch.split(operand, count).movedim((first, last), (0, -1))
        return split.reshape(count, -1, len(self.index))

    def by_literal(self, positions: torch.Tensor) -> torch.Tensor:
        """Sums over the positions of each literal: [..., positions] -> [..., literals]."""
        sums = positions.new_zeros((*positions.shape[:-1], len(self.literals) + 1))
        return sums.index_add_(-1, self.index, positions)[..., :-1]

    def side_by_side(self, positions: torch.Tensor) -> torch.Tensor:
        """[n, positions] -> [n k, literals]: literals as columns, each with its first k positions (k the least)."""
        order = torch.argsort(self.index, stable=True)
        counts = torch.bincount(self.index, minlength=len(self.literals) + 1)
        starts = (torch.cumsum(counts, 0) - counts)[:-1]
        columns = [positions[:, order[starts + i]] for i in range(int(counts[:-1].min()))]
        return torch.cat(columns)


def find_gates(analysis: Analysis, literals: Vector, program: Program) -> list[Gate]:
    """The gates of these literals, in graph order, for runs of `program`, whose nodes are those of the analysed one."""
    wanted = np.zeros(analysis.atoms.count, dtype=bool)
    wanted[literals] = True
    layout = BatchLayout(program)
    gates: list[Gate] = []
    summed: set[tuple[fx.Node, bytes]] = set()  # by einsum, whose operands are multiplied: one gate for their sum
    for contraction in analysis.contractions:
        vector = analysis.contracted(contraction)
        batches = layout.of(contraction.operand.name), layout.of(contraction.node.name)
        for slot in analysis.atoms.resolve(vector):
            found = np.unique(slot[wanted[slot]])
            key = (contraction.node, found.tobytes())
            if len(found) and key not in summed:
                if op_name(contraction.node) == "aten.einsum":
                    summed.add(key)
                index = np.where(wanted[slot], np.searchsorted(found, slot), len(found))
                gates.append(Gate(contraction, found, torch.from_numpy(index), *batches))
    return gates


# -- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a node that sums over an operand, with `count` examples in it."""

    contraction: Contraction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int

    @property
    def node(self) -> fx.Node:
        return self.contraction.node

    @property
    def operand(self) -> torch.Tensor:
        position = self.contraction.position
        return self._given if position is None else self._given[position]

    def on(self, operand: torch.Tensor) -> Call:
        """The same call on another operand."""
        name, at, position = self.contraction.argument, self._position, self.contraction.position
        new = operand if position is None else [*self._given[:position], operand, *self._given[position + 1 :]]
        if name in self.kwargs:
            return replace(self, kwargs={**self.kwargs, name: new})
        return replace(self, args=(*self.args[:at], new, *self.args[at + 1 :]))

    @property
    def _given(self) -> Any:
        name = self.contraction.argument
        return self.kwargs[name] if name in self.kwargs else self.args[self._position]

    def output(self) -> torch.Tensor:
        """What the sum gives: the first output of the node, and for attention the products of query and key."""
        if self.node.target is aten.scaled_dot_product_attention.default:
            return _attention_logits(*self.args[:2])
        result = self.node.target(*self.args, **self.kwargs)  # type: ignore[operator]
        return result if isinstance(result, torch.Tensor) else result[0]

    @property
    def _position(self) -> int:
        return list(argument_names(self.node)).index(self.contraction.argument)


def _attention_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Query times key, up to the scale; several heads of the query may share one of the key."""
    if query.ndim > 2 and query.shape[-3] != key.shape[-3] > 1:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    return query @ key.mT


class GateRun(fx.Interpreter):
    """Runs a program; each node with gates has its calls shown to `visit`, which may give back others."""

    def __init__(self, program: Program, gates: list[Gate], visit: Callable[[Call, list[Gate]], Call]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self._program = program
        self._visit = visit
        self._gates: dict[str, dict[Contraction, list[Gate]]] = {}
        for gate in gates:
            of_node = self._gates.setdefault(gate.contraction.node.name, {})
            of_node.setdefault(gate.contraction, []).append(gate)
        self._count = 1

    def outputs(self, batch: tuple[torch.Tensor, ...]) -> Any:
        """What the program gives for flat input tensors, in the form that the module has."""
        self._count = example_count(self._program, batch)
        given = dict(zip(self._program.tensor_placeholders(), batch, strict=True))
        names = [n for n in self._program.graph.nodes if n.op == "placeholder"]
        leaves = [given.get(n, e) for n, e in zip(names, self._program.example_inputs)]
        flat = self.run(*leaves, enable_io_processing=False)
        return self._program.graph.process_outputs(flat)

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._gates:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        for contraction, gates in self._gates[n.name].items():
            call = self._visit(Call(contraction, args, kwargs, self._count), gates)
            args, kwargs = call.args, call.kwargs
        return n.target(*args, **kwargs)  # type: ignore[operator]


# -- examples -----------------------------------------------------------------------------------------------------


def example_count(program: Program, batch: tuple[torch.Tensor, ...]) -> int:
    """The number of examples; where the batch is fixed, a whole batch counts as one."""
    return 1 if batch_symbol(program) is None else count_examples(program.inputs, batch)


def all_pieces(
    program: Program, batches: Iterable[tuple[Any, ...]], gates: Iterable[Gate] = ()
) -> Iterator[tuple[Any, ...]]:
    """Every batch (with or without labels) in parts of few examples, where the program takes batches of any size.

    One by one where a gate is at an operand without a batch (a recurrent weight), which sums over examples.
    """
    size = 1 if any(g.batch is None for g in gates) else _PIECE
    for batch in batches:
        yield from _pieces(program, batch, size) if batch_symbol(program) is not None else [batch]


def _pieces(program: Program, batch: tuple[Any, ...], size: int) -> Iterator[tuple[Any, ...]]:
    count = count_examples(program.inputs, tuple(t for t in batch if isinstance(t, torch.Tensor)))
    for start in range(0, count, size):
        yield tuple(t[start : start + size] if _runs_along(t, count) else t for t in batch)


def _runs_along(value: Any, count: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == count


class Signs:
    """Random signs, the same for an example whatever batch it comes in."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[str, np.random.Generator] = {}

    def like(self, tensor: torch.Tensor, key: str, count: int, batch: BatchAxis | None) -> torch.Tensor:
        """Signs in the form of `tensor`, the next ones of the sequence `key`; examples lie along `batch`."""
        generator = self._generators.setdefault(key, np.random.default_rng([self._seed, *key.encode()]))
        rows = 1 if batch is None else count
        size = tensor.numel() // rows
        words = generator.integers(0, 2**64, size=(rows, math.ceil(size / 64)), dtype=np.uint64)
        bits = np.unpackbits(words.view(np.uint8), axis=1)[:, :size]
        signs = torch.from_numpy(bits).to(tensor.dtype).mul_(2).sub_(1)
        if batch is None:
            return signs.reshape(tensor.shape)
        at = batch.dim + 1
        split = batch.split(tensor, count).movedim(at, 0)
        return signs.reshape(split.shape).movedim(0, at).reshape(tensor.shape)
