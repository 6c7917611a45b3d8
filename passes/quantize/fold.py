"""Turn an observed program into a quantized one: weights to int8, biases to int32, quantize/dequantize on activations.

The result is a faithful simulation that still runs in PyTorch: every integer layer reads dequantized integers, and its
result is quantized. When the program runs, these patterns are computed as the kernels do it (frontend/simulate.py).

    w_q = round(w / s_w)  in [-127, 127], s_w per output channel        b_q = round(b / (s_x * s_w))  in int32
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as replace_field

import torch
from torch import fx

from ...errors import QuantizationError
from ...frontend.program import Program, layer_name, set_attribute, source_of
from ..rewrite import (
    argument,
    aten,
    call_before,
    constant,
    erase_dead,
    fake_like,
    find,
    put_constant,
    replace,
    set_argument,
)
from .annotate import ABSORBED, annotation, clear_annotations, operands_of, upper_bound
from .columns import stems_for_columns
from .observe import Site, Sites, sites_of
from .ranges.squared_error import best_bounds
from .spec import MOVING, NumberFormat, QuantParams, Target, as_float32, choose_params
from .stem import blocks_for_stems
from .wide_depthwise import depthwise_to_widen
from .written import CHANNELS, COLUMNS, PRODUCT, layers_on_tokens, mark

LEARNED_SCALES = "quantize_weight_scales"  # in a layer's meta: scales to fold with, one per output channel
_BIAS_LIMIT = 2.0**30  # half of int32, so that adding the products to the bias cannot overflow


@dataclass
class _Folding:
    """What the steps share: the program, the target, and the parameters of each observed tensor by observe node."""

    program: Program
    target: Target
    weight_ranges: str
    params: dict[fx.Node, QuantParams]


def fold_program(program: Program, target: Target, weight_ranges: str) -> int:
    """Fold all observers and weights. Returns the number of integer layers."""
    sites = sites_of(program)
    if not sites.samples:
        raise QuantizationError("the observers have seen no data", hint="run the pass `calibrate` before `fold`")
    observes = list(find(program, torch.ops.fxpress.observe.default))
    params = {n: params_of(sites, int(n.args[1]), target) for n in observes}  # type: ignore[arg-type]
    folding = _Folding(program, target, weight_ranges, params)
    layers = 0
    for node in list(program.graph.nodes):
        note = annotation(node)
        if note is not None and note.row.kind == "layer":
            _fold_layer(folding, node)
            layers += 1
        elif node.meta.get(ABSORBED):
            _drop_absorbed(folding, node)
    for node in observes:
        _fold_observer(folding, node, on_integers=_is_move(node.args[0]))
    _check_integers(program)
    _keep_apart(program, target)
    clear_annotations(program)
    if target.stem_blocks:
        blocks_for_stems(program)
    if target.stem_columns > 1:
        for stem in stems_for_columns(program, target.stem_columns):
            mark(stem, COLUMNS, target.stem_columns)
    for layer, channels in depthwise_to_widen(program, target.depthwise_multiple).items():
        mark(layer, CHANNELS, channels)
    if target.products_of_tokens:
        for layer in layers_on_tokens(program):
            mark(layer, PRODUCT, 1)
    del program.graph_module.meta["observers"]
    erase_dead(program)
    program.graph_module.recompile()
    return layers


# -- activations ---------------------------------------------------------------------------------------------------


def params_of(sites: Sites, key: int, target: Target) -> QuantParams:
    """The parameters of the root of `key`, its scale multiplied on the way."""
    root, factor = sites.root(key), sites.factor(key)
    params = _site_params(root, root.form or target.activation)
    return params if factor == 1 else replace_field(params, scale=as_float32(params.scale * factor))


def _site_params(site: Site, form: NumberFormat) -> QuantParams:
    if site.fixed is not None or site.tied is not None:
        return site.fixed or site.tied  # type: ignore[return-value]
    assert site.observer is not None
    try:
        params = site.observer.params(form)
    except QuantizationError as error:
        raise QuantizationError(f"{site.layer}: {error.message}", hint=error.hint) from error
    if not isinstance(params, QuantParams):
        raise QuantizationError(
            f"{site.layer}: activations with a scale per channel cannot be folded", hint="choose a scale per tensor"
        )
    if site.bound is not None and params.high > site.bound:
        params = choose_params(params.low, site.bound, form)
    return params


def _fold_observer(folding: _Folding, node: fx.Node, on_integers: bool) -> None:
    """observe(x) becomes dequantize(quantize(x)); behind a move, which is let work on the integers, dequantize(x)."""
    source, params = node.args[0], folding.params[node]
    assert isinstance(source, fx.Node)
    note = annotation(source)
    if on_integers:
        q = _moved_integers(source, params)
    elif note is not None and note.row.stored is not None:
        q = _stored_input(node, source, note.row.stored)
    else:
        if str(source.target) in folding.target.isolate:
            source = _apart(folding.program, node, source)
        q = call_before(node, torch.ops.fxpress.quantize.default, source, params.scale, params.zero_point, params.dtype)
    replace(node, call_before(node, torch.ops.fxpress.dequantize.default, q, params.scale, params.zero_point))


def _stored_input(node: fx.Node, source: fx.Node, stored: QuantParams) -> fx.Node:
    """What `source` reads, stored so that the integers are those of its output.

    A leaky_relu that leaks all changes nothing; between two quantized tensors it becomes a table of 256 numbers, which
    takes half the time of going through float.
    """
    line = call_before(node, aten.leaky_relu.default, source.args[0], 1.0)
    q = call_before(node, torch.ops.fxpress.quantize.default, line, stored.scale, stored.zero_point, stored.dtype)
    # The float program has no tensor of these values.
    q.meta["custom"] = {**q.meta.get("custom", {}), "layer": f"{node.meta['custom']['layer']}.input"}
    return q


def _apart(program: Program, node: fx.Node, source: fx.Node) -> fx.Node:
    """max(x, lowest float): changes nothing, and stands between an op and its quantization."""
    lowest = put_constant(program, "lowest", torch.tensor(torch.finfo(torch.float32).min), node)
    return call_before(node, aten.maximum.default, source, lowest)


def _keep_apart(program: Program, target: Target) -> None:
    """Put something in front of float ops whose row says so: a dequantization may reach them through other ops."""
    kept: dict[fx.Node, fx.Node] = {}
    for node in list(program.graph.nodes):
        row = target.row_for(node) if node.op == "call_function" and annotation(node) is None else None
        if row is None or not row.apart:
            continue
        for source in operands_of(node, row):
            if source not in kept:
                kept[source] = _apart(program, node, source)
            node.replace_input_with(source, kept[source])


def _is_move(value: object) -> bool:
    """Does `value` move integers?"""
    note = annotation(value) if isinstance(value, fx.Node) else None
    return note is not None and note.row.kind in MOVING and not note.row.in_pairs


def _check_integers(program: Program) -> None:
    """Quantized integers go to moves and to dequantize only; a float op that read them would compute nonsense."""
    integers: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target is torch.ops.fxpress.quantize.default:
            integers.add(node)
        elif not integers.isdisjoint(node.all_input_nodes) and node.target is not torch.ops.fxpress.dequantize.default:
            if not _is_move(node) and node.target is not aten.contiguous.default:
                raise QuantizationError(
                    f"{layer_name(node)} ({node.target}) reads integers as if they were real numbers",
                    where=source_of(node),
                    hint="this is a fault of the quantizer: report it with the model",
                )
            integers.add(node)


def _moved_integers(node: fx.Node, params: QuantParams) -> fx.Node:
    """Let a move read integers instead of their dequantized values; what it pads with becomes the zero point. A
    rescaling does nothing to the integers, and vanishes."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is torch.ops.fxpress.dequantize.default:
        node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
    elif _is_move(source):  # a part of a split
        _moved_integers(source, params)
    if node.target is aten.constant_pad_nd.default:
        set_argument(node, "value", params.zero_point)
    if node.target in _POOLS:
        # PyTorch's kernel for channels-last counts places in the dtype of the values: 8 bits hold 127 of them.
        values = node.args[0]
        node.replace_input_with(values, call_before(node, aten.contiguous.default, values))  # type: ignore[arg-type]
    note = annotation(node)
    return node.args[0] if note is not None and note.row.kind == "rescale" else node  # type: ignore[return-value]


