"""OpenVINO on x86 CPUs.

Verified with the `openvino` package (extra `openvino`): the ONNX file is compiled there, and the precision of every
layer is read from what it really runs (runtime/openvino.py, tests/test_target_openvino.py). Its layers read uint8 or
int8, multiply with int8 weights, add a float bias, compute an activation function and the addition of a residual in the
same kernel, and quantize on the way out. It wants each quantization as a pair around float ops, and moves them itself.
"""

from __future__ import annotations

import torch
from torch import fx

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
from ...passes.quantize.spec import NumberFormat, Row, Target
from ...passes.rewrite import argument
from .families import CLAMPS, CONVOLUTIONS, CURVES, MOVES, NORMS, SOFTMAXES


def _pads_two_dims_at_most(node: fx.Node) -> str | None:
    """Only height and width are padded."""
    widths = argument(node, "pad")
    outer = any(widths[4:]) if isinstance(widths, (list, tuple)) else True
    return "OpenVINO pads other dims than height and width wrongly behind a zero point" if outer else None


def _without_borders(node: fx.Node) -> str | None:
    """No padding is averaged with the rest."""
    padding = argument(node, "padding")
    counted = any(padding if isinstance(padding, (list, tuple)) else (padding,)) and argument(node, "count_include_pad")
    return "OpenVINO averages padding wrongly behind a zero point" if counted else None


TARGET = Target(
    name="openvino",
    summary="OpenVINO, CPU, x86: uint8 activations, int8 weights per channel, float biases",
    activation=NumberFormat(torch.uint8),
    weight=NumberFormat(torch.int8, symmetric=True, per_channel=True, narrow=True),
    bias=None,
    absorbs=CLAMPS,
    fuses=CURVES,
    expand=("aten.addmm.default", "aten.matmul.default", "aten.add.Tensor"),
    products_of_tokens=True,
    runtime="openvino",
    run="numbers in ONNX Runtime here; in OpenVINO with the extra `openvino`",
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
        Row(("aten.mul.Tensor",), "arithmetic", ("self", "other"), (floating, two_tensors)),
        Row(("aten.cat.default",), "arithmetic", ("tensors",), (floating,), apart=True),
        Row(
            ("aten.adaptive_avg_pool2d.default", "aten.mean.dim"),
            "arithmetic",
            ("self",),
            (floating, global_pool),
            apart=True,
        ),
        Row(("aten.avg_pool2d.default",), "arithmetic", ("self",), (floating, _without_borders), apart=True),
        Row(("aten.avg_pool2d.default",), "float", apart=True, reason="its borders count"),
        Row(("aten.max_pool2d.default",), "move", ("self",), (floating, four_dimensional), in_pairs=True),
        Row(MOVES, "move", ("self",), (floating,), in_pairs=True),
        Row(("aten.upsample_nearest2d.default",), "move", ("self",), (floating, whole_multiple), in_pairs=True),
        Row(("aten.upsample_nearest2d.vec",), "move", ("input",), (floating, whole_multiple), in_pairs=True),
        Row(
            ("aten.constant_pad_nd.default",),
            "move",
            ("self",),
            (floating, pads_with_zero, _pads_two_dims_at_most),
            in_pairs=True,
        ),
        Row(("aten.constant_pad_nd.default",), "float", apart=True, reason="it pads more than height and width"),
        Row(("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"), "move", in_pairs=True),
        Row(("<built-in function getitem>",), "move", in_pairs=True),
        Row(
            (*NORMS, *SOFTMAXES, "aten.matmul.default", "aten.bmm.default"),
            "float",
            reason="OpenVINO computes it in float here: no integer form was found to be faster",
        ),
    ),
)
