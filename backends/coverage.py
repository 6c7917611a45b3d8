"""How much of a compiled model the runtime really computes on integers.

The runtime is asked, not believed: the model is loaded, and the optimized graph that ONNX Runtime writes out is read.
Fusions keep the name of the node that does the work (at optimization level "extended", before layout changes), so MACs
are counted on our own graph and looked up by name in the optimized one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from ..frontend.program import Program, layer_name
from ..passes.quantize.reasons import Reason
from ..passes.quantize.spec import Target
from .onnx.part import SHARE, without_weights

INTEGER_OPS = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention"}
    | {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
)
_RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
_COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "Einsum", *_RECURRENT)


@dataclass(frozen=True)
class Island:
    """A node with MACs that runs in float: name, op in the optimized graph, MACs at batch 1, why, and what to do."""

    node: str
    op: str
    macs: int
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Coverage:
    """`integer_macs`: share (0..1) of all MACs in integer kernels. `kernels`: how often each op occurs when it runs."""

    integer_macs: float
    total_macs: int
    islands: list[Island] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)


def measure_coverage(
    model: onnx.ModelProto, reasons: Mapping[str, Reason] | None = None, session: Sequence[tuple[str, str]] = ()
) -> Coverage:
    """Load `model` into ONNX Runtime and count MACs by kernel. `reasons` (by fx node, see `stated_reasons`, or by node)
    explains float nodes, `session` are entries of its session options (`Target.session`)."""
    macs = dict(node_macs(model))
    optimized = optimized_graph(model, session=session)
    origins = {n.name: p.value for n in model.graph.node for p in n.metadata_props if p.key == "fxpress.node"}
    total, integer, islands = sum(macs.values()), 0, []
    found: dict[str, onnx.NodeProto] = {}
    for node in optimized.node:
        name = _origin(node.name, macs)
        if name is not None and (name == node.name or name not in found):
            found[name] = node
    for name, count in macs.items():
        node = found.get(name)
        op = node.op_type if node is not None else "fused away"
        if op in INTEGER_OPS:
            integer += count
        else:
            stated = (reasons or {}).get(origins.get(name, name)) or (reasons or {}).get(name)
            islands.append(_island(name, op, count, node, optimized, stated))
    kernels: dict[str, int] = {}
    for node in optimized.node:
        kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
    islands.sort(key=lambda i: -i.macs)
    return Coverage(integer / total if total else 1.0, total, islands, dict(sorted(kernels.items())))


def float_reasons(program: Program, target: Target) -> dict[str, str]:
    """Layer name -> why the target's table leaves it in float, for every node that it does not compute on integers."""
    reasons: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            row = target.row_for(node)
            if row is None or row.kind == "float":
                reasons.setdefault(layer_name(node), target.why_float(node))
    return reasons


def optimized_graph(
    model: onnx.ModelProto, level: str = "ORT_ENABLE_EXTENDED", session: Sequence[tuple[str, str]] = ()
) -> onnx.GraphProto:
    """The graph that ONNX Runtime's CPU provider makes of a model at an optimization level, with session entries."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, value in session:
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path).graph


def node_macs(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """(node name, MACs at batch 1) of every convolution, matrix product and recurrent layer; those by zeros, which only
    the written file has, do not count."""
    shapes = _shapes(model)
    for node in model.graph.node:
        share = next((float(p.value) for p in node.metadata_props if p.key == SHARE), 1.0)
        count = round(_macs(node, shapes) * share)
        if count:
            yield node.name, count


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type not in _COUNTED:
        return 0
    if len(node.input) < 2:
        return 0
    first, second, out = (shapes.get(n, ()) for n in (node.input[0], node.input[1], node.output[0]))
    if not first or not second or not (out or node.op_type in _RECURRENT):
        return 0
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Einsum":
        return _einsum_macs(node, first, second)
    if node.op_type in _RECURRENT:  # input [steps, batch, in]; both weight matrices at each step
        return math.prod(first[:-1]) * (math.prod(second) + math.prod(shapes.get(node.input[2], ())))
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(out) * (first[-2] if transposed else first[-1])


def _einsum_macs(node: onnx.NodeProto, first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The size of the joint index space of two operands."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        return 0
    return math.prod({**dict(zip(terms[0], first)), **dict(zip(terms[1], second))}.values())


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors at batch 1. Large weights are left out of the copy on which shapes are inferred."""
    small = without_weights(model)
    for value in small.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.WhichOneof("value") != "dim_value":
                dim.dim_value = 1
    del small.graph.output[:]
    small.graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in model.graph.output)
    inferred = onnx.shape_inference.infer_shapes(small, data_prop=True).graph
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        shapes.setdefault(value.name, tuple(d.dim_value for d in dims))
    return shapes


def _origin(name: str, macs: Mapping[str, int]) -> str | None:
    """The node of ours that an optimized node does the work of; fusions append to names ("proj/MatMulScaleFusion/")."""
    while name not in macs and "/" in name:
        name = name.rpartition("/")[0]
    return name if name in macs else None


def _island(
    name: str, op: str, macs: int, node: onnx.NodeProto | None, graph: onnx.GraphProto, stated: Reason | None
) -> Island:
    if stated is not None:
        return Island(name, op, macs, *stated)
    dequantized = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    weights = dequantized & set(node.input) if node else set()
    if weights:
        return Island(
            name, op, macs, "quantized in the model, but the runtime dequantizes it and computes in float",
            "please report this with the model: the target's table misses a condition",
        )
    return Island(name, op, macs, "its weights or inputs are not quantized", "see the notes of the quantize stage")