_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


def _drop_absorbed(folding: _Folding, activation: fx.Node) -> None:
    """Remove an activation whose work the quantization after it does: zero is its smallest number."""
    params = folding.params[next(iter(activation.users))]
    smallest = torch.iinfo(params.dtype).min
    bound = upper_bound(activation)
    if params.zero_point == smallest and (bound is None or params.high <= bound * (1 + 1e-6)):
        replace(activation, activation.args[0])  # type: ignore[arg-type]


# -- weights -------------------------------------------------------------------------------------------------------


def _fold_layer(folding: _Folding, node: fx.Node) -> None:
    observe = node.args[0]
    assert isinstance(observe, fx.Node)
    x_scale = folding.params[observe].scale
    weight_node, bias_node = node.args[1], argument(node, "bias")
    weight, bias = constant(folding.program, weight_node), constant(folding.program, bias_node)
    assert weight is not None
    if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise QuantizationError(
            f"the weights of {layer_name(node)} hold NaN or infinity",
            hint="check the checkpoint; training may have diverged",
        )
    note = annotation(node)
    form = (note.row.weight if note else None) or folding.target.weight
    stored_bias = bias if folding.target.bias is not None else None
    scales = node.meta.pop(LEARNED_SCALES, None)
    if scales is None:
        scales = weight_scales(weight.detach(), form, folding.weight_ranges)
    if stored_bias is not None:
        least = (stored_bias.detach().double().abs() / (x_scale * _BIAS_LIMIT)).float()
        scales = torch.maximum(scales, least if form.per_channel else least.max())
    integers = quantize_weight(weight.detach(), scales, form)
    set_argument(node, "weight", _stored(folding, node, weight_node, integers, scales))  # type: ignore[arg-type]
    if stored_bias is not None:
        bias_scales = scales * torch.tensor(x_scale, dtype=torch.float32)
        q = torch.round(stored_bias.detach().double() / bias_scales.double()).to(torch.int32)
        set_argument(node, "bias", _stored(folding, node, bias_node, q, bias_scales))


