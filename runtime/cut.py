"""A quantized program cut at every quantized activation, so that each layer can be judged on its own.

The cut program takes, beside the program's inputs, one integer tensor for every activation `quantize` node; each layer
reads those instead of what the layer before it computed, so no difference accumulates. Its outputs are all those
`quantize` nodes, then the program's own outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import VerificationError
from ..frontend.operators import declare_operators
from ..frontend.program import Program, describe_tensors, dtype_name, get_attribute
from ..frontend.simulate import Simulator


@dataclass(frozen=True)
class Site:
    """A quantized activation: its `quantize` node, and the float node whose value it holds (meta "layer")."""

    node: fx.Node
    scale: float
    zero_point: int
    dtype: torch.dtype

    @property
    def layer(self) -> str:
        custom = self.node.meta.get("custom") or {}
        return str(custom.get("layer", self.node.name))

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest real number that it can hold."""
        info = torch.iinfo(self.dtype)
        return (info.min - self.zero_point) * self.scale, (info.max - self.zero_point) * self.scale


@dataclass(frozen=True)
class Cut:
    """The cut program, and its sites in the order of the extra inputs and of the first outputs."""

    program: Program
    sites: tuple[Site, ...]


def quantized_sites(program: Program) -> tuple[Site, ...]:
    """All activation `quantize` nodes, in order. Raises `VerificationError` for one without constant parameters."""
    declare_operators()
    target = torch.ops.fxpress.quantize.default
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is target]
    return tuple(_site(n) for n in nodes if not (isinstance(n.args[0], fx.Node) and n.args[0].op == "get_attr"))


def _site(node: fx.Node) -> Site:
    names = ("x", "scale", "zero_point", "dtype")
    given: dict[str, Any] = {**dict(zip(names, node.args)), **node.kwargs}
    if any(isinstance(given[n], fx.Node) for n in names[1:]):
        raise VerificationError(f"{node.name} has no constant scale", hint="fold the program before it is verified")
    return Site(node, float(given["scale"]), int(given["zero_point"]), given["dtype"])


def cut_program(program: Program) -> Cut:
    """Cut at every site. The weights are shared with `program`, not copied."""
    sites = quantized_sites(program)
    graph = fx.Graph()
    placeholders = program.tensor_placeholders()
    new: dict[fx.Node, fx.Node] = {p: _placeholder(graph, p.name, p.meta["val"]) for p in placeholders}
    fed = {s.node: _placeholder(graph, f"{s.node.name}_in", s.node.meta["val"]) for s in sites}
    computed: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copied = graph.node_copy(node, new.__getitem__)
        new[node] = copied
        if node in fed:
            computed.append(copied)
            new[node] = fed[node]
    results = [new[n] for n in program.output_nodes()]
    graph.output((*computed, *results))
    module = fx.GraphModule(program.graph_module, graph)
    return Cut(_as_program(program, module, sites), sites)


def _placeholder(graph: fx.Graph, name: str, form: Any) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = form
    return node


def _as_program(program: Program, module: fx.GraphModule, sites: tuple[Site, ...]) -> Program:
    symbols = program.symbols
    nodes = [s.node for s in sites]
    extra_inputs = describe_tensors(nodes, [f"{n.name}_in" for n in nodes], symbols)
    extra_outputs = describe_tensors(nodes, [f"{n.name}_out" for n in nodes], symbols)
    return Program(module, (), (*program.inputs, *extra_inputs), (*extra_outputs, *program.outputs))


def watch(program: Program, leaves: list[Any], names: set[str]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(values of the named nodes, flat tensor outputs) on flat inputs, non-tensor leaves included."""
    watcher = Simulator(program.graph_module, [n for n in program.graph.nodes if n.name in names])
    with torch.no_grad():
        result = watcher.run(*leaves, enable_io_processing=False)
    return watcher.values, [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def weight_bytes(site: Site, program: Program) -> int:
    """Bytes of the parameters of the layer that ends in `site`: what is read between the sites before it and itself."""
    declare_operators()
    seen: set[fx.Node] = set()
    stack = list(site.node.all_input_nodes)
    total = 0
    while stack:
        node = stack.pop()
        if node in seen or (node.op == "call_function" and node.target is torch.ops.fxpress.quantize.default):
            continue
        seen.add(node)
        if node.op == "get_attr":
            value = get_attribute(program.graph_module, str(node.target))
            total += value.nbytes if isinstance(value, torch.Tensor) else 0
        stack.extend(node.all_input_nodes)
    return total


def leading_op(site: Site) -> str:
    """The op that computes a site's value: "conv2d", "add"; dtype_name for none."""
    source = site.node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return "input"
    schema = getattr(source.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else dtype_name(site.dtype)
