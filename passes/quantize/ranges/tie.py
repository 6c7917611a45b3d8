"""One scale for all parts of a concatenation, where the outputs stay as good.

Between tensors of the same scale and zero point a concatenation only copies bytes; otherwise each part is read through
a table (ONNX Runtime: 31 against 222 us on one shape). But a part of small values that takes the scale of a large one
loses steps for all that read it by itself. So concatenations that share parts are tied together and tried on
calibration samples: all at once, then one connected set after the other, as long as the SQNR of the outputs falls by no
more than 0.5 dB altogether.

A set is left alone where a part ends in an activation function that vanishes into its quantization (its smallest
stored number must be that function's lower bound, and its range end at the upper one) and the common range is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import networkx
import torch

from ....frontend.program import Program
from ...rewrite import aten, find, is_op
from ..annotate import annotation
from ..observe import Site, Sites, sites_of
from ..spec import NumberFormat, QuantParams, Target, choose_params

_ALLOWED_DB = 0.5

Params = Callable[[int], QuantParams]  # key of an observed tensor -> its parameters


def tie_concatenations(
    program: Program, target: Target, params: Params, measure: Callable[[], float], before: float | None = None
) -> list[str]:
    """Tie what may be tied, in `sites_of(program)`. Returns notes, none where there is nothing to tie.

    `measure` gives the SQNR of the outputs as the sites are now, in dB; `before` is what it gave last, if known.
    """
    sites = sites_of(program)
    sets = [s for keys in _connected(program, sites) if (s := _common(sites, keys, target, params)) is not None]
    if not sets:
        return []
    before = measure() if before is None else before
    _tie(sites, sets)
    kept, after = sets, measure()
    note = f"SQNR of the outputs {before:.1f} to {after:.1f} dB"
    if after < before - _ALLOWED_DB:
        _tie(sites, sets, tied=False)
        kept, after = _one_by_one(sites, sets, measure, before)
        note += f" with all of them, {after:.1f} dB as it is"
    return [f"{len(kept)} of {len(sets)} sets of concatenated tensors share one scale ({note})"]


Common = dict[int, QuantParams]  # key of a root -> the parameters that it would share


def _one_by_one(
    sites: Sites, sets: list[Common], measure: Callable[[], float], before: float
) -> tuple[list[Common], float]:
    kept, after = [], before
    for common in sets if len(sets) > 1 else []:
        _tie(sites, [common])
        found = measure()
        if found >= before - _ALLOWED_DB:
            kept.append(common)
            after = found
        else:
            _tie(sites, [common], tied=False)
    return kept, after


def _tie(sites: Sites, sets: Iterable[Common], tied: bool = True) -> None:
    for common in sets:
        for key, params in common.items():
            sites.by_key[key].tied = params if tied else None


def _connected(program: Program, sites: Sites) -> list[set[int]]:
    """Keys of the roots of tensors that concatenations tie to each other."""
    observe = torch.ops.fxpress.observe.default
    graph = networkx.Graph()
    for node in find(program, aten.cat.default):
        around = [*node.all_input_nodes, *node.users]
        if annotation(node) is None or len(node.users) != 1 or not all(is_op(n, observe) for n in around):
            continue
        keys = [int(n.args[1]) for n in around]  # type: ignore[arg-type]
        if all(sites.factor(k) == 1 for k in keys):
            networkx.add_path(graph, [sites.root(k).key for k in keys])
    return [set(part) for part in networkx.connected_components(graph)]


def _common(sites: Sites, keys: set[int], target: Target, params: Params) -> Common | None:
    """One range for all; None where they cannot have one, or have it already."""
    members = [sites.by_key[k] for k in sorted(keys)]
    forms = {s.form or target.activation for s in members}
    if len(forms) > 1 or any(s.observer is None for s in members):
        return None
    (form,) = forms
    own = {s.key: params(s.key) for s in members}
    if len({(p.scale, p.zero_point) for p in own.values()}) == 1:
        return None
    found = choose_params(min(p.low for p in own.values()), max(p.high for p in own.values()), form)
    fits = all(_may_have(site, own[site.key], found, form) for site in members)
    return dict.fromkeys(own, found) if fits else None


def _may_have(site: Site, own: QuantParams, found: QuantParams, form: NumberFormat) -> bool:
    """Would an activation function in front still vanish into the quantization?"""
    ends_at_zero = own.low == 0 and not form.symmetric
    return not (ends_at_zero and found.low < 0) and (site.bound is None or found.high <= site.bound)
