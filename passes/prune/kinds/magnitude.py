"""Which single weights become zero: the smallest of the network or of each layer, or of every m neighbours.

    unstructured   those below a threshold, or the smallest share (Han et al. 2015)
    n:m            all but the n largest of every m along the input dimension (Mishra et al. 2021)

The score of a weight is |w| (l1), w**2 (l2: the same order, but a threshold is compared with the square), a random
number, or LAMP, which makes layers comparable: w**2 over the sum of the layer's squares that are not smaller (Lee et
al. 2021).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch

from ....errors import OptionError, PruningError
from ....frontend.program import Program, get_attribute
from .sparsify import SparseMask
from .weight_uses import WeightUse

Score = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _l1(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return weights.abs()


def _l2(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return weights.square()


def _random(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(weights.shape, generator=generator)


def _lamp(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    squares = weights.double().square().ravel()
    order = squares.argsort(stable=True)
    not_smaller = squares[order].flip(0).cumsum(0).flip(0)
    result = torch.empty_like(squares)
    result[order] = squares[order] / not_smaller.clamp_min(1e-300)
    return result.float().reshape(weights.shape)


SCORES: dict[str, Score] = {"l1": _l1, "l2": _l2, "lamp": _lamp, "random": _random}


def weight_scores(program: Program, names: Iterable[str], importance: str, seed: int) -> dict[str, torch.Tensor]:
    """The score of every value of these parameters. Raises OptionError (importance), PruningError (NaN, infinity)."""
    if importance not in SCORES:
        raise OptionError(
            f"importance {importance!r} does not score single weights", hint=f"choose one of {', '.join(SCORES)}"
        )
    generator, scores = torch.Generator().manual_seed(seed), {}
    for name in names:
        weights = get_attribute(program.graph_module, name).detach().float().cpu()
        if not torch.isfinite(weights).all():
            raise PruningError(f"{name} holds NaN or infinity", hint="check how the weights were loaded or trained")
        scores[name] = SCORES[importance](weights, generator)
    return scores


# -- unstructured -------------------------------------------------------------------------------------------------


def smallest_share(scores: dict[str, torch.Tensor], ratio: float, max_ratio: float | None) -> list[SparseMask]:
    """Exactly the share `ratio` of all weights goes, but at most `max_ratio` of any parameter, and never all of one.

    Raises PruningError where `max_ratio` leaves too few weights to remove.
    """
    limited = {name: _protected(s, max_ratio) for name, s in scores.items()}
    joined = torch.cat([s.ravel() for s in limited.values()])
    count = round(ratio * joined.numel())
    possible = int(torch.isfinite(joined).sum())
    if count > possible:
        raise PruningError(
            f"ratio={ratio:g} would remove {count:,} of {joined.numel():,} weights, {possible:,} may go",
            hint="lower ratio or raise max_ratio; one weight of every parameter stays",
        )
    kept = ~_smallest(joined, count)
    parts = kept.split([s.numel() for s in limited.values()])
    return [_mask(name, part.reshape(scores[name].shape)) for name, part in zip(scores, parts)]


def below_threshold(scores: dict[str, torch.Tensor], threshold: float, max_ratio: float | None) -> list[SparseMask]:
    """Weights with a score below `threshold` go, but at most `max_ratio` of any parameter, and never all of one."""
    return [_mask(name, _protected(s, max_ratio) >= threshold) for name, s in scores.items()]


def _protected(scores: torch.Tensor, max_ratio: float | None) -> torch.Tensor:
    """Scores in which the largest values that must stay are infinite."""
    least = 1 if max_ratio is None else max(1, math.ceil((1 - max_ratio) * scores.numel() - 1e-9))
    flat = scores.ravel()
    return torch.where(_smallest(flat, flat.numel() - least), flat, torch.inf).reshape(scores.shape)


def _smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Marks exactly `count` of the values, none larger than the others; of equal ones the first."""
    if count == 0:
        return torch.zeros(values.shape, dtype=torch.bool)
    limit = values.kthvalue(count).values
    marked = values < limit
    equal = torch.nonzero(values == limit).ravel()
    marked[equal[: count - int(marked.sum())]] = True
    return marked


def _mask(name: str, kept: torch.Tensor) -> SparseMask:
    return SparseMask.of(name, kept.numpy())


# -- n:m ----------------------------------------------------------------------------------------------------------


def parse_pattern(pattern: object) -> tuple[int, int]:
    """ "2:4" -> (2, 4). Raises OptionError."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    n, m = map(int, match.groups()) if match else (0, 0)
    if not 0 < n < m:
        raise OptionError(f"pattern is {pattern!r}", hint='give "n:m" with 0 < n < m, such as "2:4"')
    return n, m


def n_of_m(scores: dict[str, torch.Tensor], uses: Iterable[WeightUse], n: int, m: int) -> tuple[list[SparseMask], str]:
    """Of every m neighbours along the input dimension the n largest stay. Also a note on what stays dense, or ""."""
    dims: dict[str, int | None] = {}
    for use in uses:
        dims.setdefault(use.name, use.inputs)
    masks, dense = [], []
    for name, score in scores.items():
        dim = dims[name]
        if dim is None or score.shape[dim] % m:
            size = "unknown" if dim is None else str(score.shape[dim])
            dense.append(f"{name} ({size})")
            continue
        masks.append(_mask(name, _largest(score.movedim(dim, -1), n, m).movedim(-1, dim)))
    return masks, _dense_note(dense, m)


def _largest(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    parts = scores.reshape(-1, m)
    kept = torch.zeros(parts.shape, dtype=torch.bool)
    kept.scatter_(1, parts.argsort(dim=1, descending=True, stable=True)[:, :n], True)
    return kept.reshape(scores.shape)


def _dense_note(dense: list[str], m: int) -> str:
    if not dense:
        return ""
    more = f" and {len(dense) - 4} more" if len(dense) > 4 else ""
    return f"dense stay parameters whose input dimension is no multiple of {m}: {', '.join(dense[:4])}{more}"
