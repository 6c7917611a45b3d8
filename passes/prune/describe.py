"""Groups and pinned axes for people: which layers a group couples, through which ops; what is alike as one row."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import fx

from ...frontend.cost import op_name
from ...frontend.program import get_attribute
from .analysis import Analysis, flat_axes
from .axes import Vector
from .groups import Group, Pinned, Place
from .kinds.weight_uses import weight_uses

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Coupling:
    """What one group couples: the layers (or tables) that write its channels, those that read them, the ops between.

    `own`: the norms and other layers that hold a value for each channel. `each`: positions that one literal has in the
    widest of its places (the features of a head, say).
    """

    group: Group
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    own: tuple[str, ...]
    through: tuple[str, ...]
    each: int

    def __len__(self) -> int:
        return len(self.group)

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for groups that differ only in the numbers of their blocks."""
        names = (tuple(_DIGITS.sub("#", n) for n in part) for part in (self.written_by, self.read_by, self.own))
        return (len(self), self.each, self.through, *names)


def couplings(analysis: Analysis, groups: list[Group]) -> list[Coupling]:
    """A description of every group, in the order of `groups`."""
    dims: dict[Place, str] = {}
    weights = set()
    for use in weight_uses(analysis.program):
        weights.add(use.node)
        for dim, role in ((use.inputs, "read_by"), (use.outputs, "written_by")):
            if dim is not None:
                dims.setdefault(Place(use.name, dim), role)
    ops = _ops(analysis, groups, weights)
    return [_coupling(analysis, group, dims, through) for group, through in zip(groups, ops)]


def _coupling(analysis: Analysis, group: Group, dims: dict[Place, str], through: tuple[str, ...]) -> Coupling:
    roles: dict[str, dict[str, None]] = {"written_by": {}, "read_by": {}, "own": {}}
    for place in group.places:
        single = get_attribute(analysis.program.graph_module, place.name).ndim == 1
        roles[dims.get(place, "own" if single else "written_by")][_layer(place.name)] = None
    written, read = tuple(roles["written_by"]), tuple(roles["read_by"])
    own = tuple(n for n in roles["own"] if n not in roles["written_by"])
    return Coupling(group, written, read, own, through, round(max(group.multiplicity)))


def _layer(name: str) -> str:
    """ "conv1.weight" -> "conv1"; a parameter with a name of its own keeps it."""
    owner, _, leaf = name.rpartition(".")
    return owner if owner and leaf in _PLAIN else name


_PLAIN = ("weight", "bias", "running_mean", "running_var", "gamma", "beta", "scale")


def _ops(analysis: Analysis, groups: list[Group], weights: set[fx.Node]) -> list[tuple[str, ...]]:
    """For each group the ops that its channels run through, layers with weights left out, in graph order."""
    number = np.full(analysis.atoms.count, -1)
    for i, group in enumerate(groups):
        number[group.literals] = i
    found: list[dict[str, None]] = [{} for _ in groups]
    for node, value in analysis.values.items():
        if not op_name(node).startswith("aten.") or node in weights:
            continue
        for i in _touched(analysis, number, (v for axes in flat_axes(value) for v in axes if v.any())):
            found[i][op_name(node).removeprefix("aten.")] = None
    return [tuple(ops) for ops in found]


def _touched(analysis: Analysis, number: Vector, vectors: Iterable[Vector]) -> set[int]:
    found: set[int] = set()
    for vector in vectors:
        found.update(np.unique(number[analysis.atoms.resolve(vector)]).tolist())
    return found - {-1}


def alike(couplings_: Iterable[Coupling]) -> list[list[Coupling]]:
    """Couplings of one form together, largest first."""
    forms: dict[tuple[object, ...], list[Coupling]] = {}
    for coupling in couplings_:
        forms.setdefault(coupling.form, []).append(coupling)
    return sorted(forms.values(), key=lambda rows: (-len(rows[0]) * rows[0].each, -len(rows)))


def pinned_alike(pinned: Iterable[Pinned]) -> list[list[Pinned]]:
    """Pinned dimensions with one reason at one source line together, those with the largest size first."""
    kinds: dict[tuple[str, str | None], list[Pinned]] = {}
    for item in pinned:
        kinds.setdefault((item.reason.text, item.reason.source), []).append(item)
    return sorted(kinds.values(), key=lambda rows: -max(p.size for p in rows))
