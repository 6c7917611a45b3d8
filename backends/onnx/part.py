"""Parts of an ONNX model as models of their own, to be timed or looked at alone.

A part is given by some of the model's nodes. What it reads from the others becomes its inputs; constants, and what is
computed from constants alone (dequantized weights), travel with it. An activation that is dequantized for it is
dequantized within it: the part reads the integers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from functools import cached_property

import numpy as np
import onnx
from onnx import TensorProto

SHARE = "fxpress.work"  # the metadata of an ONNX node of whose multiply-adds the model has only so many
NODE = "fxpress.node"  # the metadata of an ONNX node that names the node of the program
_SMALL = 128  # bytes: shapes and axes
_FEW = 4  # float numbers: factors of a Resize, an exponent, the bounds of a Clip
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_LARGE = 4096  # bytes: initializers above are not needed to infer shapes


def node_of(node: onnx.NodeProto) -> str:
    """The name of the program's node that an ONNX node was written for; "" for none."""
    return next((p.value for p in node.metadata_props if p.key == NODE), "")


class Parts:
    """Cuts parts out of `model`, whose shapes must be fixed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {t.name: t for t in model.graph.initializer}
        self.producer = {o: n for n in self.nodes for o in n.output if o}
        self._fixed = self._constant_values()

    @cached_property
    def forms(self) -> dict[str, onnx.ValueInfoProto]:
        """Type and shape of every value that could be inferred."""
        inferred = onnx.shape_inference.infer_shapes(without_weights(self.model), data_prop=True).graph
        return {v.name: v for v in (*inferred.input, *inferred.value_info, *inferred.output)}

    def part(self, chosen: Iterable[onnx.NodeProto]) -> onnx.ModelProto | None:
        """The part that consists of `chosen`; None if it computes nothing, or the shape of an input is not known."""
        wanted = {id(n): n for n in chosen if not self._dequantizes_activation(n)}
        inner = {o for n in wanted.values() for o in n.output}
        for node in list(wanted.values()):
            for name in node.input:
                self._take_along(name, inner, wanted)
        nodes = [n for n in self.nodes if id(n) in wanted]
        made = {o for n in nodes for o in n.output}
        read = dict.fromkeys(i for n in nodes for i in n.input if i and i not in made and i not in self.constants)
        results = self._results(nodes, inner)
        if not results or not all(self._known(name) for name in (*read, *results)):
            return None
        return self._model(nodes, list(read), results)

    def _take_along(self, name: str, inner: set[str], wanted: dict[int, onnx.NodeProto]) -> None:
        """Let what makes `name` of constants, or dequantizes it, travel with the part."""
        node = self.producer.get(name)
        if node is None or name in inner or id(node) in wanted:
            return
        if name in self._fixed or self._dequantizes_activation(node):
            wanted[id(node)] = node
            for more in node.input if name in self._fixed else ():
                self._take_along(more, inner, wanted)

    def _results(self, nodes: list[onnx.NodeProto], inner: set[str]) -> list[str]:
        """What the rest of the model reads of the part."""
        own = {id(n) for n in nodes}
        read = {i for n in self.nodes if id(n) not in own for i in n.input}
        read |= {o.name for o in self.model.graph.output}
        return [o for n in nodes for o in n.output if o in inner and o in read and o not in self._fixed]

    def _model(self, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        used = {i for n in nodes for i in n.input}
        graph = onnx.GraphProto(name="part")
        graph.node.extend(nodes)
        graph.input.extend(self.forms[i] for i in inputs)
        graph.output.extend(self.forms[o] for o in outputs)
        graph.initializer.extend(t for name, t in self.constants.items() if name in used)
        return onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import, graph=graph)

    def _known(self, name: str) -> bool:
        form = self.forms.get(name)
        if form is None or not form.type.tensor_type.HasField("shape"):
            return False
        return all(d.HasField("dim_value") for d in form.type.tensor_type.shape.dim)

    def _dequantizes_activation(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "DequantizeLinear" and node.input[0] not in self._fixed

    def _constant_values(self) -> set[str]:
        fixed = set(self.constants)
        for node in self.nodes:
            if all(i in fixed for i in node.input if i):
                fixed.update(node.output)
        return fixed


def signature(model: onnx.ModelProto) -> str:
    """A text that is equal for models which the runtime computes alike: ops, attributes, shapes, small constants, but
    neither names nor weights nor scales."""
    numbers: dict[str, int] = {}
    scales = {n.input[1] for n in model.graph.node if n.op_type in CONVERSIONS}
    lines = [f"{list(_dims(v))}:{v.type.tensor_type.elem_type}" for v in model.graph.input]
    for value in model.graph.input:
        numbers[value.name] = len(numbers)
    for tensor in sorted(model.graph.initializer, key=lambda t: _first_use(model, t.name)):
        numbers[tensor.name] = len(numbers)
        lines.append(f"{list(tensor.dims)}:{tensor.data_type}:{'' if tensor.name in scales else _content(tensor)}")
    for node in model.graph.node:
        reads = [numbers.get(i, -1) for i in node.input]
        attributes = sorted(onnx.helper.printable_attribute(a) for a in node.attribute)
        lines.append(f"{node.domain}.{node.op_type}{reads}{attributes}")
        for name in node.output:
            numbers[name] = len(numbers)
    lines.append(str([(numbers[o.name], list(_dims(o))) for o in model.graph.output]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _first_use(model: onnx.ModelProto, name: str) -> tuple[int, int]:
    places = ((i, list(n.input).index(name)) for i, n in enumerate(model.graph.node) if name in n.input)
    return next(places, (-1, -1))


def _content(tensor: TensorProto) -> str:
    """Shapes, axes, factors and exponents, and which zero points are the smallest number (a Relu before one vanishes);
    weights have no part in the choice of a kernel."""
    shape = tensor.data_type == TensorProto.INT64 and tensor.ByteSize() <= _SMALL
    factor = tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) <= _FEW
    if shape or factor:
        return str(onnx.numpy_helper.to_array(tensor).ravel().tolist())
    if tensor.data_type in (TensorProto.UINT8, TensorProto.INT8) and not tensor.dims:
        value = onnx.numpy_helper.to_array(tensor)
        return "lowest" if value == np.iinfo(value.dtype).min else "zero" if value == 0 else "inner"
    return ""


def _dims(value: onnx.ValueInfoProto) -> Collection[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with large initializers as inputs: shapes can be inferred without copying them."""
    small = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    small.graph.name = "shapes"
    small.graph.node.extend(model.graph.node)
    small.graph.input.extend(model.graph.input)
    small.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.ByteSize() > _LARGE:
            form = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            small.graph.input.append(form)
        else:
            small.graph.initializer.append(tensor)
    return small
