"""Turn a fake-quantized program into the integer program that it simulated.

Everything that training learned becomes a range that folding takes as given: each `fake_quantize` of an activation an
observed site with fixed parameters, each weight the numbers on its grid with their scales, each BatchNorm behind a
quantized layer a factor in those scales. Then `fold` does what it does after calibration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...errors import QuantizationError
from ...frontend.learned_steps import effective_scale, effective_zero_point
from ...frontend.operators import declare_operators
from ...frontend.program import Program, get_attribute, layer_name, set_attribute
from ..base import INTERFACE, Change, Context, Pass, register_pass
from ..fuse_batchnorm import affine, fuse_after
from ..rewrite import (
    argument,
    aten,
    call_after,
    erase_dead,
    is_op,
    put_constant,
    set_argument,
)
from .annotate import ABSORBED, KEY, Annotation
from .fake_quant import MARK
from .fold import LEARNED_SCALES, fold_program
from .observe import Site, Sites, describe_site
from .spec import MOVING, QuantParams, Target


@register_pass
@dataclass(frozen=True)
class FoldFakeQuantize(Pass):
    """Fold learned scales and weights into integers: exactly what `fake-quantize` simulated."""

    name = "fold-fake-quantize"
    preserves = frozenset({INTERFACE})

    def run(self, program: Program, context: Context) -> Change:
        if context.target is None:
            raise QuantizationError("quantization needs a target", hint="pass --target, for example ort-x86")
        return Change(fold_fake_quantized(program, context.target))


def fold_fake_quantized(program: Program, target: Target) -> int:
    """Fold in place. Returns the number of integer layers.

    Raises QuantizationError for a program that is not fake-quantized, or whose activations have other numbers than the
    target's.
    """
    declare_operators()
    marks = {n: m for n in program.graph.nodes if (m := (n.meta.get("custom") or {}).get(MARK)) is not None}
    if not any("site" in m for m in marks.values()):
        raise QuantizationError("the program is not fake-quantized", hint="run the pass `fake-quantize` before")
    for node in program.graph.nodes:  # or what folding puts in would inherit them
        node.meta["custom"] = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != MARK}
    _check_target(marks, target)
    layers = [n for n, m in marks.items() if m.get("kind") == "layer"]
    shared = _shared_weights(layers)
    for layer in layers:
        _fold_weight(program, layer, owned=_weight_name(layer) not in shared)
    sites = Sites(samples=1)
    for node, mark in marks.items():
        if "site" in mark:
            _observe_again(program, node, mark["site"], sites)
    for node, mark in marks.items():
        _annotate_again(node, mark, target)
    for node, mark in marks.items():
        if mark.get("kind") in MOVING:
            _share_again(node, sites)
    program.graph_module.meta["observers"] = sites
    erase_dead(program)
    return fold_program(program, target, "minmax")


def _check_target(marks: dict[fx.Node, dict[str, Any]], target: Target) -> None:
    simulated = {m["site"]["target"] for m in marks.values() if "site" in m}
    if simulated != {target.name}:
        raise QuantizationError(
            f"the program simulates {', '.join(sorted(simulated))}, not {target.name}", hint="fold for that target"
        )


def _annotate_again(node: fx.Node, mark: dict[str, Any], target: Target) -> None:
    if mark.get("absorbed"):
        node.meta[ABSORBED] = True
    if "kind" in mark:
        row = target.row_for(node)
        if row is None or row.kind != mark["kind"]:
            raise QuantizationError(
                f"target {target.name} does not compute {layer_name(node)} ({node.target}) as a {mark['kind']}",
                hint="fold for the target that `fake-quantize` ran for",
            )
        node.meta[KEY] = Annotation(row, ())


# -- activations ---------------------------------------------------------------------------------------------------


def _observe_again(program: Program, fake: fx.Node, site: dict[str, Any], sites: Sites) -> None:
    """fake_quantize(x) -> observe(x) with the learned parameters."""
    x, scale, zero_point, qmin, qmax = fake.args[:5]
    if [qmin, qmax] != site["limits"]:
        raise QuantizationError(
            f"{site['layer']} simulates the numbers {qmin} to {qmax}, the target's are {site['limits']}",
            hint="other widths are for simulation: give fake-quantize no activation_bits",
        )
    zero = effective_zero_point(_evaluated(program, zero_point), int(qmin), int(qmax))  # type: ignore[arg-type]
    step = float(effective_scale(_evaluated(program, scale)))
    params = QuantParams(step, zero, getattr(torch, site["dtype"]))
    observe = _observe(x, Site(len(sites.by_key), site["layer"], fixed=params), sites)  # type: ignore[arg-type]
    fake.replace_all_uses_with(observe)
    fake.graph.erase_node(fake)


def _observe(x: fx.Node, site: Site, sites: Sites) -> fx.Node:
    sites.by_key[site.key] = site
    node = call_after(x, torch.ops.fxpress.observe.default, x, site.key)
    node.meta["custom"] = {**node.meta["custom"], "layer": site.layer, "module": layer_name(x)}
    return node


def _evaluated(program: Program, value: Any) -> Any:
    """What a node of parameters alone gives: a scale under its bound, a zero point from the smallest number."""
    if not isinstance(value, fx.Node):
        return value
    if value.op == "get_attr":
        return get_attribute(program.graph_module, str(value.target)).detach()
    return value.target(*(_evaluated(program, a) for a in value.args))  # type: ignore[operator]


def _share_again(node: fx.Node, sites: Sites) -> None:
    """Observe the output of a move with the scale of its input, as `insert_observers` does."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return
    site = Site(len(sites.by_key), (node.meta.get("custom") or {}).get("float_name", node.name))
    describe_site(site, node)
    readers = list(node.users)
    observe = _observe(node, site, sites)
    for reader in readers:
        reader.replace_input_with(node, observe)


