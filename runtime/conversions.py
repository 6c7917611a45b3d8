"""What it costs to go from float to integers and back, for a tensor of a shape, timed in ONNX Runtime.

Within a network the conversion is more than one kernel: float convolutions work on blocks of channels, integer ones on
channels last, and between them the runtime reorders or transposes. So the tensor is passed from an integer convolution
to a float one and back to an integer one, and what runs between them is timed.
"""

from __future__ import annotations

import statistics
from dataclasses import astuple, dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .latency import profile

_OPSET = 21
_IR_VERSION = 10
_STEPS = ("first", "middle", "last")


def conversion_model(shape: tuple[int, ...], within: bool) -> onnx.ModelProto:
    """The tensor [N, C, H, W] between integer, float and integer convolutions of one weight each (`within`), or as it
    is: quantized and dequantized."""
    return _between_convolutions(shape) if within else _alone(shape)


@dataclass(frozen=True)
class Conversions:
    """Seconds for a tensor: the conversions alone; the changes of layout from integer to float kernels (`to_blocks`)
    and back (`from_blocks`), beside the conversion; of those, `block` and `unblock` the float part alone."""

    quantize: float
    dequantize: float
    to_blocks: float = 0.0
    from_blocks: float = 0.0
    block: float = 0.0
    unblock: float = 0.0


def conversion_seconds(model: onnx.ModelProto, effort: float, threads: int = 1) -> Conversions:
    """The medians over the runs of a `conversion_model`."""
    runs = [astuple(_split(run)) for run in profile(model.SerializeToString(), effort, threads)]
    return Conversions(*(statistics.median(values) for values in zip(*runs)))


def _split(run: list[tuple[str, str, float]]) -> Conversions:
    places = [i for i, (_, node, _) in enumerate(run) if node.startswith(_STEPS)]
    if len(places) < 3:
        return Conversions(_sum(run, "QuantizeLinear"), _sum(run, "DequantizeLinear"))
    first, middle, last = places[:3]
    before, after = run[first + 1 : middle], run[middle + 1 : last]
    quantize, dequantize = _sum(after, "QuantizeLinear"), _sum(before, "DequantizeLinear")
    return Conversions(
        quantize,
        dequantize,
        _sum(before) - dequantize,
        _sum(after) - quantize,
        _sum(before, "ReorderInput"),
        _sum(after, "ReorderOutput"),
    )


def _sum(run: list[tuple[str, str, float]], op: str | None = None) -> float:
    return sum(s for name, _, s in run if op in (None, name))


def _alone(shape: tuple[int, ...]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["y", "scale", "zero"], ["d"]),
    ]
    inputs: list[tuple[str, int]] = [("x", TensorProto.FLOAT), ("y", TensorProto.UINT8)]
    return _model(nodes, inputs, [("q", TensorProto.UINT8), ("d", TensorProto.FLOAT)], shape, {})


def _between_convolutions(shape: tuple[int, ...]) -> onnx.ModelProto:
    channels = shape[1]
    nodes = [helper.make_node("DequantizeLinear", ["weight", "scale", "none"], ["integer_weight"])]
    value = "x"
    for step in _STEPS:
        weight = "float_weight" if step == "middle" else "integer_weight"
        # A float layer reads integers channel by channel: see backends/onnx/float_layers.py.
        params, axis = (["scales", "zeros"], 1) if step == "middle" else (["scale", "zero"], None)
        nodes += [
            helper.make_node("DequantizeLinear", [value, *params], [f"{step}_in"], axis=axis),
            helper.make_node("Conv", [f"{step}_in", weight], [f"{step}_out"], name=step, group=channels),
            helper.make_node("QuantizeLinear", [f"{step}_out", "scale", "zero"], [f"{step}_q"]),
        ]
        value = f"{step}_q"
    kernel = (channels, 1, 1, 1)
    weights: dict[str, np.ndarray] = {
        "weight": np.full(kernel, 64, np.int8),
        "none": np.array(0, np.int8),
        "float_weight": np.full(kernel, 0.5, np.float32),
        "scales": np.full(channels, 0.02, np.float32),
        "zeros": np.full(channels, 128, np.uint8),
    }
    return _model(nodes, [("x", TensorProto.UINT8)], [(value, TensorProto.UINT8)], shape, weights)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, int]],
    outputs: list[tuple[str, int]],
    shape: tuple[int, ...],
    weights: dict[str, np.ndarray],
) -> onnx.ModelProto:
    constants: dict[str, np.ndarray] = {"scale": np.array(0.02, np.float32), "zero": np.array(128, np.uint8), **weights}
    graph = helper.make_graph(
        nodes,
        "conversion",
        [helper.make_tensor_value_info(name, dtype, shape) for name, dtype in inputs],
        [helper.make_tensor_value_info(name, dtype, shape) for name, dtype in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=[helper.make_opsetid("", _OPSET)])