def _stored(folding: _Folding, node: fx.Node, source: fx.Node, q: torch.Tensor, scales: torch.Tensor) -> fx.Node:
    """Keep integers and their scales as buffers and read them through `dequantize_channel` (a new node).

    The integers take the place and the name of the float parameter when `node` is its only reader.
    """
    program, path = folding.program, str(source.target)
    readers = [u for n in node.graph.nodes if n.op == "get_attr" and n.target == path for u in n.users]
    value = source.meta.get("val")
    if readers == [node]:
        set_attribute(program.graph_module, path, q)
        source.meta["val"] = fake_like(node, q)
    else:
        source = put_constant(program, f"{path}_int", q, node)
    scale = put_constant(program, f"{path}_scale", scales, node)
    return call_before(node, torch.ops.fxpress.dequantize_channel.default, source, scale, 0, value=value)


def weight_scales(weight: torch.Tensor, form: NumberFormat, ranges: str) -> torch.Tensor:
    """One symmetric scale per output channel (first dim), float32[out]; or per tensor, repeated.

    `ranges`: "minmax" covers the largest weight, "mse" clips where that lessens the squared error.
    """
    rows = weight.reshape(weight.shape[0], -1)
    if not form.per_channel:
        rows = rows.reshape(1, -1)
    bounds = best_bounds(rows, form) if ranges == "mse" else rows.abs().amax(1)
    scales = (bounds.double() / form.limits[1]).float()
    # A channel of zeros needs some scale; 1 stores its zeros exactly.
    scales = torch.where(scales > 2.0**-100, scales, torch.ones_like(scales))
    return scales.expand(weight.shape[0]).clone()


_INT8 = NumberFormat(torch.int8, symmetric=True, per_channel=True, narrow=True)


def quantize_weight(weight: torch.Tensor, scales: torch.Tensor, form: NumberFormat = _INT8) -> torch.Tensor:
    """Symmetric integer weights within the limits of `form`, `scales` along the first dim."""
    shaped = scales.reshape(-1, *[1] * (weight.ndim - 1))
    return torch.clamp(torch.round(weight.float() / shaped), *form.limits).to(form.dtype)
