"""NVIDIA TensorRT in explicit quantization: not run here, only the form of the file is checked (backends/structure.py).

Written from TensorRT's documentation ("Explicit Quantization"): int8 is symmetric (zero point 0), per tensor for
activations and per channel for weights; biases stay float; the inputs of weighted ops are quantized, their outputs only
where an integer op reads them; the residual of a skip connection is quantized and the branch that ends in a layer is
not, so that the addition and the activation function run in the layer's kernel.
"""

from __future__ import annotations

import torch

from ...passes.quantize.conditions import (
    constant_weights,
    floating,
    four_dimensional,
    global_pool,
    plain_add,
    two_tensors,
)
from ...passes.quantize.spec import NumberFormat, Row, Target
from .families import CLAMPS, CONVOLUTIONS, CURVES, MOVES, NORMS, SOFTMAXES

TARGET = Target(
    name="tensorrt",
    summary="NVIDIA TensorRT: int8 symmetric activations, int8 weights per channel, float biases",
    activation=NumberFormat(torch.int8, symmetric=True),
    weight=NumberFormat(torch.int8, symmetric=True, per_channel=True, narrow=True),
    bias=None,
    fuses=(*CLAMPS, *CURVES),
    expand=("aten.linear.default", "aten.addmm.default", "aten.matmul.default", "aten.add.Tensor"),
    runtime=None,
    session=(("session.qdqisint8allowed", "1"),),
    run="not run here: form of the file checked; numbers in ONNX Runtime",
    rows=(
        Row(
            (*CONVOLUTIONS, "aten.linear.default"),
            "layer",
            ("input",),
            (floating, constant_weights),
            float_output=True,
            offers=True,
        ),
        Row(("aten.add.Tensor",), "arithmetic", ("self", "other"), (floating, two_tensors, plain_add), joins=True),
        Row(("aten.cat.default",), "arithmetic", ("tensors",), (floating,)),
        Row(("aten.adaptive_avg_pool2d.default", "aten.mean.dim"), "arithmetic", ("self",), (floating, global_pool)),
        Row(("aten.avg_pool2d.default",), "arithmetic", ("self",), (floating,)),
        Row(("aten.max_pool2d.default",), "move", ("self",), (floating, four_dimensional), in_pairs=True),
        Row(MOVES, "move", ("self",), (floating,), in_pairs=True),
        Row(("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"), "move", in_pairs=True),
        Row(("<built-in function getitem>",), "move", in_pairs=True),
        Row(
            (*NORMS, *SOFTMAXES, "aten.matmul.default", "aten.bmm.default", "aten.mul.Tensor"),
            "float",
            reason="TensorRT computes it in float (or half), which its fusions of attention and gates expect",
        ),
    ),
)
