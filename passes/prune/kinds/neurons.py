"""Hidden units of linear layers, by the norm of their outgoing weights (He et al. 2014, "Reshaping Deep Neural Network
for Fast Decoding by Node-Pruning").

A hidden unit is an output of linear layers that only linear layers read, element by element in between: a group of the
axis algebra with one position at each of its places, none of them in a layer of another kind. What is read and then
written again is a residual stream, and a unit with many positions is a head; neither is a hidden unit.
"""

from __future__ import annotations

import numpy as np

from ....errors import OptionError, PruningError
from ....frontend.cost import op_name
from ....frontend.program import get_attribute
from ..analysis import Analysis
from ..axes import Vector
from ..groups import Group, Place, find_groups
from .blocks import DataFlow
from .weight_uses import WeightUse, weight_uses

_LINEAR = ("aten.linear", "aten.addmm", "aten.matmul", "aten.mm")
NORMS = ("l1", "l2")


def hidden_units(analysis: Analysis) -> list[tuple[Group, tuple[Place, ...]]]:
    """Every group of hidden units with the places of its outgoing weights."""
    uses: dict[str, list[WeightUse]] = {}
    for use in weight_uses(analysis.program):
        uses.setdefault(use.name, []).append(use)
    flow = DataFlow(analysis.program)
    found = ((group, _outgoing(group, uses, flow)) for group in find_groups(analysis))
    return [(group, outgoing) for group, outgoing in found if outgoing]


def _outgoing(group: Group, uses: dict[str, list[WeightUse]], flow: DataFlow) -> tuple[Place, ...]:
    """The places of outgoing weights; () where the group is no group of hidden units."""
    module = group.analysis.program.graph_module
    weights = [p for p in group.places if get_attribute(module, p.name).ndim > 1]
    if any(m != 1 for m in group.multiplicity) or any(p.name not in uses for p in weights):
        return ()
    everything = [(p, use) for p in weights for use in uses[p.name]]
    if any(op_name(use.node) not in _LINEAR or p.dim not in (use.inputs, use.outputs) for p, use in everything):
        return ()
    writers = [use.node for p, use in everything if p.dim == use.outputs]
    readers = [use.node for p, use in everything if p.dim == use.inputs]
    if not writers or any(flow.depends(w, r) for w in writers for r in readers):
        return ()
    return tuple(dict.fromkeys(p for p, use in everything if p.dim == use.inputs))


def unit_scores(analysis: Analysis, norm: str, relative: bool) -> tuple[list[Group], Vector]:
    """The groups of hidden units and the norm of each unit, indexed by atom; `relative` to the mean of its group, so
    that layers can be compared. Raises PruningError where there are none."""
    units = hidden_units(analysis)
    if not units:
        raise PruningError(
            "this program has no hidden units that may be pruned",
            hint="a hidden unit lies between linear layers only; exclude less, or prune channels",
        )
    scores = outgoing_norms(analysis, units, norm)
    if not np.isfinite(scores).all():
        raise PruningError("a linear layer holds NaN or infinity", hint="check how the weights were loaded or trained")
    for group, _ in units if relative else ():
        mean = scores[group.literals].mean()
        scores[group.literals] = scores[group.literals] / mean if mean > 0 else 1.0
    return [group for group, _ in units], scores


def outgoing_norms(analysis: Analysis, units: list[tuple[Group, tuple[Place, ...]]], norm: str) -> Vector:
    """The norm of all outgoing weights of each unit, indexed by atom: the sum of magnitudes (l1), or the root of the
    sum of squares (l2). Raises OptionError for another norm."""
    if norm not in NORMS:
        raise OptionError(
            f"importance {norm!r} is no norm of outgoing weights", hint=f"kind=neurons takes {' or '.join(NORMS)}"
        )
    result = np.zeros(analysis.atoms.count)
    for place in dict.fromkeys(place for _, outgoing in units for place in outgoing):
        weights = get_attribute(analysis.program.graph_module, place.name).detach().double().movedim(place.dim, 0)
        values = (weights.abs() if norm == "l1" else weights.square()).reshape(len(weights), -1).sum(1).cpu().numpy()
        for slot in analysis.atoms.resolve(analysis.tensors[place.name][place.dim]):
            np.add.at(result, slot, values)
    return result if norm == "l1" else np.sqrt(result)
