"""ONNX Runtime on x86 without VNNI: the rows of ort-x86 with weights of seven bits where products are added in pairs.

Without VNNI an 8-bit product is `vpmaddubsw`: two products of uint8 activations and int8 weights are added into one
int16, which saturates. With weights in [-64, 63] it cannot: 2 * 255 * 64 = 32,640 < 32,767. (With eight bits it can:
2 * 255 * 127 = 64,770; the error is silent and large.) Depthwise convolutions multiply and add in 32 bits
(measured: exact with the largest products), and keep weights of eight bits.
"""

from __future__ import annotations

import dataclasses

import torch

from ...passes.quantize.conditions import constant_weights, depthwise, floating, small_depthwise
from ...passes.quantize.spec import NumberFormat, Row
from .families import CONVOLUTIONS
from .ort_x86 import TARGET as WITH_VNNI

_DEPTHWISE = Row(
    CONVOLUTIONS,
    "layer",
    ("input",),
    (floating, constant_weights, small_depthwise, depthwise),
    weight=WITH_VNNI.weight,
)

TARGET = dataclasses.replace(
    WITH_VNNI,
    rows=(_DEPTHWISE, *WITH_VNNI.rows),
    name="ort-x86-avx2",
    summary="ONNX Runtime, CPU, x86 without VNNI: uint8 activations, 7-bit weights per channel, which cannot saturate "
    "(8-bit in depthwise convolutions, whose kernels do not)",
    weight=NumberFormat(torch.int8, symmetric=True, per_channel=True, bits=7),
    stem_columns=1,  # these two are not measured there
    depthwise_multiple=1,
    run="ONNX Runtime, here, with and without VNNI",
)
