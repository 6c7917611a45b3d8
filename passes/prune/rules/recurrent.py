"""The rule of recurrent layers: LSTM, GRU and plain RNN, of any number of layers, in one or both directions.

The hidden size is one dimension for all layers and directions, since the initial state is one tensor
[layers x directions, batch, hidden]. A weight [gates x hidden, in] has it once for each gate, outer to inner.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ....frontend.cost import concrete, op_name
from ...rewrite import argument, argument_names
from ..analysis import Analysis, rows, shape_of
from ..axes import Axes, Vector

_GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}


def recurrent(analysis: Analysis, node: fx.Node) -> list[Axes]:
    """Output [.., directions x hidden], and the last states [layers x directions, batch, hidden]."""
    layer = _Recurrent(analysis, node)
    if layer.is_projected or op_name(node) not in _GATES or "batch_sizes" in layer.names:
        return _stays(analysis, node)
    x, states = analysis.need(node, "input"), [analysis.axes(s) for s in layer.states]
    time = x[1] if argument(node, "batch_first") else x[0]
    analysis.pin(time, node, "a recurrent layer steps through it")
    hidden = states[0][-1]
    for state in states[1:]:
        analysis.same(hidden, state[-1], node)
    inputs = x[-1]
    for weights in layer.layers():
        for direction in weights:
            layer.relate(direction, inputs, hidden)
        inputs = np.concatenate([hidden] * layer.directions)
    last = (*states[0][:-1], hidden)
    return [(*x[:-1], inputs), *([last] * len(states))]


class _Recurrent:
    """The arguments of a recurrent node, by their meaning."""

    def __init__(self, analysis: Analysis, node: fx.Node) -> None:
        self.analysis, self.node = analysis, node
        self.names = argument_names(node)
        hx: Any = argument(node, "hx")
        self.states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        self.params: list[fx.Node] = list(argument(node, "params"))
        self.directions = 2 if argument(node, "bidirectional") else 1
        self.biased = bool(argument(node, "has_biases"))
        matrices = [p for p in self.params if len(shape_of(p)) == 2]
        self.is_projected = len(matrices) != 2 * self.directions * int(argument(node, "num_layers"))
        self.values = sum(prod(shape_of(m)) for m in matrices)

    def layers(self) -> list[list[list[int]]]:
        """layer -> direction -> positions in `params` of [w_ih, w_hh] or [w_ih, w_hh, b_ih, b_hh]."""
        each = 4 if self.biased else 2
        runs = [list(range(i, i + each)) for i in range(0, len(self.params), each)]
        return [runs[i : i + self.directions] for i in range(0, len(runs), self.directions)]

    def relate(self, positions: list[int], inputs: Vector, hidden: Vector) -> None:
        """One direction of one layer."""
        analysis, node, count = self.analysis, self.node, _GATES[op_name(self.node)]
        gates = np.tile(hidden, count)
        for position, columns in zip(positions, (inputs, hidden)):
            weight = analysis.axes(self.params[position])
            analysis.same(gates, weight[0], node)
            analysis.same(columns, weight[1], node)
            analysis.contract(node, "params", 1, position)
            share = len(weight[0]) * len(weight[1]) / self.values
            analysis.costs(node, hidden, weight[1], share=share)
        for position in positions[2:]:
            analysis.same(gates, analysis.axes(self.params[position])[0], node)


def _stays(analysis: Analysis, node: fx.Node) -> list[Axes]:
    """Packed sequences and projected states: nothing changes."""
    for used in node.all_input_nodes:
        analysis.pin(analysis.axes(used), node, f"{op_name(node)} with a projection or a packed sequence")
    analysis.costs(node)
    values: list[torch.Tensor] = list(node.meta["val"])
    return [tuple(analysis.atoms.fixed(concrete(s)) for s in v.shape) for v in values]


RECURRENT_RULES = rows("lstm gru rnn_tanh rnn_relu", recurrent)
