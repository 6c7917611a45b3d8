"""Dynamic quantization: int8 weights of linear and LSTM layers, their inputs quantized as they come.

Nothing is calibrated. ONNX Runtime's kernels for it (DynamicQuantizeMatMul, DynamicQuantizeLSTM) are fast where the
layers are large; convolutions have none worth using, and stay in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ...errors import QuantizationError
from ...frontend.operators import declare_operators
from ...frontend.program import Program, layer_name, set_attribute
from ..base import INTERFACE, Change, Context, Pass, register_pass
from ..rewrite import (
    argument,
    aten,
    call_before,
    constant,
    erase_dead,
    fake_like,
    find,
    is_constant,
    put_constant,
    replace,
)
from .annotate import named_nodes
from .fold import quantize_weight, weight_scales
from .masks import shield_masks
from .spec import NumberFormat, Target


@register_pass
@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Weights of linear and LSTM layers to int8, their inputs quantized by their own range at run time.

    1. `linear` and `addmm` with parameters, on inputs of any number of dims; `keep_float` names layers to leave alone.
    2. `lstm` without projections and dropout.
    3. Weights take the target's format for weights (7 bits where 8 would saturate).
    4. Masked attention is written without denormal numbers, where the target asks for it.
    """

    name = "quantize-dynamic"
    preserves = frozenset({INTERFACE})

    keep_float: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Change:
        form = _weight_format(context.target)
        declare_operators()
        kept = named_nodes(program, self.keep_float, "keep_float")
        count, reasons = 0, []
        for node in find(program, *_REWRITES):
            reason = "keep_float names it" if node in kept else _REWRITES[node.target](program, node, form)
            count += reason is None
            reasons += [f"{layer_name(node)} stays in float: {reason}"] if reason else []
        if count == 0:
            raise QuantizationError(
                "no linear or LSTM layer with constant weights is here to be quantized"
                + "".join(f"\n  {r}" for r in reasons[:5]),
                hint="use the recipe int8, which needs calibration data",
            )
        assert context.target is not None
        if context.target.shields_masks:
            shield_masks(program)
        erase_dead(program)
        return Change(count, reasons)


def _weight_format(target: Target | None) -> NumberFormat:
    if target is None:
        raise QuantizationError("quantization needs a target", hint="pass --target, for example ort-x86")
    if target.runtime != "onnxruntime":
        raise QuantizationError(
            f"dynamic quantization is written for ONNX Runtime, not for {target.name}", hint="use the recipe int8"
        )
    return target.weight


def _linear(program: Program, node: fx.Node, form: NumberFormat) -> str | None:
    """linear(x, W, b); returns why not, or None."""
    x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    return _write_linear(program, node, form, x, weight, bias, transposed=False)


def _addmm(program: Program, node: fx.Node, form: NumberFormat) -> str | None:
    """addmm(b, x, W) = x @ W + b."""
    bias, x, weight = node.args[:3]
    if (argument(node, "beta"), argument(node, "alpha")) != (1, 1):
        return "addmm with alpha or beta is no linear layer"
    return _write_linear(program, node, form, x, weight, bias, transposed=True)


def _write_linear(
    program: Program, node: fx.Node, form: NumberFormat, x: object, weight: object, bias: object, transposed: bool
) -> str | None:
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weights are computed in the graph"
    values, offsets = constant(program, weight), constant(program, bias)
    assert values is not None
    assert isinstance(weight, fx.Node)
    if values.ndim != 2 or values.dtype is not torch.float32 or (offsets is not None and offsets.ndim != 1):
        return "it is no float32 matrix with a vector"
    stored = _stored(program, node, weight, values.t() if transposed else values, form)
    new = call_before(node, torch.ops.fxpress.dynamic_linear.default, x, *stored, bias)
    replace(node, new)
    return None


def _lstm(program: Program, node: fx.Node, form: NumberFormat) -> str | None:
    """lstm(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first); why not, or None."""
    x, hx, params = node.args[:3]
    biased, layers, dropout, train, two_ways, batch_first = node.args[3:9]
    directions = 2 if two_ways else 1
    assert isinstance(params, Sequence)
    each = 4 if biased else 2
    if len(params) != layers * directions * each or (dropout and train):  # type: ignore[operator]
        return "LSTM with projections, or in training mode"
    if not all(map(is_constant, params)) or len(x.meta["val"].shape) != 3:  # type: ignore[union-attr]
        return "its weights are computed in the graph, or its input has no batch dimension"
    weights: list[fx.Node] = []
    scales: list[fx.Node] = []
    biases: list[object] = []
    for k in range(layers * directions):  # type: ignore[operator]
        own = params[k * each : (k + 1) * each]
        for source in own[:2]:
            value = constant(program, source)
            assert value is not None
            q, scale = _stored(program, node, source, value, form)
            weights.append(q)
            scales.append(scale)
        biases += own[2:]
    new = call_before(
        node, torch.ops.fxpress.dynamic_lstm.default, x, hx, weights, scales, biases, layers, two_ways, batch_first
    )
    replace(node, new)
    return None


def _stored(
    program: Program, node: fx.Node, source: fx.Node, weight: torch.Tensor, form: NumberFormat
) -> tuple[fx.Node, fx.Node]:
    """Nodes that read the integers [out, in] and their scales [out]. The integers take the name of a parameter that is
    read here alone."""
    if not torch.isfinite(weight).all():
        raise QuantizationError(
            f"the weights of {layer_name(node)} hold NaN or infinity",
            hint="check the checkpoint; training may have diverged",
        )
    scales = weight_scales(weight.detach(), form, "minmax")
    q = quantize_weight(weight.detach(), scales, form).contiguous()
    path = str(source.target)
    readers = [u for n in program.graph.nodes if n.op == "get_attr" and n.target == path for u in n.users]
    if readers == [node]:
        set_attribute(program.graph_module, path, q)
        source.meta["val"] = fake_like(node, q)
    else:
        source = put_constant(program, f"{path}_int", q, node)
    return source, put_constant(program, f"{path}_scale", scales, node)


_REWRITES = {aten.linear.default: _linear, aten.addmm.default: _addmm, aten.lstm.input: _lstm}
