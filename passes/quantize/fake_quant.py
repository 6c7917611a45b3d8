"""Fake quantization: the program computes in float on the numbers that its quantized form will have, and trains.

`fake-quantize` puts `fxpress::fake_quantize` in the place of each observer and on each layer's weights. Every scale
starts from the calibrated range and is learned with the weights (LSQ, frontend/learned_steps.py): beside the scale s
there is a parameter `log_change`, and what is computed with is s exp(log_change).

BatchNorm that `fuse-batchnorm{keep=true}` remembered is put back behind its layer. Where weights have a scale per
output channel, folding it needs no correction during training (as Jacob et al. 2018, arXiv 1712.05877, and
Krishnamoorthi 2018, arXiv 1806.08342, need for one scale per layer): BatchNorm's factor a of a channel moves into that
channel's scale, since  quantize(a W, |a| s) = sign(a) quantize(W, s).  So W is quantized as it is, the norm follows in
float, and folding later gives the same integers. With one scale per layer BatchNorm stays fused.

A weight scale above max |W| / qmax would leave numbers unused, and one that a step of training throws far above it
would round all weights to zero; so that is its bound. Biases stay in float: their int32 form has steps of input scale x
weight scale, at most what the largest weight makes of a 127th of a step of its input.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ...errors import OptionError, QuantizationError
from ...frontend.operators import declare_operators
from ...frontend.program import Program
from ..base import INTERFACE, Change, Context, Pass, register_pass
from ..kept_norm import restore_norm
from ..rewrite import argument, aten, call_before, constant, erase_dead, find, put_constant, replace
from .annotate import ABSORBED, annotation, named_nodes
from .fold import weight_scales
from .observe import Site, Sites, sites_of
from .ranges.choose import choose_ranges
from .ranges.observers import Candidates
from .spec import MOVING, NumberFormat, QuantParams, Target, choose_params

MARK = "fake_quantized"  # in meta["custom"], which archives keep: what folding must know of a node
_LOW_BIT_RULE = "mse"
_ZERO = "fake_quantize.zero"


@register_pass
@dataclass(frozen=True)
class FakeQuantize(Pass):
    """Simulate quantization in float, with scales that are trained with the weights (LSQ).

    Follows `annotate,observe,calibrate`, whose ranges the scales start from. `weight_bits` and `activation_bits` (2 to
    8) make the simulated numbers smaller than the target's; what is folded for a runtime needs the target's own
    activations. The layers that `full_width` names keep the target's widths all the same, for weights and inputs: by
    custom the first and the last. `learn_scales=false` keeps the calibrated ranges, `learn_zero_points` also learns the
    zero points of ranges on both sides of zero (LSQ+). `weights` is the rule for the first weight scales (minmax or
    mse).
    """

    name = "fake-quantize"
    preserves = frozenset({INTERFACE})

    weight_bits: int | None = None
    activation_bits: int | None = None
    full_width: tuple[str, ...] = ()
    learn_scales: bool = True
    learn_zero_points: bool = False
    weights: Literal["minmax", "mse"] = "mse"

    def run(self, program: Program, context: Context) -> Change:
        self.check()
        if context.target is None:
            raise QuantizationError("quantization needs a target", hint="pass --target, for example ort-x86")
        notes = self._settle_ranges(program, context)
        count, restored = insert_fake_quantization(program, context.target, self)
        kept = [f"{restored} BatchNorm put back for training"] if restored else []
        return Change(count, [*notes, *kept])

    def check(self) -> None:
        """Raises OptionError for options that cannot be followed."""
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is not None and not 2 <= bits <= 8:
                raise OptionError(f"{name} is {bits}", hint="give 2 to 8")
        if self.full_width and self.weight_bits is None and self.activation_bits is None:
            raise OptionError("full_width has no effect without fewer bits", hint="give weight_bits or activation_bits")
        if self.learn_zero_points and not self.learn_scales:
            raise OptionError("learn_zero_points has no effect without learn_scales", hint="leave one of them out")

    def _settle_ranges(self, program: Program, context: Context) -> list[str]:
        """The rule of ranges that were left open: the best in 8 bits, the least squared error in fewer."""
        assert context.target is not None
        if self.activation_bits in (None, 8):
            return choose_ranges(program, context.target, self.weights, context)
        for site in sites_of(program).by_key.values():
            if isinstance(site.observer, Candidates):
                site.observer.chosen = _LOW_BIT_RULE
        return []


@dataclass(frozen=True)
class _Stored:
    """Where the parameters of a site are kept, its limits, and the bound on its scale."""

    name: str
    limits: tuple[int, int]
    ceiling: float | None


def insert_fake_quantization(program: Program, target: Target, options: FakeQuantize) -> tuple[int, int]:
    """Replace observers and quantize weights, in place. Returns (fake-quantized tensors, restored BatchNorms)."""
    declare_operators()
    sites = sites_of(program)
    if not sites.samples:
        raise QuantizationError("the observers have seen no data", hint="run the pass `calibrate` before this one")
    count = restored = 0
    wide = named_nodes(program, options.full_width, "full_width")
    wide_sites = {sites.root(key).key for node in wide for key in _observed_by(node)}
    marks: dict[fx.Node, dict[str, Any]] = dict(_annotated(program))
    for node in list(program.graph.nodes):
        note = annotation(node)
        if note is not None and note.row.kind == "layer":
            form = _narrowed(note.row.weight or target.weight, None if node in wide else options.weight_bits)
            restored += form.per_channel and restore_norm(program, node) is not None
            _quantize_weight(program, node, form, options)
            count += 1
    stored: dict[int, _Stored] = {}
    for node in list(find(program, torch.ops.fxpress.observe.default)):
        site = sites.by_key[int(node.args[1])]  # type: ignore[arg-type]
        if site.shared is not None and _moves(node.args[0]):
            replace(node, node.args[0])  # type: ignore[arg-type]
            continue
        root = sites.root(site.key)
        if root.key not in stored:
            bits = None if root.key in wide_sites else options.activation_bits
            stored[root.key] = _store(program, node, root, target, options, bits)
        fake = _quantize_activation(program, node, stored[root.key])
        marks[fake] = {"site": _description(sites, site, target)}
        count += 1
    _finish(program, marks)
    return count, restored


def _observed_by(node: fx.Node) -> Iterator[int]:
    """The keys of the observed tensors that a node reads."""
    for source in node.all_input_nodes:
        if source.target is torch.ops.fxpress.observe.default:
            yield int(source.args[1])  # type: ignore[arg-type]


def _annotated(program: Program) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
    for node in program.graph.nodes:
        note = annotation(node)
        if note is not None:
            yield node, {"kind": note.row.kind}
        if node.meta.get(ABSORBED):
            yield node, {"absorbed": True}


def _finish(program: Program, marks: dict[fx.Node, dict[str, Any]]) -> None:
    """Leave on the nodes what folding must know; the annotations themselves would not survive an archive."""
    for node in program.graph.nodes:
        custom = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != MARK}
        node.meta["custom"] = {**custom, MARK: marks[node]} if node in marks else custom
    program.graph_module.meta.pop("observers")
    erase_dead(program)
    program.graph_module.recompile()


def _moves(value: Any) -> bool:
    """A move's output is on the grid of its input: there is nothing to round."""
    note = annotation(value) if isinstance(value, fx.Node) else None
    return note is not None and note.row.kind in MOVING


