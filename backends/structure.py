"""Is an ONNX file in the form that a target asks for? Read from the file alone, for runtimes that are not here.

The rules, as far as the target's table states them:
1. Activations are quantized to the types of the table, with zero point 0 where they are symmetric.
2. Weights are stored in the type and the limits of the table, with zero point 0, per channel where it says so.
3. A layer that reads stored weights reads a dequantized activation.
4. Its bias is int32 at scale input x weight; or float, where the table has no format for biases.
5. Where moves are written in pairs, every quantize is read by dequantize nodes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from ..frontend.program import dtype_name
from ..passes.quantize.reasons import Reason
from ..passes.quantize.spec import Target
from .coverage import Coverage, Island, node_macs

_LAYERS = ("Conv", "Gemm", "MatMul", "ConvTranspose")


@dataclass(frozen=True)
class _File:
    """An ONNX graph with what the rules look up."""

    nodes: list[onnx.NodeProto]
    made_by: dict[str, onnx.NodeProto]
    constants: dict[str, np.ndarray]

    def source(self, name: str) -> onnx.NodeProto | None:
        return self.made_by.get(name)

    def stored(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear behind a value, if it reads a constant."""
        node = self.source(name)
        return node if node is not None and self.is_dequantized(name) and node.input[0] in self.constants else None

    def is_dequantized(self, name: str) -> bool:
        node = self.source(name)
        return node is not None and node.op_type == "DequantizeLinear"


def check_structure(model: onnx.ModelProto, target: Target) -> list[str]:
    """What in the file breaks a rule, for people; empty where nothing does."""
    file = _read(model)
    return [*_activations(file, target), *_layers(file, target), *_pairs(file, target)]


def _read(model: onnx.ModelProto) -> _File:
    graph = model.graph
    return _File(
        list(graph.node),
        {o: n for n in graph.node for o in n.output},
        {t.name: numpy_helper.to_array(t) for t in graph.initializer},
    )


def _activations(file: _File, target: Target) -> Iterator[str]:
    """Rule 1."""
    forms = {dtype_name(f.dtype): f for f in target.activation_formats}
    for node in file.nodes:
        if node.op_type != "QuantizeLinear":
            continue
        zero = file.constants[node.input[2]]
        if str(zero.dtype) not in forms:
            yield f"{node.name} quantizes to {zero.dtype}; {target.name} takes {', '.join(forms)}"
        elif forms[str(zero.dtype)].symmetric and zero.any():
            yield f"{node.name} has the zero point {int(zero)}; {target.name} is symmetric"


def _layers(file: _File, target: Target) -> Iterator[str]:
    """Rules 2 to 4."""
    for node in file.nodes:
        weight = file.stored(node.input[1]) if node.op_type in _LAYERS else None
        if weight is None:
            continue
        yield from _weights(file, node.name, weight, target)
        activation = file.source(node.input[0])
        if activation is None or not file.is_dequantized(node.input[0]):
            yield f"{node.name} multiplies stored weights with an activation that is not quantized"
        elif len(node.input) > 2 and node.input[2]:
            yield from _bias(file, node, file.constants[activation.input[1]], weight, target)


def _weights(file: _File, name: str, weight: onnx.NodeProto, target: Target) -> Iterator[str]:
    values, scale, zero = (file.constants[i] for i in weight.input)
    form = target.weight
    low, high = form.limits
    if str(values.dtype) != dtype_name(form.dtype) or values.min(initial=0) < low or values.max(initial=0) > high:
        yield f"the weights of {name} are {values.dtype} in [{values.min()}, {values.max()}]; {target.name}: {form}"
    if zero.any():
        yield f"the weights of {name} have a zero point"
    if not form.per_channel and scale.size > 1 and len(set(scale.flatten().tolist())) > 1:
        yield f"the weights of {name} have a scale per channel"


def _bias(
    file: _File, node: onnx.NodeProto, x_scale: np.ndarray, weight: onnx.NodeProto, target: Target
) -> Iterator[str]:
    bias = file.stored(node.input[2])
    if target.bias is None:
        if bias is not None:
            yield f"the bias of {node.name} is quantized; {target.name} wants it in float"
        return
    if bias is None or str(file.constants[bias.input[0]].dtype) != dtype_name(target.bias.dtype):
        yield f"the bias of {node.name} is not {target.bias}"
    elif not np.allclose(file.constants[bias.input[1]], x_scale * file.constants[weight.input[1]], rtol=1e-6):
        yield f"the scale of the bias of {node.name} is not that of input times weight"


def _pairs(file: _File, target: Target) -> Iterator[str]:
    """Rule 5."""
    if not all(r.in_pairs for r in target.rows if r.kind == "move"):
        return
    quantized = {o for n in file.nodes if n.op_type == "QuantizeLinear" for o in n.output}
    for node in file.nodes:
        if node.op_type != "DequantizeLinear" and not quantized.isdisjoint(node.input):
            yield f"{node.name} ({node.op_type}) reads integers; {target.name} wants quantize and dequantize in pairs"


def stored_coverage(model: onnx.ModelProto, reasons: Mapping[str, Reason] | None = None) -> Coverage:
    """The MACs of layers that read dequantized operands, as the file says; nothing is run. `reasons` (by fx node, see
    `stated_reasons`) explains the others."""
    file = _read(model)
    macs = dict(node_macs(model))
    floats = [n for n in file.nodes if n.name in macs and not all(file.is_dequantized(i) for i in n.input[:2])]
    islands = [Island(n.name, n.op_type, macs[n.name], *(reasons or {}).get(_origin(n), _UNSTATED)) for n in floats]
    total = sum(macs.values())
    integer = total - sum(i.macs for i in islands)
    return Coverage(integer / total if total else 1.0, total, sorted(islands, key=lambda i: -i.macs))


def _origin(node: onnx.NodeProto) -> str:
    """The fx node that an ONNX node was written for."""
    return next((p.value for p in node.metadata_props if p.key == "fxpress.node"), node.name)


_UNSTATED = ("it is written in float", "a target whose table has a row for it")