# -- weights -------------------------------------------------------------------------------------------------------


def _weight_name(layer: fx.Node) -> str:
    return str(argument(layer, "weight").args[0].target)


def _shared_weights(layers: list[fx.Node]) -> set[str]:
    """The weights that more than one layer reads, by name."""
    return {name for name, count in Counter(map(_weight_name, layers)).items() if count > 1}


def _fold_weight(program: Program, layer: fx.Node, owned: bool) -> None:
    """fake_quantize(W) -> its numbers as a constant, BatchNorm fused into them; the scales go into the layer's meta.

    A norm behind weights that were shared, not `owned`, was never fused and stays what it is, as in `quantize`.
    """
    fake = argument(layer, "weight")
    with torch.no_grad():
        weight, scale, zero_point = (_evaluated(program, n) for n in fake.args[:3])
        numbers = fake.target(weight, scale, zero_point, *fake.args[3:])
    _put_weight(program, layer, fake, torch.nn.Parameter(numbers))
    scales = effective_scale(scale).double().expand(weight.shape[0])
    norm = next(iter(layer.users)) if len(layer.users) == 1 else None
    if owned and norm is not None and is_op(norm, aten.batch_norm.default):
        factor, _ = affine(program, norm)
        if fuse_after(program, norm) is None:  # else it was not fused before, and training did not put it back
            scales = scales * factor.abs()
    layer.meta[LEARNED_SCALES] = _usable(scales)


def _put_weight(program: Program, layer: fx.Node, fake: fx.Node, numbers: torch.nn.Parameter) -> None:
    """Let `layer` read `numbers` instead of `fake`, under the name of the weight where nothing else reads that."""
    source = fake.args[0]
    assert isinstance(source, fx.Node)
    set_argument(layer, "weight", source)
    _erase_unread(fake, keep=source)
    readers = [u for n in layer.graph.nodes if n.op == "get_attr" and n.target == source.target for u in n.users]
    if readers == [layer]:
        set_attribute(program.graph_module, str(source.target), numbers)
    else:
        set_argument(layer, "weight", put_constant(program, str(source.target), numbers, layer))


def _erase_unread(node: fx.Node, keep: fx.Node) -> None:
    """Erase a node that nothing reads, and then those that it read."""
    if node is keep or node.users:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        _erase_unread(source, keep)


def _usable(scales: torch.Tensor) -> torch.Tensor:
    """float32 scales; a channel whose weights BatchNorm made zero gets 1, which stores zeros exactly."""
    narrow = scales.float()
    return torch.where(narrow > 2.0**-100, narrow, torch.ones_like(narrow))
