"""Program -> ONNX by our own table.

Rules: (1) standard ONNX ops only, but for what a pass chose an op of a runtime for; (2) weights are initializers named
as in the state_dict and are referenced, not copied, until they are serialized; (3) what depends on no input is computed
now, except dequantized weights; (4) what nothing reads is not written; (5) an op without a row, and an argument value
that a row does not handle, is an error that names the source line.
"""

from __future__ import annotations

import operator
import os
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from ..._version import __version__
from ...errors import LoweringError, OutputError
from ...frontend.operators import NAMESPACE, declare_operators
from ...frontend.program import Program, TensorInfo, get_attribute, source_of
from ...passes.quantize.written import as_written
from .emit import Emitter, Operand, onnx_type
from .table import Row, find_row

DEFAULT_OPSET = 21
_IR_VERSION = 10
_OPSETS = range(21, 24)
# Protobuf files end at 2 GiB; the rest of the model needs a little room.
_EXTERNAL_ABOVE = 2_000_000_000
_RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "rand_like", "randn_like"}
)


def lower(program: Program, opset: int = DEFAULT_OPSET) -> onnx.ModelProto:
    """The program as an ONNX model.

    Raises `LoweringError` for an op or argument that has no lowering, a program in training mode or an unknown opset.
    """
    return ir.to_proto(build(program, opset))


def write(program: Program, path: str | Path, opset: int = DEFAULT_OPSET) -> None:
    """Lower to a file, written whole or not at all; weights above 2 GB go to `<name>.data` beside it."""
    path = Path(path)
    model = build(program, opset)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".onnx", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="choose a folder that you may write to"
        ) from error
    try:
        ir.save(model, temporary, external_data=f"{path.name}.data" if size > _EXTERNAL_ABOVE else None)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def build(program: Program, opset: int = DEFAULT_OPSET) -> ir.Model:
    """The program as an onnx-ir model that refers to the program's own weights."""
    if opset not in _OPSETS:
        raise LoweringError(f"opset {opset} is not supported", hint=f"use {_OPSETS[0]} to {_OPSETS[-1]}")
    if program.training:
        raise LoweringError("the program is in training mode", hint="call program.eval() first")
    declare_operators()
    return _Lowering(as_written(program), opset).model()


