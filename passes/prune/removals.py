"""What is removed, as indices of parameter dimensions: how a plan keeps it, how it fits a program, how two compose."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ...errors import PruningError
from .analysis import Analysis
from .axes import FIXED, Vector
from .groups import Place, places

_OTHER_MODEL = "plans only fit the architecture (and the stage of the pipeline) that they were made for"


@dataclass(frozen=True)
class Removal:
    """What goes from one parameter dimension: `removed` are indices into its original `size`."""

    name: str
    dim: int
    size: int
    removed: tuple[int, ...]

    @property
    def place(self) -> Place:
        """The dimension as a Place."""
        return Place(self.name, self.dim)

    @property
    def mask(self) -> Vector:
        """One bool for each original index: is it kept? Raises PruningError for indices outside the size."""
        if not all(0 <= i < self.size for i in self.removed):
            raise PruningError(
                f"the plan removes indices of {self.place} outside its size {self.size}", hint=_OTHER_MODEL
            )
        mask = np.ones(self.size, dtype=bool)
        mask[list(self.removed)] = False
        return mask


@dataclass(frozen=True)
class GroupSummary:
    """One group in a plan: how many of its literals are kept, and where it occurs ("conv1.weight[0]")."""

    size: int
    kept: int
    places: tuple[str, ...]


# -- between indices and literals ---------------------------------------------------------------------------------


def kept_atoms(removals: Iterable[Removal], analysis: Analysis) -> Vector:
    """Mask over atoms. A literal goes when all positions that need it go; then the indices must come out as planned.

    Raises PruningError where the removals do not fit the program of `analysis`.
    """
    masks = {r.place: _planned_mask(r, analysis) for r in removals}
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
                hint=_OTHER_MODEL,
            )
    return keep


def _planned_mask(removal: Removal, analysis: Analysis) -> Vector:
    axes = analysis.tensors.get(removal.name)
    if axes is None or not 0 <= removal.dim < len(axes):
        raise PruningError(
            f"the plan removes indices of {removal.place}, which this model does not have", hint=_OTHER_MODEL
        )
    if len(axes[removal.dim]) != removal.size:
        raise PruningError(
            f"the plan was made for size {removal.size} of {removal.place}, here it is {len(axes[removal.dim])}",
            hint="apply the plan to the unpruned model",
        )
    return removal.mask


# -- one after the other ------------------------------------------------------------------------------------------


def compose_removals(first: Iterable[Removal], later: Iterable[Removal]) -> tuple[Removal, ...]:
    """Both as one: the indices of `later` count what `first` left, those of the result the original positions.

    Raises PruningError where `later` was not made for what `first` leaves.
    """
    result = {r.place: r for r in first}
    for removal in later:
        earlier = result.get(removal.place)
        result[removal.place] = removal if earlier is None else _composed(earlier, removal)
    return tuple(result.values())


def _composed(first: Removal, later: Removal) -> Removal:
    original = np.flatnonzero(first.mask)
    if later.size != len(original):
        raise PruningError(
            f"the plans do not follow one another: the first leaves {len(original)} of {first.size} indices of "
            f"{first.place}, the second was made for {later.size}",
            hint="make the later plan for plan.apply(program)",
        )
    both = (*first.removed, *original[~later.mask].tolist())
    return replace(first, removed=tuple(sorted(both)))


def compose_groups(first: Iterable[GroupSummary], later: Iterable[GroupSummary]) -> tuple[GroupSummary, ...]:
    """The groups of `first` with what `later` keeps of them, then the groups that only `later` has.

    Groups are the same where they share most places and their sizes follow one another.
    """
    open_groups = list(later)
    result = []
    for group in first:
        candidates = [g for g in open_groups if g.size == group.kept and set(g.places) & set(group.places)]
        follower = max(candidates, key=lambda g: len(set(g.places) & set(group.places)), default=None)
        if follower is not None:
            open_groups.remove(follower)
        result.append(replace(group, kept=follower.kept) if follower else group)
    return (*result, *open_groups)


def without_parameters(groups: Iterable[GroupSummary], gone: Collection[str]) -> tuple[GroupSummary, ...]:
    """The groups without places in parameters that are gone as a whole."""
    left = [replace(g, places=tuple(p for p in g.places if p.rpartition("[")[0] not in gone)) for g in groups]
    return tuple(g for g in left if g.places)
