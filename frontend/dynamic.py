"""Layers with int8 weights whose input is quantized when it is there, by its own range: no calibration.

    q, s, z = dynamic(x)          y = (q - z) @ w_q^T * (s * s_w) + b

`dynamic` is ONNX DynamicQuantizeLinear: uint8, from min(x, 0) to max(x, 0) of the whole tensor. So an example's result
depends a little on what it shares a batch with. Products of integers are exact in float64, which is how they are
computed here; the rest is float32 in the order of ONNX Runtime's kernels (DynamicQuantizeMatMul, DynamicQuantizeLSTM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_STEPS = 255


def quantize_by_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q - z as float64, scale, zero point) of a float32 tensor, with the arithmetic of DynamicQuantizeLinear."""
    if not x.numel():
        return x.double(), torch.ones((), device=x.device), torch.zeros((), device=x.device)
    low, high = (bound.float() for bound in torch.aminmax(x))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(high == low, 1.0, (high - low) / _STEPS)
    zero = torch.round(-low / scale).clamp(0, _STEPS)
    return (torch.round(x / scale) + zero).clamp(0, _STEPS).double() - zero.double(), scale, zero


def _product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., in] times int8 weights [out, in] with one scale per output, in float32."""
    steps, x_scale, _ = quantize_by_range(x)
    return (steps @ weight.double().t()).float() * (x_scale * scale)


def dynamic_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., in], weight int8 [out, in], scale [out], bias [out] or None -> [..., out]."""
    y = _product(x, weight, scale)
    return y if bias is None else y + bias


def _fake_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


def dynamic_lstm(
    x: torch.Tensor,
    hx: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, h_n, c_n) as of torch.lstm, without dropout between layers.

    Per layer and direction two entries (input, recurrence): `weights` int8 [4 hidden, in], `scales` [4 hidden],
    `biases` [4 hidden] (none where there are no biases). The input of a layer is quantized once, the hidden state at
    each step.
    """
    directions = 2 if bidirectional else 1
    value = x.transpose(0, 1) if batch_first else x
    finals: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            own = slice(2 * k, 2 * k + 2)
            start = (hx[0][k], hx[1][k])
            y, final = _run(value, start, weights[own], scales[own], biases[own], bool(direction))
            outputs.append(y)
            finals.append(final)
        value = torch.cat(outputs, -1)
    h, c = (torch.stack([f[i] for f in finals]) for i in (0, 1))
    return value.transpose(0, 1).clone() if batch_first else value.clone(), h, c


def _run(
    x: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    backwards: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One direction of one layer: x [T, B, in] -> ([T, B, hidden], (h, c)). Gates in torch's order i, f, g, o."""
    h, c = state
    given = _product(x, weights[0], scales[0])
    if biases:
        given = given + (biases[0] + biases[1])
    steps = range(x.shape[0] - 1, -1, -1) if backwards else range(x.shape[0])
    outputs: dict[int, torch.Tensor] = {}
    for t in steps:
        i, f, g, o = (given[t] + _product(h, weights[1], scales[1])).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs[t] = h
    return torch.stack([outputs[t] for t in range(x.shape[0])]), (h, c)


def _fake_lstm(
    x: torch.Tensor,
    hx: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = hx[0].shape[-1] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:-1], width)), torch.empty_like(hx[0]), torch.empty_like(hx[1])


OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor": (dynamic_linear, _fake_linear),
    "dynamic_lstm(Tensor x, Tensor[] hx, Tensor[] weights, Tensor[] scales, Tensor[] biases, int num_layers, "
    "bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)": (dynamic_lstm, _fake_lstm),
}
