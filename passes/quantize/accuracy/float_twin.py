"""The float program beside the quantized one, for passes that compare the two after folding.

Folding replaces weights but not nodes, so a layer of the quantized program has the name of its twin in the program as
it was just before (where the target's expansions are written out already). `fold` keeps that program in
`Context.results` when a later pass of the pipeline declares that it reads it; weights are shared, not copied.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import torch
from torch import fx

from ....errors import PipelineError
from ....frontend.operators import declare_operators
from ....frontend.program import Program
from ...base import Context
from ...fuse_batchnorm import LAYERS
from ...rewrite import constant, find, is_constant, is_op, replace

FLOAT_TWIN = "float twin"


def keep_float_twin(program: Program, context: Context) -> None:
    """Keep the observed program, without its observers, for later passes; nothing where none of them wants it."""
    if FLOAT_TWIN not in context.wanted:
        return
    twin = _sharing_copy(program)
    for node in find(twin, torch.ops.fxpress.observe.default):
        replace(node, node.args[0])  # type: ignore[arg-type]
    twin.graph_module.recompile()
    context.results[FLOAT_TWIN] = twin


def _sharing_copy(program: Program) -> Program:
    """A copy of the graph that holds the same weights and no observers."""
    module = program.graph_module
    tensors = [*module.parameters(), *module.buffers()]
    observers = module.meta.pop("observers", None)
    with warnings.catch_warnings():  # torch's own tree specs warn about themselves when they are copied
        warnings.simplefilter("ignore", FutureWarning)
        copied = copy.deepcopy(module, {id(t): t for t in tensors})
    if observers is not None:
        module.meta["observers"] = observers
    return Program(copied, program.example_inputs, program.inputs, program.outputs)


@dataclass(frozen=True)
class IntegerLayer:
    """A layer with integer weights and its float twin. `weight` reads the integers, `scales` belong to dim `axis`."""

    node: fx.Node
    twin: fx.Node
    weight: fx.Node
    scales: torch.Tensor
    axis: int


@dataclass
class Twins:
    """A quantized program and its float twin."""

    program: Program
    floating: Program
    names: dict[str, fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        declare_operators()
        self.names = {n.name: n for n in self.floating.graph.nodes}

    def of(self, node: fx.Node) -> fx.Node | None:
        """The node of the float program whose value `node` stands for; None where there is none."""
        if is_op(node, torch.ops.fxpress.dequantize.default):
            return self.of(node.args[0])  # type: ignore[arg-type]
        custom = node.meta.get("custom") or {}
        if is_op(node, torch.ops.fxpress.quantize.default):
            return self.names.get(str(custom.get("layer", "")))
        found = self.names.get(node.name) or self.names.get(str(custom.get("float_name", "")))
        return found if found is not None and found.target == node.target else None

    def layers(self) -> list[IntegerLayer]:
        """All layers with integer weights that have a twin, in graph order."""
        return [layer for n in find(self.program, *LAYERS) if (layer := self._layer(n)) is not None]

    def _layer(self, node: fx.Node) -> IntegerLayer | None:
        read, twin = node.args[1], self.of(node)
        if not is_op(read, torch.ops.fxpress.dequantize_channel.default) or twin is None:
            return None
        weight, scales, axis = read.args  # type: ignore[union-attr]
        if not is_constant(weight) or not is_constant(twin.args[1]):
            return None
        values = constant(self.program, scales)
        assert values is not None
        return IntegerLayer(node, twin, weight, values, int(axis))  # type: ignore[arg-type]


def make_twins(program: Program, context: Context, who: str) -> Twins:
    """The program with the float program that `fold` kept. Raises PipelineError where there is none, or another's."""
    floating = context.results.get(FLOAT_TWIN)
    if floating is None:
        raise PipelineError(
            f"pass {who!r} compares with the float program, which is not known here",
            hint=f"run it in one pipeline with the quantization: quantize,{who}",
        )
    twins = Twins(program, floating)
    if not twins.layers():
        raise PipelineError(
            f"pass {who!r} finds no integer layer with a float twin",
            hint="run it right behind quantize, with nothing between that renames layers",
        )
    return twins
