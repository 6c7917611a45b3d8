"""Penalties that make what will be pruned small before it goes, so that less is lost with it.

    GrowingPenalty    loss + growth(step) / 2 * sum of the squares of all weights that a plan removes
    GroupLasso        loss + strength * sum over channels of sqrt(n) * norm of the channel's n weights in all layers

`GrowingPenalty` is GReg-1 of Wang et al. 2021 ("Neural Pruning via Growing Regularization", arXiv 2012.09243): the plan
says what goes, and its penalty grows until it is gone. `GroupLasso` (Yuan and Lin 2006; on channels Wen et al. 2016; on
coupled layers Fang et al. 2023, "DepGraph") leaves open which channels of a group will shrink: plan afterwards.
A channel is what a group of `fxpress inspect` counts: it goes from all layers at once. Both are objectives for `train`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import PruningError
from ..frontend.program import Program
from ..passes.prune.groups import find_groups, places
from ..passes.prune.plan import PruningPlan
from ..passes.prune.rules.table import analyze
from .objectives import Batch, CrossEntropy, Objective, reads_labels, tells_classes
from .schedules import require

_SMALLEST = 1e-12  # the slope of a norm is infinite at zero


class GrowingPenalty:
    """An objective with a growing penalty on what `plan` removes: by `growth` every `every` steps, up to `ceiling`."""

    def __init__(
        self,
        program: Program,
        plan: PruningPlan,
        objective: Objective | None = None,
        *,
        growth: float = 1e-2,
        every: int = 1,
        ceiling: float = 1.0,
    ) -> None:
        require("growth", growth, growth > 0, "a positive number")
        require("every", every, every >= 1, "a number of steps")
        require("ceiling", ceiling, ceiling > 0, "a positive number")
        self.objective = objective or CrossEntropy()
        self.reads_labels = reads_labels(objective)
        self.growth, self.every, self.ceiling = growth, every, ceiling
        self.removed = removed_weights(program, plan)

    @property
    def tells_classes(self) -> bool:
        """As the objective inside."""
        return tells_classes(self.objective)

    def factor(self, step: int) -> float:
        """The factor of the penalty at a step."""
        return min(self.growth * (step // self.every + 1), self.ceiling)

    def __call__(self, program: Program, batch: Batch) -> torch.Tensor:
        weights = dict(program.named_parameters())
        terms = [(weights[n] * mask.to(weights[n].device)).square().sum() for n, mask in self.removed.items()]
        return self.objective(program, batch) + self.factor(batch.step) / 2 * torch.stack(terms).sum()


def removed_weights(program: Program, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Parameter name -> mask of the weights that `plan` removes or zeroes, as numbers 0 and 1.

    Raises PruningError where the plan is not for this program, or removes nothing.
    """
    weights = {n: p for n, p in program.named_parameters() if p.is_floating_point()}
    masks: dict[str, torch.Tensor] = {}
    for removal in plan.removals:
        if removal.name in weights:
            if weights[removal.name].shape[removal.dim] != removal.size:
                raise PruningError(f"the plan is not for this program: {removal.place}", hint="make it for this one")
            mask = masks.setdefault(removal.name, torch.zeros_like(weights[removal.name], requires_grad=False))
            mask.index_fill_(removal.dim, torch.tensor(removal.removed), 1.0)
    for sparse in plan.masks:
        if sparse.name in weights:
            zeros = torch.from_numpy(~sparse.kept).to(weights[sparse.name])
            masks[sparse.name] = torch.maximum(masks[sparse.name], zeros) if sparse.name in masks else zeros
    for name in {name for block in plan.blocks for name in block.tensors} & weights.keys():
        masks[name] = torch.ones_like(weights[name], requires_grad=False)
    if not masks:
        raise PruningError("the plan removes nothing that is trained", hint="ask for a smaller share")
    return masks


@dataclass(frozen=True)
class _Rows:
    """Dimension `dim` of the parameter `name`: its positions, each with a channel's number (a position of a product
    comes once for each factor)."""

    name: str
    dim: int
    positions: torch.Tensor
    channels: torch.Tensor


class GroupLasso:
    """An objective with the group lasso over all channels of `program` that could be pruned."""

    def __init__(self, program: Program, objective: Objective | None = None, *, strength: float = 1e-4) -> None:
        require("strength", strength, strength > 0, "a positive number")
        self.objective, self.strength = objective or CrossEntropy(), strength
        self.reads_labels = reads_labels(objective)
        self.rows, count = _rows(program)
        weights = dict(program.named_parameters())
        sizes = torch.zeros(count)
        for row in self.rows:
            weight = weights[row.name]
            each = weight.numel() / weight.shape[row.dim]
            sizes.index_add_(0, row.channels, torch.full((len(row.channels),), each))
        self.scale = sizes.sqrt()

    @property
    def tells_classes(self) -> bool:
        """As the objective inside."""
        return tells_classes(self.objective)

    def __call__(self, program: Program, batch: Batch) -> torch.Tensor:
        norms = self.norms(program)
        return self.objective(program, batch) + self.strength * (self.scale.to(norms.device) * norms).sum()

    def norms(self, program: Program) -> torch.Tensor:
        """The norm of each channel's weights in all layers, with gradients."""
        weights = dict(program.named_parameters())
        device = weights[self.rows[0].name].device
        squares = torch.zeros(len(self.scale), device=device)
        for row in self.rows:
            weight = weights[row.name]
            others = tuple(d for d in range(weight.ndim) if d != row.dim)
            by_position = weight.float().square().sum(others) if others else weight.float().square()
            values = by_position[row.positions.to(device)]
            squares = squares.index_add(0, row.channels.to(device), values)
        return (squares + _SMALLEST).sqrt()


def _rows(program: Program) -> tuple[list[_Rows], int]:
    """Where the prunable channels lie, and how many there are. Raises PruningError where there are none."""
    analysis = analyze(program)
    groups = find_groups(analysis)
    if not groups:
        raise PruningError("nothing in this program can be pruned", hint="`fxpress inspect` says what is pinned")
    literals = np.concatenate([g.literals for g in groups])
    number = np.full(analysis.atoms.count, -1, dtype=np.int64)
    number[literals] = np.arange(len(literals))
    weights = {n for n, p in program.named_parameters() if p.is_floating_point()}
    rows = []
    for place, vector in places(analysis):
        if place.name not in weights:
            continue
        channels = number[analysis.atoms.resolve(vector)]
        slots, positions = np.nonzero(channels >= 0)
        if len(positions):
            found = torch.from_numpy(channels[slots, positions])
            rows.append(_Rows(place.name, place.dim, torch.from_numpy(positions), found))
    return rows, len(literals)
