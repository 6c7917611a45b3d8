"""How much each literal matters: what a criterion says at every place, normalized and aggregated over coupled places.

    score(place, literal)  from a criterion (see `criteria.py`), summed over the literal's positions there
    relative               = normalize(scores of the group's literals at that place)
    I(literal)             = aggregate(relative over its places)

A place is a dimension of a parameter, or an operand that some layer sums over. Groups compete under one threshold:
normalization and the mean over coupled places follow Fang et al. 2023 (DepGraph). What is removed from a residual
stream is an error at each of its readers, and errors of independent layers add in squares: mean, maximum and product,
which do not grow with the number of layers, are multiplied by the root of the number of layers that read the literal.

Places in parameters of one dimension (biases, norms) count only where a group has no others: the size of a bias says
nothing about what its channel carries. Criteria that read gradients score a literal as a whole: one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ....errors import OptionError, PruningError
from ....frontend.batches import as_batches
from ....frontend.cost import op_name
from ....frontend.program import Program, get_attribute
from ...rewrite import argument
from ..analysis import Analysis
from ..axes import Vector
from ..budgets.costs import macs_cost
from ..groups import Group, Place
from .criteria import Criterion, Slices, check_choice
from .gates import Gate, Signs, find_gates
from .registry import find_criterion
from .sensitivity import (
    ActivationSums,
    ContributionSums,
    Labelled,
    Loss,
    MomentSums,
    Objective,
    OutputProbes,
    measure_gates,
    measure_gradients,
)

_NORMS = ("aten.batch_norm", "aten.instance_norm", "aten.group_norm")


@dataclass(frozen=True)
class Scores:
    """What a criterion says at one place: a value for each literal there (sorted)."""

    literals: Vector
    values: Vector

    def of(self, wanted: Vector) -> Vector | None:
        """The values of these literals, 0 where one is not there; None where none is."""
        at = np.minimum(np.searchsorted(self.literals, wanted), len(self.literals) - 1)
        there = self.literals[at] == wanted
        return np.where(there, self.values[at], 0.0) if there.any() else None


@dataclass(frozen=True)
class Importance:
    """The options of `plan_pruning` that say what matters, checked: which criterion, on which data, put together how.

    Raises OptionError for what is unknown or would have no effect.
    """

    criterion: Criterion
    aggregate: str
    normalize: str
    data: Any = None
    loss: Loss | None = None
    seed: int = 0

    @staticmethod
    def checked(
        name: str,
        aggregate: str | None = None,
        normalize: str | None = None,
        data: Any = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> Importance:
        """None for `aggregate` and `normalize` is what suits the criterion."""
        criterion = find_criterion(name)
        check_choice("aggregate", aggregate or criterion.aggregate, AGGREGATIONS)
        check_choice("normalize", normalize or criterion.normalize, NORMALIZATIONS)
        if criterion.reads == "gradients" and aggregate is not None:
            raise OptionError(
                f"importance {name!r} scores a channel as a whole: aggregate has no effect", hint="leave aggregate out"
            )
        _check_data(criterion, data, loss)
        return Importance(
            criterion, aggregate or criterion.aggregate, normalize or criterion.normalize, data, loss, seed
        )

    def of(
        self,
        analysis: Analysis,
        groups: list[Group],
        cost: Callable[[Vector], float] | None = None,
        program: Program | None = None,
    ) -> Vector:
        """The importance of every literal, indexed by atom: 0 where it is in no group, inf where nothing can be said.

        `cost` is what the plan has to save, of a mask over atoms: by default the MACs. `program` is what data run
        through, the analysed one by default; its nodes have the same names.

        Raises OptionError where nothing can be said of any group, PruningError for weights that are not finite,
        DataError for data that do not fit.
        """
        result = np.zeros(analysis.atoms.count)
        readers = self._readers(analysis)
        for group, scores in zip(groups, self._scores(analysis, groups, program or analysis.program)):
            result[group.literals] = self._together(scores, group) * np.sqrt(readers[group.literals])
        if self.normalize == "cost":
            _divide_by_savings(result, groups, cost or macs_cost(analysis))
        if groups and all(np.isinf(result[g.literals]).all() for g in groups):
            raise OptionError(
                f"importance {self.criterion.name!r} says nothing about any group of this program",
                hint="bn-scale needs norms that are not fused yet; l2 works everywhere",
            )
        return result

    def _together(self, scores: list[Scores], group: Group) -> Vector:
        found = [v for v in (s.of(group.literals) for s in scores) if v is not None]
        if not found:
            return np.full(len(group), np.inf)
        return AGGREGATIONS[self.aggregate](np.stack([NORMALIZATIONS[self.normalize](v) for v in found]))

    def _readers(self, analysis: Analysis) -> Vector:
        """How many layers sum over a dimension in which a literal occurs, where the scores do not tell: 1 at least."""
        result = np.zeros(analysis.atoms.count)
        if self.aggregate != "sum" and self.criterion.reads != "gradients":
            for place in analysis.contractions:
                result[analysis.atoms.literals(analysis.contracted(place))] += 1
        return np.maximum(result, 1)

    def _scores(self, analysis: Analysis, groups: list[Group], program: Program) -> list[list[Scores]]:
        """For each group, what the criterion says at each of its places."""
        if not self.criterion.needs_data:
            return _of_weights(self.criterion, analysis, groups, np.random.default_rng(self.seed))
        gates = find_gates(analysis, np.concatenate([g.literals for g in groups]), program)
        program = _evaluating(program)
        measure = self._of_gradients if self.criterion.reads == "gradients" else self._of_gates
        return [measure(program, gates)] * len(groups)

    def _of_gates(self, program: Program, gates: list[Gate]) -> list[Scores]:
        signs = Signs(self.seed)
        make: dict[str, Callable[[Gate], Any]] = {
            "activations": ActivationSums,
            "contributions": lambda gate: ContributionSums(gate, signs),
            "moments": lambda gate: MomentSums(gate, signs),
        }
        sums = [make[self.criterion.reads](gate) for gate in gates]
        measured = measure_gates(program, gates, as_batches(program, self.data), sums)
        return [_of_gate(self.criterion, gate, found) for gate, found in zip(gates, measured)]

    def _of_gradients(self, program: Program, gates: list[Gate]) -> list[Scores]:
        batches = as_batches(program, self.data)
        source: Iterable[tuple[Any, ...]] = batches
        objective: Objective = Labelled(program, self.loss) if self.loss else OutputProbes(program, Signs(self.seed))
        if isinstance(objective, OutputProbes):
            objective.observe(batches)
        else:
            source = ((*inputs, labels) for inputs, labels in batches.labelled())
        literals, found = measure_gradients(program, gates, source, objective)
        return [Scores(literals, _checked(self.criterion, self.criterion.function(found), len(literals)))]


def importances(analysis: Analysis, groups: list[Group], name: str, seed: int = 0) -> Vector:
    """The importance of every literal by a criterion that reads weights, with its own options: `Importance.of`."""
    return Importance.checked(name, seed=seed).of(analysis, groups)


def _check_data(criterion: Criterion, data: Any, loss: Loss | None) -> None:
    if data is not None and not criterion.needs_data:
        raise OptionError(
            f"importance {criterion.name!r} reads only weights: data has no effect", hint="leave data out"
        )
    if data is None and criterion.needs_data:
        raise OptionError(
            f"importance {criterion.name!r} needs data",
            hint="give data: batches of inputs, labels are not needed (in a pipeline: the calibration data)",
        )
    if loss is not None and criterion.reads != "gradients":
        raise OptionError(
            f"importance {criterion.name!r} takes no gradients: loss has no effect",
            hint="leave loss out, or use taylor or hessian",
        )


def _evaluating(program: Program) -> Program:
    return program.copy().eval() if program.training else program


# -- scores at places ---------------------------------------------------------------------------------------------


def _of_weights(
    criterion: Criterion, analysis: Analysis, groups: list[Group], generator: np.random.Generator
) -> list[list[Scores]]:
    """One score for each parameter dimension that speaks for a group."""
    scales = _norm_scales(analysis)
    known: dict[Place, Scores] = {}
    result = []
    for group in groups:
        of_norms = [p for p in group.places if p.name in scales]
        places = of_norms if criterion.reads == "norms" else _speakers(analysis, group)
        for place in places:
            if place not in known:
                known[place] = _of_place(criterion, analysis, place, generator)
        result.append([known[p] for p in places])
    return result


def _speakers(analysis: Analysis, group: Group) -> list[Place]:
    """The places that speak for a group: in parameters with at least two dimensions, else in any parameter."""
    tensors = {p: get_attribute(analysis.program.graph_module, p.name) for p in group.places}
    own = [p for p, t in tensors.items() if isinstance(t, torch.nn.Parameter)] or list(tensors)
    return [p for p in own if tensors[p].ndim > 1] or own


def _norm_scales(analysis: Analysis) -> set[str]:
    """The names of parameters that scale the channels of a norm."""
    weights = [argument(n, "weight") for n in analysis.values if op_name(n) in _NORMS]
    return {str(w.target) for w in weights if w is not None and w.op == "get_attr"}


def _of_place(criterion: Criterion, analysis: Analysis, place: Place, generator: np.random.Generator) -> Scores:
    tensor = get_attribute(analysis.program.graph_module, place.name).detach()
    if not torch.isfinite(tensor).all():
        raise PruningError(f"{place.name} holds NaN or infinity", hint="check how the weights were loaded or trained")
    rows = tensor.double().movedim(place.dim, 0).reshape(tensor.shape[place.dim], -1)
    values = _checked(criterion, criterion.function(Slices(rows, generator)), len(rows))
    slots = analysis.atoms.resolve(analysis.tensors[place.name][place.dim])
    literals, index = np.unique(slots, return_inverse=True)
    return Scores(literals, np.bincount(index.ravel(), weights=np.tile(values, len(slots)), minlength=len(literals)))


def _of_gate(criterion: Criterion, gate: Gate, measured: Any) -> Scores:
    scores = criterion.function(measured)
    if criterion.reads == "activations":
        values = gate.by_literal(torch.from_numpy(_checked(criterion, scores, len(gate.index)))).numpy()
    else:
        values = _checked(criterion, scores, len(gate.literals))
    return Scores(gate.literals, values)


def _checked(criterion: Criterion, scores: Any, size: int) -> Vector:
    """The scores as an array. Raises PruningError for what a criterion must not give."""
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (size,):
        form = f"shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else f"a {type(scores).__name__}"
        raise PruningError(
            f"importance {criterion.name!r} gave {form} where {size} scores were due",
            hint="the function must return a tensor with one score for each position or channel",
        )
    return _finite(scores.detach().double().cpu().numpy(), criterion)


def _finite(values: Vector, criterion: Criterion) -> Vector:
    if not np.isfinite(values).all():
        raise PruningError(
            f"importance {criterion.name!r} gave NaN or infinity", hint="check the weights, the data and the criterion"
        )
    return values


def _divide_by_savings(scores: Vector, groups: list[Group], cost: Callable[[Vector], float]) -> None:
    """Make scores those per share of the cost that removing a single literal of the group saves."""
    everything = np.ones(len(scores), dtype=bool)
    total = cost(everything)
    for group in groups:
        everything[group.literals[0]] = False
        saved = 1 - cost(everything) / total if total else 0.0
        everything[group.literals[0]] = True
        scores[group.literals] /= max(saved, 1e-12)


# -- normalization: the scores of a group at one place, made comparable -----------------------------------------------


def _by(statistic: Callable[[Vector], float]) -> Callable[[Vector], Vector]:
    def normalize(scores: Vector) -> Vector:
        size = statistic(np.abs(scores))
        return scores / size if size > 0 else scores

    return normalize


def _gaussian(scores: Vector) -> Vector:
    """The standard normal distribution function of the standardized scores: in (0, 1), a half for the mean."""
    spread = float(scores.std())
    standardized = torch.from_numpy((scores - scores.mean()) / (spread if spread > 0 else 1.0))
    return torch.special.ndtr(standardized).numpy()


def _lamp(scores: Vector) -> Vector:
    """The share of each score in the sum of those that are no smaller (Lee et al. 2021)."""
    order = np.argsort(scores, kind="stable")
    tail = np.cumsum(scores[order][::-1])[::-1]
    result = np.empty_like(scores)
    result[order] = scores[order] / np.where(tail > 0, tail, 1.0)
    return result


NORMALIZATIONS: dict[str, Callable[[Vector], Vector]] = {
    "mean": _by(np.mean),
    "max": _by(np.max),
    "sum": _by(np.sum),
    "gaussian": _gaussian,
    "lamp": _lamp,
    "cost": lambda scores: scores,  # divided after aggregation
    "none": lambda scores: scores,
}

# [places, literals] -> [literals]
AGGREGATIONS: dict[str, Callable[[Vector], Vector]] = {
    "mean": lambda scores: scores.mean(axis=0),
    "sum": lambda scores: scores.sum(axis=0),
    "max": lambda scores: scores.max(axis=0),
    "prod": lambda scores: scores.prod(axis=0),
}
