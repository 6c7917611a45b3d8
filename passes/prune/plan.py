"""`PruningPlan`: which indices of which parameter dimensions of the original model go. Kept as JSON, replayed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import OutputError, PruningError
from ...frontend.program import Program
from .analysis import Analysis
from .axes import FIXED, Vector
from .groups import Place, places
from .masking import mask_program
from .rules import analyze
from .slicing import Cut, slice_program

_FORMAT = "fxpress-pruning-plan"
_VERSION = 1


@dataclass(frozen=True)
class Removal:
    """What goes from one parameter dimension: `removed` are indices into its original `size`."""

    name: str
    dim: int
    size: int
    removed: tuple[int, ...]


@dataclass(frozen=True)
class GroupSummary:
    """One group in a plan: how many of its literals are kept, and where it occurs ("conv1.weight[0]")."""

    size: int
    kept: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class PruningPlan:
    """The indices to remove, and the figures of the plan. `macs` and `parameters` are (before, after).

    A plan belongs to a model, not to its weights: `apply` works on any checkpoint of the same architecture.
    """

    removals: tuple[Removal, ...]
    groups: tuple[GroupSummary, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    request: str = ""
    notes: tuple[str, ...] = field(default=())

    def apply(self, program: Program) -> Program:
        """A new, smaller program. Raises PruningError where the plan does not fit `program`, which is not changed."""
        copy = program.copy()
        slice_program(self._cut(copy))
        return copy

    def mask(self, program: Program) -> Program:
        """A new program of the original sizes, removed positions zeroed at every consumer: what `apply` must equal."""
        copy = program.copy()
        mask_program(self._cut(copy))
        return copy

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Raises OutputError."""
        data = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        try:
            Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}", hint="choose a path that you may write to"
            ) from error

    @staticmethod
    def load(path: str | Path) -> PruningPlan:
        """Read what `save` wrote. Raises PruningError for anything else."""
        try:
            return _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PruningError(
                f"{path} is not a pruning plan: {type(error).__name__}: {error}",
                hint="give a file that PruningPlan.save wrote",
            ) from error

    def __repr__(self) -> str:
        rows = [f"  {g.kept:>5} of {g.size:<5} {_shortened(g.places)}" for g in self.groups]
        head = f"PruningPlan({self.request}): MACs {_share(self.macs)}, parameters {_share(self.parameters)}"
        notes = [f"  note: {n}" for n in self.notes]
        return "\n".join([head, f"  kept of size   {len(self.groups)} groups", *rows, *notes])

    def _cut(self, program: Program) -> Cut:
        """Find the literals whose removal gives exactly the planned indices."""
        analysis = analyze(program)
        return Cut(analysis, _kept_atoms(self.removals, analysis))


# -- between indices and literals ---------------------------------------------------------------------------------


def _kept_atoms(removals: Iterable[Removal], analysis: Analysis) -> Vector:
    """Mask over atoms. A literal goes when all positions that need it go; then the indices must come out as planned."""
    masks = {Place(r.name, r.dim): _planned_mask(r, analysis) for r in removals}
    needed = np.zeros(analysis.atoms.count, dtype=bool)
    occurs = np.zeros(analysis.atoms.count, dtype=bool)
    slots = {place: analysis.atoms.resolve(vector) for place, vector in places(analysis)}
    for place, matrix in slots.items():
        occurs[matrix] = True
        needed[matrix[:, masks[place]] if place in masks else matrix] = True
    keep = needed | ~occurs
    keep[FIXED] = True
    for place, matrix in slots.items():
        wanted = masks.get(place, np.ones(matrix.shape[1], dtype=bool))
        pinned = analysis.atoms.pinned(matrix).all(axis=0)
        if not np.array_equal(keep[matrix].all(axis=0), wanted) or not wanted[pinned].all():
            raise PruningError(
                f"the plan does not fit this model: its indices for {place} contradict those for coupled layers",
                hint="plans only fit the architecture (and the stage of the pipeline) that they were made for",
            )
    return keep


def _planned_mask(removal: Removal, analysis: Analysis) -> Vector:
    axes = analysis.tensors.get(removal.name)
    if axes is None or not 0 <= removal.dim < len(axes):
        raise PruningError(
            f"the plan removes indices of {removal.name}[{removal.dim}], which this model does not have",
            hint="plans only fit the architecture (and the stage of the pipeline) that they were made for",
        )
    if len(axes[removal.dim]) != removal.size or not all(0 <= i < removal.size for i in removal.removed):
        raise PruningError(
            f"the plan was made for size {removal.size} of {removal.name}[{removal.dim}], here it is "
            f"{len(axes[removal.dim])}",
            hint="apply the plan to the unpruned model",
        )
    mask = np.ones(removal.size, dtype=bool)
    mask[list(removal.removed)] = False
    return mask


# -- text and JSON ------------------------------------------------------------------------------------------------


def _share(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} -> {pair[1]:,} ({pair[1] / max(pair[0], 1):.1%})"


def _shortened(names: tuple[str, ...], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")


def _from_json(data: dict[str, Any]) -> PruningPlan:
    if data["format"] != _FORMAT or data["version"] != _VERSION:
        raise ValueError(f"format {data['format']!r} version {data['version']!r}; readable is {_FORMAT!r} {_VERSION}")
    return PruningPlan(
        removals=tuple(_removal(r) for r in data["removals"]),
        groups=tuple(GroupSummary(g["size"], g["kept"], tuple(g["places"])) for g in data["groups"]),
        macs=tuple(data["macs"]),
        parameters=tuple(data["parameters"]),
        request=str(data["request"]),
        notes=tuple(data["notes"]),
    )


def _removal(data: dict[str, Any]) -> Removal:
    name, dim, size, removed = data["name"], data["dim"], data["size"], data["removed"]
    if not isinstance(name, str) or not all(isinstance(n, int) for n in (dim, size, *removed)):
        raise ValueError(f"a removal is malformed: {str(data)[:80]}")
    return Removal(name, dim, size, tuple(removed))
