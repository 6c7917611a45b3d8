"""Ridge regression from streamed moments: memory does not grow with the number of rows.

For rows x (features), targets r (outputs), the sums of x x^T, x r and r^2 over all rows say everything. The correction

    D = argmin  sum |r - x D - d|^2  +  n * ridge * s * |D|^2          s = mean squared feature (variance, with shift d)

comes from the normal equations in float64. Where no ridge is given, each output gets that of a grid that does best on
rows that took no part, none at all (D = 0) included; then everything is used to fit with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGES = (1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_CHUNK = 2**22  # values that are widened to float64 at a time


class Moments:
    """The sums over rows, for each group: of the rows with a 1 appended, and of their products with the targets."""

    def __init__(self, groups: int, features: int, outputs: int) -> None:
        self.count = 0
        self.gram = torch.zeros(groups, features + 1, features + 1, dtype=torch.float64)
        self.cross = torch.zeros(groups, features + 1, outputs, dtype=torch.float64)
        self.energy = torch.zeros(groups, outputs, dtype=torch.float64)

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """`rows` [groups, n, features], `targets` [groups, n, outputs], any float dtype."""
        size = max(1, _CHUNK // (rows.shape[0] * rows.shape[2]))
        for x, r in zip(rows.split(size, dim=1), targets.split(size, dim=1)):
            x = torch.cat([x.double(), x.new_ones(*x.shape[:2], 1, dtype=torch.float64)], dim=2)
            r, turned = r.double(), x.transpose(1, 2)
            self.gram += turned @ x
            self.cross += turned @ r
            self.energy += r.square().sum(1)
        self.count += rows.shape[1]

    def __add__(self, other: Moments) -> Moments:
        groups, width, outputs = self.cross.shape
        total = Moments(groups, width - 1, outputs)
        total.count = self.count + other.count
        for name in ("gram", "cross", "energy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def error(self, solution: torch.Tensor) -> torch.Tensor:
        """What `solution` [groups, features + 1, outputs] leaves of the sum of squares, [groups, outputs]."""
        explained = (solution * (2 * self.cross - self.gram @ solution)).sum(1)
        return (self.energy - explained).clamp_min(0)


@dataclass(frozen=True)
class Correction:
    """`matrix` [groups, features, outputs] and `shift` [groups, outputs] to add; mean squares before and after."""

    matrix: torch.Tensor
    shift: torch.Tensor
    before: float
    after: float


def solve(fit: Moments, held: Moments | None, ridge: float | None, shift: bool) -> Correction:
    """The correction. `held`: rows apart by which to choose where `ridge` is None; without `shift`, d = 0."""
    everything = fit if held is None else fit + held
    if ridge is not None or held is None:
        solution = _ridge_solution(everything, 1e-3 if ridge is None else ridge, shift)
    else:
        choice = _best(fit, held, shift)
        solution = torch.zeros_like(everything.cross)
        for number in range(len(RIDGES)):
            chosen = (choice == number)[:, None]
            if chosen.any():
                solution = torch.where(chosen, _ridge_solution(everything, RIDGES[number], shift), solution)
    total = max(everything.count, 1)
    after = float(everything.error(solution).sum()) / total
    return Correction(solution[:, :-1], solution[:, -1], float(everything.energy.sum()) / total, after)


def _best(fit: Moments, held: Moments, shift: bool) -> torch.Tensor:
    """For each output the number of the ridge with the least held-out error; -1 where none beats no correction."""
    errors = torch.stack([held.error(_ridge_solution(fit, r, shift)) for r in RIDGES])
    best = errors.min(0)
    return torch.where(best.values < held.energy, best.indices, -1)


def _ridge_solution(moments: Moments, ridge: float, shift: bool) -> torch.Tensor:
    """[groups, features + 1, outputs]; the last feature is the shift, which is not shrunk."""
    gram, cross, n = moments.gram[:, :-1, :-1], moments.cross[:, :-1], max(moments.count, 1)
    sums = moments.gram[:, :-1, -1:] / n
    means = moments.cross[:, -1:] / n
    if shift:
        gram, cross = gram - n * sums * sums.transpose(1, 2), cross - n * sums * means
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # A group whose inputs never change has nothing to fit: any ridge gives 0 there.
    scale = torch.where(diagonal.mean(1) > 0, diagonal.mean(1), 1.0)
    damped = gram + torch.diag_embed((ridge * scale)[:, None].expand(diagonal.shape))
    factor, failed = torch.linalg.cholesky_ex(damped)
    matrix = torch.cholesky_solve(cross, factor)
    matrix = torch.where((failed == 0)[:, None, None] & torch.isfinite(matrix), matrix, 0.0)
    rest = means - sums.transpose(1, 2) @ matrix if shift else torch.zeros_like(means)
    return torch.cat([matrix, rest], dim=1)
