"""Run the part of a program that some of its nodes need, and nothing else.

What recovery measures is wanted layer after layer, so most sweeps need only the front of the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ...frontend.program import Program, get_attribute


class PartialRun:
    """Computes the values of the nodes `wanted` for one batch. Every other value is freed after its last reader.

    Gradients are recorded where the caller has them switched on; weights are read anew at each call.
    """

    def __init__(self, program: Program, wanted: Iterable[fx.Node]) -> None:
        self.program = program
        self.wanted = list(dict.fromkeys(wanted))
        needed = ancestors(self.wanted)
        self._order = [n for n in program.graph.nodes if n in needed]
        self._freed = _last_read(self._order, set(self.wanted))

    def __call__(self, batch: tuple[torch.Tensor, ...]) -> dict[fx.Node, torch.Tensor]:
        """`batch` holds the flat input tensors in the order of `program.inputs`."""
        values: dict[fx.Node, Any] = self._inputs(batch)
        for node in self._order:
            if node.op == "get_attr":
                values[node] = get_attribute(self.program.graph_module, str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for old in self._freed.get(node, ()):
                del values[old]
        return {n: values[n] for n in self.wanted}

    def _inputs(self, batch: tuple[torch.Tensor, ...]) -> dict[fx.Node, Any]:
        given = dict(zip(self.program.tensor_placeholders(), batch, strict=True))
        names = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        return {n: given.get(n, example) for n, example in zip(names, self.program.example_inputs)}


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def by_depth(program: Program, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """`nodes` by how many others of them lie one behind the other on the way to each."""
    chosen = set(nodes)
    depths: dict[fx.Node, int] = {}
    levels: list[list[fx.Node]] = []
    for node in program.graph.nodes:
        depth = max((depths[n] for n in node.all_input_nodes), default=0)
        if node in chosen:
            if depth == len(levels):
                levels.append([])
            levels[depth].append(node)
            depth += 1
        depths[node] = depth
    return levels


def _last_read(order: list[fx.Node], kept: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in order:
        last[node] = node
        last.update((used, node) for used in node.all_input_nodes)
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        if node not in kept:
            freed.setdefault(reader, []).append(node)
    return freed
