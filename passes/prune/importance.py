"""How much each literal matters. An importance is one function from the weights of a literal to a number.

    score(place, i) = norm of the slice i of the parameter along the place's dimension      (Li et al. 2017)
    relative        = score / (mean score of the group's literals at that place)
    I(literal)      = mean of relative over its places  *  sqrt(number of layers that read it)

The mean over coupled places, and the normalization that lets groups compete under one threshold, follow Fang et al.
2023 (DepGraph). The last factor says that what is removed from a residual stream is an error at each of its readers,
and errors of independent layers add in squares. Places in parameters of one dimension (biases, norms) count only where
a group has no others: the size of a bias says nothing about what its channel carries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ...errors import OptionError, PruningError
from ...frontend.program import get_attribute
from .analysis import Analysis
from .axes import Vector
from .groups import Group, Place

# (matrix [positions, values of each slice], generator) -> scores [positions]
Score = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def _l1(slices: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    return slices.abs().sum(dim=1)


def _l2(slices: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    return slices.square().sum(dim=1).sqrt()


def _random(slices: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(generator.random(len(slices)))


IMPORTANCES: dict[str, Score] = {"l1": _l1, "l2": _l2, "random": _random}


def importances(analysis: Analysis, groups: list[Group], name: str, seed: int = 0) -> Vector:
    """The importance of every literal, indexed by atom (0 where it is in no group).

    Raises OptionError for an unknown name, PruningError for weights that are not finite.
    """
    if name not in IMPORTANCES:
        raise OptionError(f"unknown importance {name!r}", hint=f"choose one of {', '.join(IMPORTANCES)}")
    generator = np.random.default_rng(seed)
    scores = {place: _scores(analysis, place, IMPORTANCES[name], generator) for place in _ordered(groups)}
    readers = _readers(analysis)
    result = np.zeros(analysis.atoms.count)
    for group in groups:
        total = np.zeros(len(group))
        used = _weights_of(analysis, group)
        for place in used:
            literals, values = scores[place]
            total += _normalized(values[np.searchsorted(literals, group.literals)])
        result[group.literals] = total / len(used) * np.sqrt(readers[group.literals])
    return result


def _readers(analysis: Analysis) -> Vector:
    """How many layers sum over a dimension in which a literal occurs, 1 at least."""
    result = np.zeros(analysis.atoms.count)
    for place in analysis.contractions:
        result[analysis.atoms.literals(analysis.need(place.node, place.argument)[place.dim])] += 1
    return np.maximum(result, 1)


def _ordered(groups: list[Group]) -> list[Place]:
    return list(dict.fromkeys(place for group in groups for place in group.places))


def _weights_of(analysis: Analysis, group: Group) -> list[Place]:
    """The places that speak for a group: in parameters with at least two dimensions, else in any parameter."""
    tensors = {p: get_attribute(analysis.program.graph_module, p.name) for p in group.places}
    own = [p for p, t in tensors.items() if isinstance(t, torch.nn.Parameter)] or list(tensors)
    return [p for p in own if tensors[p].ndim > 1] or own


def _scores(analysis: Analysis, place: Place, score: Score, generator: np.random.Generator) -> tuple[Vector, Vector]:
    """The literals at one place, sorted, and the score of each: the sum over its positions there."""
    tensor = get_attribute(analysis.program.graph_module, place.name).detach()
    if not torch.isfinite(tensor).all():
        raise PruningError(f"{place.name} holds NaN or infinity", hint="check how the weights were loaded or trained")
    rows = tensor.double().movedim(place.dim, 0).reshape(tensor.shape[place.dim], -1)
    values = score(rows, generator).cpu().numpy()
    slots = analysis.atoms.resolve(analysis.tensors[place.name][place.dim])
    literals, index = np.unique(slots, return_inverse=True)
    return literals, np.bincount(index.ravel(), weights=np.tile(values, len(slots)), minlength=len(literals))


def _normalized(scores: Vector) -> Vector:
    mean = scores.mean()
    return scores / mean if mean > 0 else np.ones_like(scores)
