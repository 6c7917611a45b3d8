"""Fake quantization: the program computes in float on the numbers that its quantized form will have, and trains.

`fake-quantize` puts `fxpress::fake_quantize` in the place of each observer and on each layer's weights. Every scale is
a parameter that starts from the calibrated range and is learned with the weights (LSQ, frontend/learned_steps.py).

BatchNorm that `fuse-batchnorm{keep=true}` remembered is put back behind its layer. Where weights have a scale per
output channel, folding it needs no correction during training (as Jacob et al. 2018, arXiv 1712.05877, and
Krishnamoorthi 2018, arXiv 1806.08342, need for one scale per layer): BatchNorm's factor a of a channel moves into that
channel's scale, since  quantize(a W, |a| s) = sign(a) quantize(W, s).  So W is quantized as it is, the norm follows in
float, and folding later gives the same integers. With one scale per layer BatchNorm stays fused.

Biases stay in float: their int32 form has steps of input scale x weight scale, one unit of the accumulator.
"""

from __future__ import annotations

import dataclasses
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
from .annotate import ABSORBED, annotation
from .fold import weight_scales
from .observe import Site, Sites, sites_of
from .ranges.choose import choose_ranges
from .ranges.observers import Candidates
from .spec import NumberFormat, QuantParams, Target, choose_params

MARK = "fake_quantized"  # in meta["custom"], which archives keep: what folding must know of a node
_LOW_BIT_RULE = "mse"
_ZERO = "fake_quantize.zero"


@register_pass
@dataclass(frozen=True)
class FakeQuantize(Pass):
    """Simulate quantization in float, with scales that are trained with the weights (LSQ).

    Follows `annotate,observe,calibrate`, whose ranges the scales start from. `weight_bits` and `activation_bits` (2 to
    8) make the simulated numbers smaller than the target's; what is folded for a runtime needs the target's own
    activations. `learn_scales=false` keeps the calibrated ranges, `learn_zero_points` also learns the zero points of
    ranges on both sides of zero (LSQ+). `weights` is the rule for the first weight scales (minmax or mse).
    """

    name = "fake-quantize"
    preserves = frozenset({INTERFACE})

    weight_bits: int | None = None
    activation_bits: int | None = None
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
    """Where the scale of a site is kept, and its zero point or, where that is learned, its smallest real number; its
    limits; the bound on its scale."""

    scale: str
    zero_point: str | None
    lowest: str | None
    limits: tuple[int, int]
    ceiling: float | None


def insert_fake_quantization(program: Program, target: Target, options: FakeQuantize) -> tuple[int, int]:
    """Replace observers and quantize weights, in place. Returns (fake-quantized tensors, restored BatchNorms)."""
    declare_operators()
    sites = sites_of(program)
    if not sites.samples:
        raise QuantizationError("the observers have seen no data", hint="run the pass `calibrate` before this one")
    count = restored = 0
    marks: dict[fx.Node, dict[str, Any]] = dict(_annotated(program))
    for node in list(program.graph.nodes):
        note = annotation(node)
        if note is not None and note.row.kind == "layer":
            form = _narrowed(note.row.weight or target.weight, options.weight_bits)
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
            stored[root.key] = _store(program, node, root, target, options)
        fake = _quantize_activation(program, node, stored[root.key])
        marks[fake] = {"site": _description(sites, site, target)}
        count += 1
    _finish(program, marks)
    return count, restored


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
    return note is not None and note.row.kind == "move"


# -- activations ---------------------------------------------------------------------------------------------------


def _description(sites: Sites, site: Site, target: Target) -> dict[str, Any]:
    form = _form_of(sites.root(site.key), target)
    dtype = str(form.dtype).removeprefix("torch.")
    return {"layer": site.layer, "dtype": dtype, "limits": list(form.limits), "target": target.name}


def _form_of(site: Site, target: Target) -> NumberFormat:
    """The numbers that the target stores the tensor in."""
    form = site.form or target.activation
    return form if site.fixed is None else dataclasses.replace(form, dtype=site.fixed.dtype, bits=None)


def _store(program: Program, before: fx.Node, site: Site, target: Target, options: FakeQuantize) -> _Stored:
    """Keep a site's scale and zero point as parameters (or buffers, where they are not learned)."""
    stored = _form_of(site, target)
    form = _narrowed(stored, options.activation_bits)
    limits, learned = form.limits, options.learn_scales and site.fixed is None
    if site.fixed is None:
        params = _calibrated(site, form)
    else:
        params = site.fixed if form == stored else choose_params(site.fixed.low, site.fixed.high, form)
    moving = learned and options.learn_zero_points and limits[0] < params.zero_point and not form.symmetric
    ceiling = site.bound / (limits[1] - params.zero_point) if site.bound is not None else None
    name = f"fake_quantize.{site.layer}"
    scale = put_constant(program, f"{name}.scale", _tensor(params.scale, learned), before)
    zero_point = lowest = None
    if moving:
        low = params.scale * (limits[0] - params.zero_point)
        lowest = str(put_constant(program, f"{name}.lowest", _tensor(low, True), before).target)
    else:
        zero_point = str(put_constant(program, f"{name}.zero_point", _tensor(params.zero_point, False), before).target)
    return _Stored(str(scale.target), zero_point, lowest, limits, ceiling)


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
    scale = _read(program, node, stored.scale)
    value = scale.meta["val"]
    if stored.ceiling is not None:
        # A range above the bound of an activation that is absorbed would let through what it cuts off.
        scale = call_before(node, aten.clamp.default, scale, None, stored.ceiling, value=value)
    if stored.lowest is None:
        assert stored.zero_point is not None
        zero_point = _read(program, node, stored.zero_point)
    else:
        steps = call_before(node, aten.div.Tensor, _read(program, node, stored.lowest), scale, value=value)
        zero_point = call_before(node, aten.rsub.Scalar, steps, stored.limits[0], value=value)
    fake = call_before(
        node, torch.ops.fxpress.fake_quantize.default, node.args[0], scale, zero_point, *stored.limits
    )
    replace(node, fake)
    return fake


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


def _tensor(value: float, learned: bool) -> torch.Tensor:
    tensor = torch.tensor(float(value), dtype=torch.float32)
    return torch.nn.Parameter(tensor) if learned else tensor


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
    path = f"{source.target}_scale"
    kept = torch.nn.Parameter(scales) if options.learn_scales else scales
    scale = put_constant(program, path, kept, layer)
    zero_point = _zero(program, layer)
    limit = form.limits[1]
    fake = call_before(
        layer, torch.ops.fxpress.fake_quantize.default, source, scale, zero_point, -limit, limit, 0,
        value=source.meta["val"],
    )  # fmt: skip
    layer.replace_input_with(source, fake)
