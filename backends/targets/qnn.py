"""Qualcomm QNN (HTP) through ONNX Runtime's QNN provider: not run here, only the form of the file is checked.

Every op is a unit "dequantize, op, quantize". Activations are uint8 affine, weights int8 symmetric (per channel in
convolutions), biases int32. Normalizations, softmax and curved functions lose much at 8 bits: they read and give uint16
(`_WIDE`), as does what `use_int16` names (Qualcomm's A16W8); a conversion stands where 8 and 16 bits meet. The fixed
ranges of sigmoid and tanh at 16 bits are those that HTP asks for. 16-bit QuantizeLinear is standard ONNX from opset 21.
"""

from __future__ import annotations

import torch

from ...passes.quantize.conditions import (
    constant_weights,
    floating,
    four_dimensional,
    global_pool,
    pads_with_zero,
    plain_add,
    two_tensors,
    whole_multiple,
)
from ...passes.quantize.spec import NumberFormat, QuantParams, Row, Target
from .families import CLAMPS, CONVOLUTIONS, MOVES

_WIDE = NumberFormat(torch.uint16)
_PER_TENSOR = NumberFormat(torch.int8, symmetric=True, narrow=True)
_SIGMOID = QuantParams(2.0**-16, 0, torch.uint16)
_TANH = QuantParams(2.0**-15, 32768, torch.uint16)

TARGET = Target(
    name="qnn",
    summary="Qualcomm QNN (HTP): uint8 activations, uint16 where listed, int8 symmetric weights",
    activation=NumberFormat(torch.uint8),
    weight=NumberFormat(torch.int8, symmetric=True, per_channel=True, narrow=True),
    absorbs=CLAMPS,
    activation16=_WIDE,
    expand=("aten.linear.default", "aten.addmm.default", "aten.matmul.default", "aten.add.Tensor"),
    runtime=None,
    run="not run here: form of the file checked; numbers in ONNX Runtime",
    rows=(
        Row(CONVOLUTIONS, "layer", ("input",), (floating, constant_weights)),
        Row(("aten.linear.default",), "layer", ("input",), (floating, constant_weights), weight=_PER_TENSOR),
        Row(("aten.matmul.default", "aten.bmm.default"), "product", ("self", "other", "mat2"), (floating, two_tensors)),
        Row(("aten.add.Tensor",), "arithmetic", ("self", "other"), (floating, two_tensors, plain_add)),
        Row(("aten.mul.Tensor", "aten.sub.Tensor"), "arithmetic", ("self", "other"), (floating, two_tensors)),
        Row(("aten.cat.default",), "arithmetic", ("tensors",), (floating,)),
        Row(("aten.adaptive_avg_pool2d.default", "aten.mean.dim"), "arithmetic", ("self",), (floating, global_pool)),
        Row(("aten.avg_pool2d.default", "aten.leaky_relu.default"), "arithmetic", ("self",), (floating,)),
        Row(("aten.sigmoid.default",), "fixed", ("self",), (floating,), fixed=_SIGMOID, activation=_WIDE),
        Row(("aten.tanh.default",), "fixed", ("self",), (floating,), fixed=_TANH, activation=_WIDE),
        Row(
            ("aten.softmax.int", "aten._softmax.default", "aten.gelu.default", "aten.hardswish.default"),
            "arithmetic",
            ("self",),
            (floating,),
            activation=_WIDE,
        ),
        Row(("aten.layer_norm.default",), "arithmetic", ("input",), (floating,), activation=_WIDE),
        Row(("aten.max_pool2d.default",), "move", ("self",), (floating, four_dimensional), in_pairs=True),
        Row(MOVES, "move", ("self",), (floating,), in_pairs=True),
        Row(("aten.upsample_nearest2d.default",), "move", ("self",), (floating, whole_multiple), in_pairs=True),
        Row(("aten.upsample_nearest2d.vec",), "move", ("input",), (floating, whole_multiple), in_pairs=True),
        Row(("aten.constant_pad_nd.default",), "move", ("self",), (floating, pads_with_zero), in_pairs=True),
        Row(("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"), "move", in_pairs=True),
        Row(("<built-in function getitem>",), "move", in_pairs=True),
    ),
)
