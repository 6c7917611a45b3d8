"""How a compiled model is judged: does ONNX Runtime compute what the program does, and what did quantization cost?"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import torch
from torch import fx

from ..backends.coverage import Coverage, measure_coverage
from ..frontend.batch_dim import count_examples
from ..frontend.batches import Batches
from ..frontend.cost import count_macs, op_name
from ..frontend.program import Program, module_path
from ..frontend.sqnr import Sqnr
from ..passes.quantize.reasons import stated_reasons
from ..passes.quantize.spec import Target
from ..runtime import layers
from ..runtime.dynamic_layers import check_dynamic, dynamic_nodes
from ..runtime.feed import example_tensors, examples, leaves, take
from ..runtime.layers import LayerParity, LayerRow
from ..runtime.report.build import Promise
from ..runtime.session import Session
from ..runtime.verify import Parity
from .placing import without_vnni
from .settings import Compiled, Settings

# How much is judged on. A large network has so many values in each example that a few examples say as much.
_JUDGED_EXAMPLES, _LEAST_JUDGED, _JUDGED_MACS = 8, 4, 16e9
# One example, and more of them than the example inputs have, tell whether the batch is free.
_BATCHES, _FEWER, _PARITY_MACS = (1, 2, 5), (1, 3), 16e9
_LAYER_MACS = 6e9  # for each layer on its own


def parity_batches(program: Program) -> tuple[int, ...]:
    """The batch sizes at which PyTorch and ONNX Runtime are compared."""
    return _BATCHES if count_macs(program) * sum(_BATCHES) < _PARITY_MACS else _FEWER


def judged_inputs(program: Program, batches: Batches | None) -> tuple[torch.Tensor, ...]:
    """A few real examples to judge on; the example inputs where no data are given."""
    if batches is not None:
        few = int(_JUDGED_MACS / max(count_macs(program), 1))
        return batches.first(min(max(few, _LEAST_JUDGED), _JUDGED_EXAMPLES))
    return example_tensors(program)


def judge_layers(compiled: Compiled, real: tuple[torch.Tensor, ...]) -> tuple[LayerParity | None, list[LayerRow]]:
    """Each quantized layer on its own, and the table of layers; nothing where nothing is quantized."""
    if compiled.floating is None:
        return (check_dynamic(compiled.final, real) if dynamic_nodes(compiled.final) else None), []
    few = layer_inputs(compiled.floating, real)
    parity, rows = layers.judge_layers(compiled.floating, compiled.final, few)
    return parity, named_by_module(rows, compiled.floating)


def layer_inputs(program: Program, real: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The examples to judge layers on: the larger a network is, the more values each of them has to compare."""
    count = max(1, int(_LAYER_MACS / max(count_macs(program), 1)))
    return take(program, real, min(count, count_examples(program.inputs, real)))


def named_by_module(rows: list[LayerRow], program: Program) -> list[LayerRow]:
    """Rows by the names of the user's modules ("layer1.0.conv1"); the node's name is added where several share one."""
    nodes = {n.name: n for n in program.graph.nodes}
    modules = [module_path(_computing(nodes[r.name], r.op)) if r.name in nodes else "" for r in rows]
    return [
        dataclasses.replace(
            row, name=path if path and modules.count(path) == 1 else "/".join(filter(None, (path, row.name)))
        )
        for row, path in zip(rows, modules)
    ]


def _computing(node: fx.Node, op: str) -> fx.Node:
    """The node that does the work of a row: the row ends in an activation that the op before it absorbed."""
    if op_name(node) == f"aten.{op}":
        return node
    return next((n for n in node.all_input_nodes if op_name(n) == f"aten.{op}"), node)


def judge_coverage(model: onnx.ModelProto, compiled: Compiled, settings: Settings) -> Coverage:
    """Integer coverage, each float island with the reason that the target's table or the pipeline gives."""
    if compiled.floating is not None:
        reasons = stated_reasons(compiled.final)
        return measure_coverage(model, reasons, settings.target.session)
    coverage = measure_coverage(model)
    if coverage.integer_macs:  # quantized as it runs
        return coverage
    reason, hint = "the pipeline does not quantize", "use the recipe int8, or add quantize to the pipeline"
    islands = [dataclasses.replace(i, reason=reason, hint=hint) for i in coverage.islands]
    return dataclasses.replace(coverage, islands=islands)


def output_sqnr(reference: Program, session: Session, real: tuple[torch.Tensor, ...]) -> float | None:
    """SQNR in dB of the compiled model's outputs in ONNX Runtime against float in PyTorch; capped at +-200."""
    if not any(o.dtype.startswith("float") for o in reference.outputs):
        return None
    found = Sqnr()
    for example in examples(reference, real):
        actual = session.run(*(x.numpy() for x in example))
        for e, a in zip(reference.run_flat(leaves(reference, example)), actual):
            if e.is_floating_point():
                found.add(e, np.array(a))
    return found.decibel


def reference_promise(parity: Parity) -> Promise:
    """The float file computes what the user's model computes in PyTorch: every comparison rests on it."""
    detail = f"the float model in ONNX Runtime is within {parity.max_relative:.1e} relative of PyTorch"
    return Promise("reference", parity.kept, detail)


def parity_promise(parity: Parity, layers: LayerParity | None, target: Target) -> Promise:
    """ONNX Runtime computes what the Program computes. `layers` None: nothing is quantized."""
    sizes = ", ".join(map(str, parity.batches))
    if layers is None:
        kept = parity.kept
        return Promise(
            "parity", kept, f"PyTorch and ONNX Runtime differ by {parity.max_relative:.1e} relative (batches {sizes})"
        )
    detail = (
        f"each layer, fed the same inputs, differs by at most {layers.max_steps:g} quantization step(s) between "
        f"PyTorch and ONNX Runtime; run at batches {sizes}"
    )
    if layers.output_relative > layers.bound:
        detail += f"; float outputs differ by {layers.output_relative:.1e} of the largest, allowed is {layers.bound:g}"
    if note := without_vnni(target):
        detail += f"; {note}"
    return Promise("parity", layers.kept, detail)
