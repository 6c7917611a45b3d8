"""An integer part in the surroundings that it has within a network: between integer convolutions, channels last.

The runtime computes integer convolutions on channels last and lets what is between them work on that layout, too. A
pool or a concatenation that is cut out alone would be run on channels first, where some kernels take ten times as long.
So each image that such a part reads comes from a convolution of one weight per channel, and each that it gives goes
into one; they are given channels last, so that nothing is transposed at the outer ends. Probes are known by name.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PROBE = "fxpress.probe"
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def probed(part: onnx.ModelProto) -> onnx.ModelProto:
    """`part` between probes; as it is where it holds a layer of its own or passes no images of integers."""
    images = {v.name for v in (*part.graph.input, *part.graph.output) if _is_image(v)}
    if not images or any(n.op_type in _LAYERS for n in part.graph.node):
        return part
    result = onnx.ModelProto()
    result.CopyFrom(part)
    graph = result.graph
    del graph.input[:], graph.output[:], graph.node[:]
    before = [_input(graph, v) if v.name in images else _as_it_is(graph.input, v) for v in part.graph.input]
    graph.node.extend(n for nodes in before for n in nodes)
    graph.node.extend(part.graph.node)
    after = [_output(graph, v) if v.name in images else _as_it_is(graph.output, v) for v in part.graph.output]
    graph.node.extend(n for nodes in after for n in nodes)
    graph.initializer.extend(_constants())
    return result


def _is_image(value: onnx.ValueInfoProto) -> bool:
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    integer = value.type.tensor_type.elem_type in (TensorProto.UINT8, TensorProto.INT8)
    return integer and len(shape) == 4 and math.prod(shape[2:]) > 1


def _as_it_is(values: list[onnx.ValueInfoProto], value: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    values.append(value)
    return []


def _input(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    graph.input.append(_channels_last(value, f"{value.name}.last"))
    first = f"{value.name}.first"
    nodes = [helper.make_node("Transpose", [f"{value.name}.last"], [first], name=f"{PROBE}.{first}", perm=_TO_FIRST)]
    return nodes + _convolution(graph, value, first, value.name)


def _output(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    name, last = f"{value.name}.out", f"{value.name}.out.last"
    graph.output.append(_channels_last(value, last))
    nodes = _convolution(graph, value, value.name, name)
    return [*nodes, helper.make_node("Transpose", [name], [last], name=f"{PROBE}.{last}", perm=_TO_LAST)]


def _convolution(graph: onnx.GraphProto, value: onnx.ValueInfoProto, source: str, result: str) -> list[onnx.NodeProto]:
    """source -> one weight per channel -> result, on integers."""
    channels = value.type.tensor_type.shape.dim[1].dim_value
    zero = f"{PROBE}.zero{value.type.tensor_type.elem_type}"
    weight = numpy_helper.from_array(np.full((channels, 1, 1, 1), 64, np.int8), f"{PROBE}.{result}.weight")
    graph.initializer.append(weight)
    real, taken, given = (f"{PROBE}.{result}.{k}" for k in ("real", "taken", "given"))
    make = helper.make_node
    return [
        make("DequantizeLinear", [weight.name, f"{PROBE}.scale", f"{PROBE}.none"], [real], name=f"{real}.node"),
        make("DequantizeLinear", [source, f"{PROBE}.scale", zero], [taken], name=f"{taken}.node"),
        make("Conv", [taken, real], [given], name=f"{given}.node", group=channels),
        make("QuantizeLinear", [given, f"{PROBE}.scale", zero], [result], name=f"{PROBE}.{result}.node"),
    ]


def _constants() -> list[TensorProto]:
    values: dict[str, np.ndarray] = {
        "scale": np.array(0.02, np.float32),
        "none": np.array(0, np.int8),
        f"zero{TensorProto.UINT8}": np.array(128, np.uint8),
        f"zero{TensorProto.INT8}": np.array(0, np.int8),
    }
    return [numpy_helper.from_array(v, f"{PROBE}.{k}") for k, v in values.items()]


def _channels_last(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, [shape[i] for i in _TO_LAST])
