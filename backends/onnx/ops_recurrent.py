"""LSTM, GRU and plain recurrent layers, one ONNX node a layer.

torch orders the gates (i, f, g, o) and (r, z, n); ONNX wants (i, o, f, c) and (z, r, h). Both directions of a layer are
one node. Parameters come flat: per layer and direction w_ih, w_hh and, with biases, b_ih, b_hh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from onnx_ir import Value

from .emit import Emitter, Operand
from .table import row


@dataclass(frozen=True)
class _Kind:
    """An ONNX recurrent op: its name, where each of its gates stands in torch, and its activation names."""

    op: str
    gates: tuple[int, ...]
    activations: tuple[str, ...] = ()


LSTM_GATES = (0, 3, 1, 2)
_LSTM = _Kind("LSTM", LSTM_GATES)
_GRU = _Kind("GRU", (1, 0, 2))
_RNN_TANH = _Kind("RNN", (0,), ("Tanh",))
_RNN_RELU = _Kind("RNN", (0,), ("Relu",))


@row("aten.lstm.input")
def lstm(
    g: Emitter,
    x: Operand,
    hx: Sequence[Operand],
    params: Sequence[Operand],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Value]:
    """(output, h_n, c_n)."""
    if len(params) != num_layers * (4 if has_biases else 2) * (2 if bidirectional else 1):
        raise g.reject("LSTM with projections is not lowered", hint="use proj_size=0")
    _check_mode(g, dropout, train)
    return _recurrent(g, _LSTM, x, hx, params, has_biases, num_layers, bidirectional, batch_first)


@row("aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def gru(
    g: Emitter,
    x: Operand,
    hx: Operand,
    params: Sequence[Operand],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Value]:
    """(output, h_n)."""
    _check_mode(g, dropout, train)
    name = str(g.node.target)  # type: ignore[union-attr]
    kind = _GRU if "gru" in name else _RNN_TANH if "tanh" in name else _RNN_RELU
    return _recurrent(g, kind, x, [hx], params, has_biases, num_layers, bidirectional, batch_first)


def _check_mode(g: Emitter, dropout: float, train: bool) -> None:
    if dropout and train:
        raise g.reject("dropout between recurrent layers is random in training", hint="call program.eval() first")


def _recurrent(
    g: Emitter,
    kind: _Kind,
    x: Operand,
    states: Sequence[Operand],
    params: Sequence[Operand],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Value]:
    if x.rank != 3:
        raise g.reject("a recurrent layer without a batch dimension is not lowered", hint="add a batch dimension")
    directions = 2 if bidirectional else 1
    per_layer = (4 if has_biases else 2) * directions
    value = g.op("Transpose", x, perm=[1, 0, 2]) if batch_first else x.value
    finals: list[list[Value]] = []
    width = int(states[0].shape[-1])
    for layer in range(layers):
        own = params[layer * per_layer : (layer + 1) * per_layer]
        start = [slice_layers(g, s, layer * directions, directions, layers) for s in states]
        value, *final = _layer(g, kind, value, start, own, directions, width)
        finals.append(final)
    outputs = [g.op("Transpose", value, perm=[1, 0, 2]) if batch_first else value]
    for parts in zip(*finals):
        outputs.append(parts[0] if layers == 1 else g.op("Concat", *parts, axis=0))
    return outputs


def slice_layers(g: Emitter, state: Operand, first: int, count: int, layers: int) -> Value:
    """The states of one layer, of [layers * directions, B, hidden]."""
    if layers == 1:
        return state.value
    return g.op("Slice", state, g.ints([first]), g.ints([first + count]), g.ints([0]))


def _layer(
    g: Emitter, kind: _Kind, x: Value, states: list[Value], params: Sequence[Operand], directions: int, width: int
) -> list[Value]:
    """x [T, B, in] -> (y [T, B, directions * width], final states [directions, B, width])."""
    each = len(params) // directions
    sets = [params[d * each : (d + 1) * each] for d in range(directions)]
    weight, recurrence = (_stacked(g, kind, [s[i] for s in sets]) for i in (0, 1))
    bias = None
    if each == 4:
        bias = g.constant(torch.stack([torch.cat([_ordered(g, kind, s[i]) for i in (2, 3)]) for s in sets]))
    linear_before_reset = 1 if kind is _GRU else None
    y, *final = g.ops(
        kind.op,
        1 + len(states),
        x,
        weight,
        recurrence,
        bias,
        None,
        *states,
        hidden_size=width,
        direction="bidirectional" if directions == 2 else "forward",
        linear_before_reset=linear_before_reset,
        activations=list(kind.activations) * directions or None,
    )
    return [merge_directions(g, y, directions, width), *final]


def merge_directions(g: Emitter, y: Value, directions: int, width: int) -> Value:
    """[T, directions, B, width] -> [T, B, directions * width]."""
    if directions == 1:
        return g.op("Squeeze", y, g.ints([1]))
    return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.ints([0, 0, directions * width]))


def _stacked(g: Emitter, kind: _Kind, weights: list[Operand]) -> Value:
    return g.constant(torch.stack([_ordered(g, kind, w) for w in weights]))


def _ordered(g: Emitter, kind: _Kind, weight: Operand) -> torch.Tensor:
    if weight.contents is None:
        raise g.reject("recurrent weights that are computed from inputs are not lowered", hint="use fixed weights")
    return in_gate_order(kind.gates, weight)


def in_gate_order(gates: Sequence[int], parameter: Operand) -> torch.Tensor:
    """A constant parameter with its gates in ONNX's order."""
    assert parameter.contents is not None
    parts = parameter.contents.detach().chunk(len(gates))
    return torch.cat([parts[i] for i in gates])