# -- activations ---------------------------------------------------------------------------------------------------


def _description(sites: Sites, site: Site, target: Target) -> dict[str, Any]:
    form = _form_of(sites.root(site.key), target)
    dtype = str(form.dtype).removeprefix("torch.")
    return {"layer": site.layer, "dtype": dtype, "limits": list(form.limits), "target": target.name}


def _form_of(site: Site, target: Target) -> NumberFormat:
    """The numbers that the target stores the tensor in."""
    form = site.form or target.activation
    return form if site.fixed is None else dataclasses.replace(form, dtype=site.fixed.dtype, bits=None)


def _store(
    program: Program, before: fx.Node, site: Site, target: Target, options: FakeQuantize, bits: int | None
) -> _Stored:
    """Keep a site's scale and zero point as parameters (or buffers, where they are not learned)."""
    stored = _form_of(site, target)
    form = _narrowed(stored, bits)
    limits, learned = form.limits, options.learn_scales and site.fixed is None
    if site.fixed is None:
        params = _calibrated(site, form)
    else:
        params = site.fixed if form == stored else choose_params(site.fixed.low, site.fixed.high, form)
    moving = learned and options.learn_zero_points and limits[0] < params.zero_point and not form.symmetric
    ceiling = site.bound / (limits[1] - params.zero_point) if site.bound is not None else None
    name = _free_name(program, f"fake_quantize.{site.layer}")
    _keep(program, before, f"{name}.scale", params.scale, learned=False)
    _keep(program, before, f"{name}.zero_point", params.zero_point, learned=False)
    if learned:
        _keep(program, before, f"{name}.log_change", 0.0, learned=True)
    if moving:
        _keep(program, before, f"{name}.shift", 0.0, learned=True)
    return _Stored(name, limits, ceiling)


def _free_name(program: Program, name: str) -> str:
    used = {str(n.target).rpartition(".")[0] for n in program.graph.nodes if n.op == "get_attr"}
    return next(n for i in itertools.count() if (n := f"{name}_{i}" if i else name) not in used)


def _keep(program: Program, before: fx.Node, path: str, value: float, learned: bool) -> None:
    tensor = torch.tensor(float(value), dtype=torch.float32)
    put_constant(program, path, torch.nn.Parameter(tensor) if learned else tensor, before)


