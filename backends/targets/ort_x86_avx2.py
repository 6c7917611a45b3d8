"""ONNX Runtime on x86 without VNNI: the rows of ort-x86 with weights of seven bits.

Without VNNI an 8-bit product is `vpmaddubsw`: two products of uint8 activations and int8 weights are added into one
int16, which saturates. With weights in [-64, 63] it cannot: 2 * 255 * 64 = 32,640 < 32,767. (With eight bits it can:
2 * 255 * 127 = 64,770; the error is silent and large.)
"""

from __future__ import annotations

import dataclasses

import torch

from ...passes.quantize.spec import NumberFormat
from .ort_x86 import TARGET as WITH_VNNI

TARGET = dataclasses.replace(
    WITH_VNNI,
    name="ort-x86-avx2",
    summary="ONNX Runtime, CPU, x86 without VNNI: uint8 activations, 7-bit weights per channel, which cannot saturate",
    weight=NumberFormat(torch.int8, symmetric=True, per_channel=True, bits=7),
    run="ONNX Runtime, here, with and without VNNI",
)
