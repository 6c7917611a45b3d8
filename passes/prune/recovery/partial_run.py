"""Run the part of a program that some of its nodes need, and nothing else.

What recovery measures is wanted layer after layer, so most sweeps need only the front of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ....frontend.program import Program, get_attribute


class PartialRun:
    """Computes the values of the nodes `wanted` for one batch. Every other value is freed after its last reader.

    Where the values of the nodes `given` are handed over, nothing before those is run. Gradients are recorded where the
    caller has them switched on; weights are read anew at each call. `instead` holds functions to call in place of ops.
    """

    def __init__(
        self,
        program: Program,
        wanted: Iterable[fx.Node],
        given: Iterable[fx.Node] = (),
        instead: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self.program = program
        self._instead = instead or {}
        self.wanted = list(dict.fromkeys(wanted))
        self._given = set(given)
        needed = ancestors(self.wanted, self._given)
        self._order = [n for n in program.graph.nodes if n in needed]
        self._freed = _last_read(self._order, self._given, set(self.wanted))

    def __call__(
        self, batch: tuple[torch.Tensor, ...], given: Mapping[fx.Node, Any] | None = None
    ) -> dict[fx.Node, torch.Tensor]:
        """`batch` holds the flat input tensors in the order of `program.inputs`."""
        values: dict[fx.Node, Any] = {**self._inputs(batch), **(given or {})}
        for node in self._order:
            if node in self._given:
                pass
            elif node.op == "get_attr":
                values[node] = get_attribute(self.program.graph_module, str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self._instead.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
            for old in self._freed.get(node, ()):
                del values[old]
        return {n: values[n] for n in self.wanted}

    def _inputs(self, batch: tuple[torch.Tensor, ...]) -> dict[fx.Node, Any]:
        given = dict(zip(self.program.tensor_placeholders(), batch, strict=True))
        names = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        return {n: given.get(n, example) for n, example in zip(names, self.program.example_inputs)}


def ancestors(nodes: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and everything that they are computed from; nothing beyond those in `stop`."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes if node not in stop else ()
    return seen


def depths_of(program: Program, nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """For every node of the program, how many of `nodes` lie one behind the other on the way to it, itself included."""
    chosen = set(nodes)
    depths: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        depths[node] = max((depths[n] for n in node.all_input_nodes), default=0) + (node in chosen)
    return depths


def by_depth(program: Program, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """`nodes` by depth, the first level first."""
    chosen = list(nodes)
    depths = depths_of(program, chosen)
    levels: dict[int, list[fx.Node]] = {}
    for node in chosen:
        levels.setdefault(depths[node], []).append(node)
    return [levels[d] for d in sorted(levels)]


class Front:
    """Runs a program stage after stage, where the stages change its layers one level after the other.

    What no later stage can change is kept for the next stage instead of being computed again, batch by batch, as long
    as `limit` bytes hold it: memory is bounded whatever the number of batches.
    """

    def __init__(self, program: Program, layers: Iterable[fx.Node], limit: int) -> None:
        self._program, self._limit = program, limit
        self._depths = depths_of(program, layers)
        self._reading = _input_dependent(program)  # what weights alone decide may change with them, and is not kept
        self._kept: dict[int, dict[fx.Node, Any]] = {}
        self._bytes = 0
        self._nodes: list[fx.Node] = []
        self._runs: tuple[PartialRun, PartialRun]

    def start(self, stage: int, wanted: Iterable[fx.Node]) -> None:
        """Begin a sweep before which the levels below `stage` have been changed."""
        before, wanted = self._nodes, list(wanted)
        self._nodes = [
            n for n, d in self._depths.items() if d <= stage and n in self._reading and self._stays(n, stage)
        ]
        both = [*wanted, *self._nodes]
        self._wanted = wanted
        self._runs = PartialRun(self._program, both), PartialRun(self._program, both, before)

    def __call__(self, number: int, batch: tuple[torch.Tensor, ...]) -> dict[fx.Node, torch.Tensor]:
        """The wanted values on batch `number`, which may have been kept as it was in the first sweep."""
        old = self._kept.pop(number, None)
        values = self._runs[0](batch) if old is None else self._runs[1](batch, old)
        self._bytes -= _nbytes(old)
        new = {n: values[n] for n in self._nodes}
        if self._bytes + _nbytes(new) <= self._limit:
            self._kept[number] = new
            self._bytes += _nbytes(new)
        return {n: values[n] for n in self._wanted}

    def _stays(self, node: fx.Node, stage: int) -> bool:
        return any(self._depths[user] > stage for user in node.users)


def _input_dependent(program: Program) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _nbytes(values: dict[fx.Node, Any] | None) -> int:
    return sum(v.nbytes for v in (values or {}).values() if isinstance(v, torch.Tensor))


def _last_read(order: list[fx.Node], given: set[fx.Node], kept: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in order:
        last[node] = node
        last.update((used, node) for used in node.all_input_nodes if node not in given)
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        if node not in kept:
            freed.setdefault(reader, []).append(node)
    return freed