def _calibrated(site: Site, form: NumberFormat) -> QuantParams:
    """As folding chooses them: the observed range, cut at the bound of an absorbed activation."""
    assert site.observer is not None
    try:
        params = site.observer.params(form)
    except QuantizationError as error:
        raise QuantizationError(f"{site.layer}: {error.message}", hint=error.hint) from error
    qmin, qmax = form.limits
    if site.bound is not None and params.scale * (qmax - params.zero_point) > site.bound:
        params = choose_params(params.scale * (qmin - params.zero_point), site.bound, form)
    return params


def _quantize_activation(program: Program, node: fx.Node, stored: _Stored) -> fx.Node:
    scale, zero_point = (_read(program, node, f"{stored.name}.{part}") for part in ("scale", "zero_point"))
    value = scale.meta["val"]
    held = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    if f"{stored.name}.log_change" in held:
        scale = _changed(node, scale, _read(program, node, f"{stored.name}.log_change"))
    if stored.ceiling is not None:
        # A range above the bound of an activation that is absorbed would let through what it cuts off.
        scale = call_before(node, aten.clamp.default, scale, None, stored.ceiling, value=value)
    if f"{stored.name}.shift" in held:
        share = _read(program, node, f"{stored.name}.shift")
        steps = call_before(node, aten.mul.Tensor, share, float(stored.limits[1] - stored.limits[0]), value=value)
        zero_point = call_before(node, aten.add.Tensor, zero_point, steps, value=value)
    fake = call_before(node, torch.ops.fxpress.fake_quantize.default, node.args[0], scale, zero_point, *stored.limits)
    replace(node, fake)
    return fake


def _changed(before: fx.Node, scale: fx.Node, log_change: fx.Node) -> fx.Node:
    """scale * exp(log_change)"""
    factor = call_before(before, aten.exp.default, log_change, value=log_change.meta["val"])
    return call_before(before, aten.mul.Tensor, scale, factor, value=scale.meta["val"])


def _read(program: Program, before: fx.Node, path: str) -> fx.Node:
    """A get_attr node for a stored tensor: the one there is where it comes early enough."""
    known = next((n for n in program.graph.nodes if n.op == "get_attr" and n.target == path), None)
    if known is not None and known < before:
        return known
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(path)
    assert known is not None
    node.meta["val"] = known.meta["val"]
    return node


def _narrowed(form: NumberFormat, bits: int | None) -> NumberFormat:
    """`form` with fewer bits, if it has more."""
    own = form.bits or torch.iinfo(form.dtype).bits
    return form if bits is None or bits >= own else dataclasses.replace(form, bits=bits)


def _zero(program: Program, before: fx.Node) -> fx.Node:
    """The zero point of everything symmetric."""
    known = any(n.op == "get_attr" and n.target == _ZERO for n in program.graph.nodes)
    return _read(program, before, _ZERO) if known else put_constant(program, _ZERO, torch.zeros(()), before)


# -- weights -------------------------------------------------------------------------------------------------------


def _quantize_weight(program: Program, layer: fx.Node, form: NumberFormat, options: FakeQuantize) -> None:
    """weight -> fake_quantize(weight), symmetric, one scale per output channel or one for all."""
    source = argument(layer, "weight")
    weight = constant(program, source)
    assert weight is not None
    scales = weight_scales(weight.detach(), form, options.weights)
    scales = scales if form.per_channel else scales[:1].clone()
    scale = put_constant(program, f"{source.target}_scale", scales, layer)
    limit = form.limits[1]
    if options.learn_scales:
        change = torch.nn.Parameter(torch.zeros_like(scales))
        scale = _changed(layer, scale, put_constant(program, f"{source.target}_log_change", change, layer))
        most = _largest(layer, source, form, limit)
        scale = call_before(layer, aten.minimum.default, scale, most, value=scale.meta["val"])
    fake = call_before(
        layer, torch.ops.fxpress.fake_quantize.default, source, scale, _zero(program, layer), -limit, limit, 0,
        value=source.meta["val"],
    )  # fmt: skip
    layer.replace_input_with(source, fake)


def _largest(layer: fx.Node, source: fx.Node, form: NumberFormat, limit: int) -> fx.Node:
    """The scale with which the largest weight of a channel (of all, for one scale) is the largest number.

    It is a bound and nothing to learn: the gradient of a scale is that of its logarithm, far from what the largest
    weight of a channel should be told.
    """
    weight = source.meta["val"]
    held = call_before(layer, aten.detach.default, source, value=weight)
    sizes = call_before(layer, aten.abs.default, held, value=weight)
    rows = [weight.shape[0] if form.per_channel else 1, -1]
    flat = call_before(layer, aten.reshape.default, sizes, rows, value=weight.reshape(rows))
    most = call_before(layer, aten.amax.default, flat, [1], value=flat.meta["val"].amax(1))
    return call_before(layer, aten.div.Tensor, most, float(limit), value=most.meta["val"])
