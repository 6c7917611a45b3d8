"""Padding in all of torch's modes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand
from .table import row

_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@row("aten.pad.default")
def pad_any_mode(g: Emitter, x: Operand, pad: Sequence[int | torch.SymInt], mode: str, value: Number | None) -> Value:
    """Pad; torch lists (begin, end) from the last dimension to the first."""
    if mode not in _MODES:
        raise g.reject(f"mode={mode!r} is not lowered", hint=f"use one of {', '.join(_MODES)}")
    if not all(isinstance(p, int) for p in pad):
        raise g.reject("a padding that depends on an input's size is not lowered", hint="pad by a fixed number")
    widths = [int(p) for p in pad]
    if mode != "constant" and value:
        raise g.reject(f"value={value} has no meaning with mode={mode!r}", hint="leave out the value")
    if not any(widths):
        return x.value
    begins, ends = [0] * x.rank, [0] * x.rank
    for i in range(len(widths) // 2):
        begins[-1 - i], ends[-1 - i] = widths[2 * i], widths[2 * i + 1]
    filler = g.number(value, x.dtype) if mode == "constant" and value else None
    return g.op("Pad", x, g.ints(begins + ends), filler, mode=_MODES[mode])


@row("aten.constant_pad_nd.default")
def constant_pad(g: Emitter, x: Operand, pad: Sequence[int], value: Number) -> Value:
    return pad_any_mode(g, x, pad, "constant", value)


@row("aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.reflection_pad3d.default")
def reflection_pad(g: Emitter, x: Operand, padding: Sequence[int]) -> Value:
    return pad_any_mode(g, x, padding, "reflect", None)


@row("aten.replication_pad1d.default", "aten.replication_pad2d.default", "aten.replication_pad3d.default")
def replication_pad(g: Emitter, x: Operand, padding: Sequence[int]) -> Value:
    return pad_any_mode(g, x, padding, "replicate", None)
