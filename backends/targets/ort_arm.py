"""ONNX Runtime on 64-bit ARM: the rows of ort-x86 on signed integers.

Its kernels multiply int8 activations with int8 weights; activations are affine, so that the smallest stored number is
zero after a Relu, which vanishes then. What ort-x86 stores as q in uint8 is stored as q - 128 here. On x86 ONNX Runtime
turns such a model into unsigned integers when it loads it; the entry `session.qdqisint8allowed` makes it rewrite the
graph as it does on ARM, by which tests and coverage see the kernels that would run there.
"""

from __future__ import annotations

import dataclasses

import torch

from ...passes.quantize.spec import NumberFormat, QuantParams, Row, Target
from .ort_x86 import TARGET as X86


def _signed(row: Row) -> Row:
    """A row whose known range is stored in int8; a resize has no int8 kernel in PyTorch, so it is written in a pair."""
    fixed, stored = (
        QuantParams(p.scale, p.zero_point - 128, torch.int8) if p is not None and p.dtype is torch.uint8 else p
        for p in (row.fixed, row.stored)
    )
    resizes = any("upsample" in op for op in row.ops)
    return dataclasses.replace(row, fixed=fixed, stored=stored, in_pairs=row.in_pairs or resizes)


TARGET: Target = dataclasses.replace(
    X86,
    name="ort-arm",
    processor="arm",
    summary="ONNX Runtime, CPU, 64-bit ARM: int8 affine activations, int8 weights per channel",
    activation=NumberFormat(torch.int8),
    rows=tuple(map(_signed, X86.rows)),
    stem_columns=1,  # these two are not measured there
    depthwise_multiple=1,
    run="graph and numbers in ONNX Runtime here on x86; speed not measured: no ARM processor here",
    session=(("session.qdqisint8allowed", "1"),),
)
