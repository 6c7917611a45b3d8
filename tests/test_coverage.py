"""Coverage asks the runtime: what the graph says about integers counts only when the optimized graph agrees."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxpress
from fxpress.backends.coverage import measure_coverage, node_macs


def two_convs(quantize_second_output: bool) -> onnx.ModelProto:
    """Two quantized 3x3 convs of 8 channels on 10x10; without a quantized output the second must run in float."""
    rng = np.random.default_rng(0)
    arrays = {
        "s": np.float32(0.02), "z": np.uint8(0), "ws": np.full(8, 0.01, np.float32), "wz": np.zeros(8, np.int8),
        "w": rng.integers(-127, 127, (8, 8, 3, 3)).astype(np.int8), "bs": np.full(8, 0.0002, np.float32),
        "b": rng.integers(-99, 99, 8).astype(np.int32), "bz": np.zeros(8, np.int32),
    }
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        make("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        make("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        make("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        make("Conv", ["xd", "wd", "bd"], ["c"], name="first", pads=[1, 1, 1, 1]),
        make("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        make("DequantizeLinear", ["cq", "s", "z"], ["cd"]),
        make("Conv", ["cd", "wd", "bd"], ["y0"], name="second", pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    if quantize_second_output:
        nodes += [make("QuantizeLinear", ["y0", "s", "z"], ["yq"]), make("DequantizeLinear", ["yq", "s", "z"], ["y"])]
    else:
        nodes += [make("Neg", ["y0"], ["y"])]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 5, 5])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_macs_are_those_of_the_formula():
    assert dict(node_macs(two_convs(True))) == {"first": 8 * 100 * 72, "second": 8 * 25 * 72}


def test_everything_on_integers():
    coverage = measure_coverage(two_convs(True))
    assert coverage.integer_macs == 1.0
    assert coverage.islands == []
    assert coverage.kernels["QLinearConv"] == 2


def test_a_conv_without_quantized_output_is_an_island():
    coverage = measure_coverage(two_convs(False))
    assert coverage.integer_macs == pytest.approx(0.8)
    (island,) = coverage.islands
    assert island.node == "second"
    assert "computes in float" in island.reason


def test_stated_reasons_are_given():
    coverage = measure_coverage(two_convs(False), {"second": ("no row", "another target")})
    assert (coverage.islands[0].reason, coverage.islands[0].hint) == ("no row", "another target")


class Small(nn.Module):
    """A convolution, attention without weights, a large depthwise convolution, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.kept, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x):
        tokens = self.first(x).flatten(2)
        x = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).reshape(x.shape)
        return self.up(self.kept(self.wide(x)))


def test_every_float_island_has_its_reason_and_what_would_change_it():
    torch.manual_seed(0)
    data = [torch.randn(2, 8, 10, 10)]
    artifact = fxpress.compile(Small().eval(), data[0], calibration=data, pipeline="quantize{keep_float=[kept]}")
    islands = {i["node"]: (i["reason"], i["hint"]) for i in artifact.report["coverage"]["float_islands"]}
    assert "takes twice as long on integers" in islands["wide"][0]
    assert "forms=[large-depthwise]" in islands["wide"][1]
    assert islands["kept"][0] == "keep_float names it"
    assert "no integer ConvTranspose" in islands["up"][0]
    assert "pixel_shuffle" in islands["up"][1]
    (products,) = {v for k, v in islands.items() if "attention" in k}
    assert "forms=[attention]" in products[1]
    assert all(reason and hint for reason, hint in islands.values())
