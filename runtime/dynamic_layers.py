"""Layers that are quantized as they run, each on its own: ONNX Runtime and PyTorch, fed the same float inputs.

End to end the last bit of a value decides, now and then, between two of 255 steps, and in a deep network such
decisions spread. Layer by layer nothing spreads, so that is where the two are held against one another.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from torch import fx

from ..backends.onnx.lower import lower
from ..frontend.program import Program, describe_tensors, layer_name
from .cut import watch
from .feed import examples, leaves
from .layers import LayerParity, LayerSteps
from .session import Runnable, make_session
from .verify import DYNAMIC_BOUND, differences, is_dynamic, relative

_STEPS = 255
_EQUAL = 1e-5  # of the largest value: what the order of float32 sums may do


def dynamic_nodes(program: Program) -> list[fx.Node]:
    """The layers that quantize their input as they run, in order."""
    return [n for n in program.graph.nodes if is_dynamic(n)]


def check_dynamic(
    program: Program, inputs: Sequence[torch.Tensor], load: Callable[[onnx.ModelProto], Runnable] = make_session
) -> LayerParity:
    """Feed each dynamic layer in ONNX Runtime what it read in PyTorch, and compare.

    A step is 1/255 of the range of the layer's output. `inputs` are the flat input tensors of one batch.
    """
    nodes = dynamic_nodes(program)
    session = load(lower(_cut(program, nodes)))
    most, equal, count, worst = [0.0] * len(nodes), [0] * len(nodes), [0] * len(nodes), 0.0
    read = {_source(n).name for n in nodes} | {n.name for n in nodes}
    for example in examples(program, inputs):
        values, outputs = watch(program, leaves(program, example), read)
        fed = [_numpy(values[_source(n).name]) for n in nodes]
        results = session.run(*map(_numpy, example), *fed)
        for i, node in enumerate(nodes):
            theirs = _numpy(_first(values[node.name]))
            apart, largest = np.abs(results[i] - theirs), float(np.abs(theirs).max(initial=0))
            step = max(float(np.ptp(theirs)) / _STEPS, 1e-30) if theirs.size else 1.0
            most[i] = max(most[i], float(apart.max(initial=0)) / step)
            equal[i] += int((apart <= _EQUAL * largest).sum())
            count[i] += apart.size
        floats = [(a, _numpy(b)) for a, b in zip(results[len(nodes) :], outputs) if b.is_floating_point()]
        worst = max([worst, *(relative(*differences(a, b.reshape(a.shape))) for a, b in floats)])
    layers = tuple(
        LayerSteps(layer_name(n), round(m), e / max(c, 1)) for n, m, e, c in zip(nodes, most, equal, count)
    )
    return LayerParity(layers, max(map(round, most)), sum(equal) / max(sum(count), 1), worst, DYNAMIC_BOUND)


def _cut(program: Program, nodes: list[fx.Node]) -> Program:
    """The program in which each of `nodes` reads an extra input; their results come before the program's outputs."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for source in program.tensor_placeholders():
        new[source] = _placeholder(graph, source.name, source)
    fed = {n: _placeholder(graph, f"{n.name}_in", _source(n)) for n in nodes}
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            new[node] = graph.node_copy(node, new.__getitem__)
            if node in fed:
                new[node].replace_input_with(new[_source(node)], fed[node])
    firsts = [new[n] if isinstance(n.meta["val"], torch.Tensor) else _part(graph, new[n]) for n in nodes]
    graph.output((*firsts, *(new[n] for n in program.output_nodes())))
    symbols = program.symbols
    extra = describe_tensors([_source(n) for n in nodes], [f"{n.name}_in" for n in nodes], symbols)
    results = describe_tensors(firsts, [f"{n.name}_out" for n in nodes], symbols)
    module = fx.GraphModule(program.graph_module, graph)
    return Program(module, (), (*program.inputs, *extra), (*results, *program.outputs))


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _placeholder(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = like.meta["val"]
    return node


def _part(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The first of several results."""
    part = graph.call_function(operator.getitem, (node, 0))
    part.meta["val"] = node.meta["val"][0]
    return part


def _first(value: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
