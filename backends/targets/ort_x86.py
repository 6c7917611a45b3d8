"""ONNX Runtime on x86 with VNNI: what its CPU execution provider computes on 8-bit integers.

Measured with onnxruntime 1.31; every row has a test that loads the pattern and looks at the optimized graph
(tests/test_target_ort_x86.py). Fast kernels multiply uint8 activations with int8 weights: uint8 affine activations,
int8 symmetric weights per output channel, int32 biases at scale input x weight.
"""

from __future__ import annotations

import torch

from ...passes.quantize.conditions import (
    by_positive_number,
    constant_weights,
    floating,
    four_dimensional,
    global_pool,
    pads_with_zero,
    plain_add,
    small_depthwise,
    two_dimensional,
    two_tensors,
    whole_multiple,
    wide_groups,
)
from ...passes.quantize.spec import NumberFormat, QuantParams, Row, Target, as_float32
from .families import CLAMPS, CONVOLUTIONS, MOVES, SOFTMAXES

# sigmoid gives values in (0, 1): 256 steps of 1/256.
_UNIT = QuantParams(1.0 / 256.0, 0, torch.uint8)
# hardsigmoid(x) = clamp(x / 6 + 1/2, 0, 1): x in steps of 6/254 with 127 for zero saturates where the function does
# (the topmost integer stands for 255/254). Steps of 6/255 would end at 1, and be half a step off in all of the middle.
_RAMP_INPUT = QuantParams(as_float32(6.0 / 254.0), 127, torch.uint8)
_RAMP = QuantParams(as_float32(1.0 / 254.0), 0, torch.uint8)

TARGET = Target(
    name="ort-x86",
    summary="ONNX Runtime, CPU, x86 with VNNI: uint8 activations, int8 weights per channel",
    activation=NumberFormat(torch.uint8),
    weight=NumberFormat(torch.int8, symmetric=True, per_channel=True, narrow=True),
    stem_blocks=True,
    stem_columns=4,
    depthwise_multiple=16,
    shields_masks=True,
    round_to=16,
    absorbs=CLAMPS,
    expand=(
        "aten.silu.default",
        "aten.hardswish.default",
        "aten.avg_pool2d.default",
        "aten.linear.default",
        "aten.addmm.default",
        "aten.matmul.default",
        "aten.add.Tensor",
        "aten.scaled_dot_product_attention.default",
    ),
    isolate=SOFTMAXES,
    rows=(
        # Conv with quantized input and output: QLinearConv. Without a quantized output it would run in float and
        # dequantize its weights at every call.
        Row(CONVOLUTIONS, "layer", ("input",), (floating, constant_weights, small_depthwise, wide_groups)),
        Row(
            CONVOLUTIONS,
            "layer",
            ("input",),
            (floating, constant_weights, small_depthwise),
            form="narrow-groups",
            optional=True,
            reason="a convolution in groups of 2 to 4 channels takes 1.7 times as long on integers as in float",
        ),
        Row(
            CONVOLUTIONS,
            "layer",
            ("input",),
            (floating, constant_weights, wide_groups),
            form="large-depthwise",
            optional=True,
            reason="a depthwise convolution of 7x7 takes twice as long on integers as in float",
        ),
        # Gemm on a matrix, int32 bias: QGemm, with quantized or float output.
        Row(
            ("aten.linear.default",),
            "layer",
            ("input",),
            (floating, constant_weights, two_dimensional),
            float_output=True,
        ),
        # QLinearMatMul, MatMulIntegerToFloat before a float reader.
        Row(
            ("aten.matmul.default", "aten.bmm.default"),
            "product",
            ("self", "other", "mat2"),
            (floating, two_tensors),
            float_output=True,
            form="attention",
            optional=True,
            reason="with what it takes to quantize its operands, attention takes 1.25 to 1.8 times as long as in float",
        ),
        Row(("aten.add.Tensor",), "arithmetic", ("self", "other"), (floating, two_tensors, plain_add)),
        Row(("aten.mul.Tensor", "aten.div.Tensor"), "rescale", ("self",), (floating, by_positive_number)),
        Row(("aten.mul.Tensor",), "arithmetic", ("self", "other"), (floating, two_tensors)),
        Row(("aten.cat.default",), "arithmetic", ("tensors",), (floating,)),
        Row(("aten.adaptive_avg_pool2d.default", "aten.mean.dim"), "arithmetic", ("self",), (floating, global_pool)),
        Row(("aten.leaky_relu.default",), "arithmetic", ("self",), (floating,)),
        Row(("aten.sigmoid.default",), "fixed", ("self",), (floating,), fixed=_UNIT),
        Row(
            ("aten.hardsigmoid.default",),
            "fixed",
            ("self",),
            (floating,),
            fixed=_RAMP,
            stored=_RAMP_INPUT,
            form="hardswish",
        ),
        # These run on 8 bit directly: the output has the scale of the input.
        Row(("aten.max_pool2d.default",), "move", ("self",), (floating, four_dimensional)),
        Row(MOVES, "move", ("self",), (floating,)),
        Row(("aten.upsample_nearest2d.default",), "move", ("self",), (floating, whole_multiple)),
        Row(("aten.upsample_nearest2d.vec",), "move", ("input",), (floating, whole_multiple)),
        Row(("aten.constant_pad_nd.default",), "move", ("self",), (floating, pads_with_zero)),
        Row(
            ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int"),
            "move",
            ("self",),
        ),
        Row(("<built-in function getitem>",), "move"),
        # In 8 bit these are correct, and slower than in float.
        Row(
            ("aten.avg_pool2d.default",),
            "float",
            reason="only a pool without borders, behind an integer op, becomes an integer (depthwise) convolution",
        ),
        Row(
            SOFTMAXES,
            "float",
            reason="the 8-bit Softmax is 7 times slower than the float one",
        ),
        Row(
            ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"),
            "float",
            reason="ONNX Runtime has no integer ConvTranspose",
            hint="a convolution followed by pixel_shuffle runs on integers",
        ),
        Row(
            (
                "aten.tanh.default",
                "aten.gelu.default",
                "aten.layer_norm.default",
                "aten.instance_norm.default",
                "aten.group_norm.default",
            ),
            "float",
            reason="ONNX Runtime has no integer kernel for it",
        ),
    ),
)