class _Lowering:
    """One run of the table over one graph."""

    def __init__(self, program: Program, opset: int) -> None:
        self.program = program
        self.g = Emitter(opset)
        self.values: dict[fx.Node, Any] = {}
        self.contents: dict[fx.Node, Any] = {}
        self.inputs: list[ir.Value] = []

    def model(self) -> ir.Model:
        self._declare_inputs()
        for node in self.program.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                self._lower(node)
            elif node.op not in ("placeholder", "output"):
                raise LoweringError(
                    f"graph node {node.name} is a {node.op}", hint="capture the model with fxpress.capture"
                )
        outputs = self._declare_outputs()
        nodes, initializers = reachable(self.g, outputs)
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=nodes,
            initializers=initializers,
            opset_imports={"": self.g.opset, **{n.domain: 1 for n in nodes if n.domain}},
            name=str(self.program.graph_module.meta.get("fxpress_model", "program")),
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="fxpress", producer_version=__version__)

    # -- the interface ------------------------------------------------------------------------------------------

    def _declare_inputs(self) -> None:
        placeholders = self.program.tensor_placeholders()
        # Interface names come first, so that nothing else can take them.
        names = [self.g.unique(i.name) for i in self.program.inputs]
        self.output_names = [self.g.unique(o.name) for o in self.program.outputs]
        for node, info, name in zip(placeholders, self.program.inputs, names):
            form = node.meta["val"]
            value = ir.Value(name=name, shape=_dims(info), type=ir.TensorType(onnx_type(form.dtype)))
            self.inputs.append(value)
            self.values[node] = Operand(value, form)
            for axis, size in enumerate(form.shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self.g.symbols.setdefault(str(size), (value, axis))

    def _declare_outputs(self) -> list[ir.Value]:
        outputs: list[ir.Value] = []
        for node, info, name in zip(self.program.output_nodes(), self.program.outputs, self.output_names):
            value = self._operand(node).value
            if value in self.inputs or value in self.g.initializers or value in outputs:
                self.g.begin(node)
                value = self.g.op("Identity", value)
            value.name, value.shape = name, _dims(info)
            value.type = ir.TensorType(onnx_type(node.meta["val"].dtype))
            outputs.append(value)
        return outputs

    # -- nodes --------------------------------------------------------------------------------------------------

    def _lower(self, node: fx.Node) -> None:
        form = node.meta.get("val")
        if node.op == "get_attr":
            self.contents[node] = get_attribute(self.program.graph_module, str(node.target))
        elif isinstance(form, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.values[node] = form
        elif form is None:
            if node.users:
                raise _no_form(node)
        elif self._is_constant(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.contents.__getitem__)
            with torch.no_grad():
                self.contents[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.target is operator.getitem:
            self.values[node] = self._argument(node.args[0])[node.args[1]]
        else:
            self.values[node] = self._call(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Rule 3."""
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            namespace, _, name = schema.name.partition("::")
            if namespace == NAMESPACE or name in _RANDOM or schema.is_mutable:
                return False
        return all(n in self.contents for n in node.all_input_nodes)

    def _call(self, node: fx.Node) -> Any:
        self.g.begin(node)
        first = len(self.g.nodes)
        found = find_row(node.target)
        if found is None:
            raise _no_row(node)
        try:
            result = found.function(self.g, **self._bind(found, node))
        except LoweringError as error:
            error.where = error.where or source_of(node)
            raise
        form = node.meta["val"]
        if isinstance(form, (tuple, list)):
            return tuple(Operand(v, f) for v, f in zip(result, form, strict=True))
        self._name(node, result, first)
        return Operand(result, form)

    def _bind(self, found: Row, node: fx.Node) -> dict[str, Any]:
        args = tuple(self._argument(a) for a in node.args)
        kwargs = {k: self._argument(v) for k, v in node.kwargs.items()}
        return found.bind(node.target._schema, args, kwargs)  # type: ignore[union-attr]

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value] if value in self.values else self._operand(value)
        if isinstance(value, (tuple, list)):
            return [self._argument(v) for v in value]
        return value

    def _operand(self, node: fx.Node) -> Operand:
        """The operand of a node; a constant one becomes an initializer when it is first read."""
        if node not in self.values:
            contents = self.contents[node]
            if isinstance(contents, (tuple, list)):
                self.values[node] = tuple(self._constant(node, c) for c in contents)
            else:
                self.values[node] = self._constant(node, contents)
        return self.values[node]

    def _constant(self, node: fx.Node, contents: torch.Tensor) -> Operand:
        name = str(node.target) if node.op == "get_attr" else f"folded.{node.name}"
        return Operand(self.g.initializer(name, contents), contents, contents)

    def _name(self, node: fx.Node, value: ir.Value, first: int) -> None:
        """Give the node's result the fx node's name, if this call wrote it."""
        producer = value.producer()
        if producer is not None and any(producer is n for n in self.g.nodes[first:]):
            value.name = self.g.unique(node.name)


def reachable(g: Emitter, outputs: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Rule 4: the nodes and initializers that the outputs depend on, in order."""
    needed = set(outputs)
    kept: list[ir.Node] = []
    for node in reversed(g.nodes):
        if any(o in needed for o in node.outputs):
            kept.append(node)
            needed.update(i for i in node.inputs if i is not None)
    return kept[::-1], [v for v in g.initializers if v in needed]


def _dims(info: TensorInfo) -> ir.Shape:
    return ir.Shape(list(info.dims))


def _no_form(node: fx.Node) -> LoweringError:
    return LoweringError(
        f"node {node.name} has no shape and dtype (meta['val'])",
        where=source_of(node),
        hint="run the pass that made it under PassManager, which refreshes them",
    )


def _no_row(node: fx.Node) -> LoweringError:
    name = str(node.target)
    return LoweringError(
        f"no lowering to ONNX for {name} (node {node.name})",
        where=source_of(node),
        hint=f'replace the operation in the model, or add a row: a function under @row("{name}") in '
        "backends/onnx/ops_*.py",
    )
