"""What a student can learn from a teacher, each a term of the loss (a mean over examples, weighted by the user).

`SoftLabels`  the teacher's probabilities at a temperature: T^2 KL(teacher || student) (Hinton et al. 2015, 1503.02531)
`Relations`   how classes and examples relate: 1 - Pearson's correlation of the probabilities, over the classes of each
              example (inter) and over the examples for each class (intra) (DIST, Huang et al. 2022, 2205.10536)
`Features`    the values of named nodes, through a learned 1x1 convolution or linear layer where the widths differ
              (FitNets, Romero et al. 2015, 1412.6550); here the squared error relative to the teacher's variance
`Matched`     the sums of residual branches of a pruned or quantized network, without adapters: those of its teacher
`Attention`   where the values of named nodes are large: squared distance of the normalized maps sum_c x_c^2 (Zagoruyko
              and Komodakis 2017, 1612.03928), for any widths
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import OptionError
from ..passes.prune.recovery.pairing import Positions, select
from ..passes.prune.recovery.refine import later_counts_more

Pairs = tuple[tuple[str, str], ...]
_SMALLEST = 1e-8


class Seen(NamedTuple):
    """What one model gave for a batch: its scores [N, classes, ...] and the values of named nodes, in float32.

    `channels` says which dimension of a value holds its channels, where the graph says it (layout.py).
    """

    scores: torch.Tensor
    features: dict[str, torch.Tensor]
    channels: Mapping[str, int | None] = MappingProxyType({})

    def is_map(self, name: str) -> bool:
        """Is a value [N, C, places...], and not [N, tokens..., C]? Of three dimensions only where the graph says so, of
        more unless it says otherwise."""
        dims, channels = self.features[name].ndim, self.channels.get(name)
        return channels == 1 if dims == 3 else dims > 3 and channels != dims - 1


class Term(Protocol):
    """One term. `pairs` are the (student, teacher) names of nodes or modules that it compares."""

    @property
    def weight(self) -> float: ...

    @property
    def pairs(self) -> Pairs: ...

    def adapters(self, student: Seen, teacher: Seen) -> list[nn.Module]:
        """The layers to be trained with the student, for values like these."""

    def __call__(self, student: Seen, teacher: Seen, adapters: Sequence[nn.Module]) -> torch.Tensor:
        """The term, a scalar."""


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's probabilities at a temperature (Hinton et al. 2015)."""

    weight: float = 0.9
    temperature: float = 4.0
    pairs: ClassVar[Pairs] = ()

    def __post_init__(self) -> None:
        _require_temperature(self.temperature)

    def adapters(self, student: Seen, teacher: Seen) -> list[nn.Module]:
        _require_classes(student, teacher)
        return []

    def __call__(self, student: Seen, teacher: Seen, adapters: Sequence[nn.Module]) -> torch.Tensor:
        mine, theirs = (F.log_softmax(s.scores / self.temperature, 1) for s in (student, teacher))
        return (theirs.exp() * (theirs - mine)).sum(1).mean() * self.temperature**2


@dataclass(frozen=True)
class Relations:
    """Correlation of the probabilities over classes (`inter`) and over examples (`intra`): DIST (Huang et al. 2022)."""

    weight: float = 1.0
    inter: float = 1.0
    intra: float = 1.0
    temperature: float = 4.0
    pairs: ClassVar[Pairs] = ()

    def __post_init__(self) -> None:
        _require_temperature(self.temperature)

    def adapters(self, student: Seen, teacher: Seen) -> list[nn.Module]:
        _require_classes(student, teacher)
        return []

    def __call__(self, student: Seen, teacher: Seen, adapters: Sequence[nn.Module]) -> torch.Tensor:
        mine, theirs = (_rows(F.softmax(s.scores / self.temperature, 1)) for s in (student, teacher))
        classes = 1 - correlation(mine, theirs).mean()
        examples = 1 - correlation(mine.t(), theirs.t()).mean()
        return (self.inter * classes + self.intra * examples) * self.temperature**2


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of each row of a [n, m] with that of b: [n]."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=_SMALLEST)


def _rows(probabilities: torch.Tensor) -> torch.Tensor:
    """[N, classes, ...] -> [N * ..., classes]"""
    return probabilities.movedim(1, -1).flatten(0, -2)


@dataclass(frozen=True)
class Features:
    """The values of named nodes, adapted where the widths differ (FitNets, Romero et al. 2015)."""

    pairs: Pairs
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require_pairs(self.pairs)

    def adapters(self, student: Seen, teacher: Seen) -> list[nn.Module]:
        return [_adapter(student.features[s], teacher.features[t], student.is_map(s)) for s, t in self.pairs]

    def __call__(self, student: Seen, teacher: Seen, adapters: Sequence[nn.Module]) -> torch.Tensor:
        losses = []
        for (s, t), adapter in zip(self.pairs, adapters):
            mine, theirs = _same_size(adapter(student.features[s]), teacher.features[t], student.is_map(s))
            losses.append(_relative(mine, theirs))
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Matched:
    """The values of nodes that student and teacher have in common, and their scores, by squared error relative to the
    teacher's variance (docstring of passes/prune/recovery/refine.py). `matched_values` (matching.py) finds the nodes.

    `pairs` are in graph order: the i-th weighs i. `kept`: which positions of the teacher's values the student has, by
    the teacher's names. `scores`: what the error of the scores weighs beside the mean error of the nodes.
    """

    pairs: Pairs
    kept: Mapping[str, Positions]
    weight: float = 1.0
    scores: float = 0.05

    def adapters(self, student: Seen, teacher: Seen) -> list[nn.Module]:
        return []

    def __call__(self, student: Seen, teacher: Seen, adapters: Sequence[nn.Module]) -> torch.Tensor:
        losses = [
            _relative(student.features[s], select(teacher.features[t], self.kept.get(t, {}))) for s, t in self.pairs
        ]
        scores = self.scores * _relative(student.scores, teacher.scores)
        return later_counts_more(losses) + scores


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (mine - theirs).square().mean() / theirs.var().clamp_min(_SMALLEST)


@dataclass(frozen=True)
class Attention:
    """Where the values of named nodes are large, at which places of maps [N, C, H, W] or in which of tokens
    [N, tokens, C] (Zagoruyko and Komodakis 2017)."""

    pairs: Pairs
    weight: float = 1.0

    def __post_init__(self) -> None:
        _require_pairs(self.pairs)

    def adapters(self, student: Seen, teacher: Seen) -> list[nn.Module]:
        for s, t in self.pairs:
            for name, value in ((s, student.features[s]), (t, teacher.features[t])):
                if value.ndim < 3:
                    raise OptionError(f"{name} has no places to attend to: {list(value.shape)}", hint="name a map")
            tokens = [seen.features[n].shape[1:-1] for seen, n in ((student, s), (teacher, t))]
            if not student.is_map(s) and tokens[0] != tokens[1]:
                raise OptionError(f"{s} and {t} attend to different numbers of places", hint="pair values of one size")
        return []

    def __call__(self, student: Seen, teacher: Seen, adapters: Sequence[nn.Module]) -> torch.Tensor:
        losses = []
        for s, t in self.pairs:
            mine, theirs = student.features[s], teacher.features[t]
            if student.is_map(s):
                mine, theirs = _same_size(mine, theirs, is_map=True)
            else:
                mine, theirs = mine.movedim(-1, 1), theirs.movedim(-1, 1)
            losses.append((attention_map(mine) - attention_map(theirs)).square().sum(1).mean())
        return torch.stack(losses).mean()


def attention_map(values: torch.Tensor) -> torch.Tensor:
    """[N, C, places...] -> the mean square over channels, of length 1 for each example: [N, places]."""
    return F.normalize(values.square().mean(1).flatten(1), dim=1)


# -- sizes ---------------------------------------------------------------------------------------------------------


def _adapter(mine: torch.Tensor, theirs: torch.Tensor, is_map: bool) -> nn.Module:
    """From the student's width to the teacher's: channels of maps [N, C, ...], features of rows and tokens [..., C]."""
    if mine.ndim != theirs.ndim:
        raise OptionError(
            f"a value of shape {list(mine.shape)} cannot be led to one of shape {list(theirs.shape)}",
            hint="pair nodes of as many dimensions",
        )
    axis = 1 if is_map else -1
    inputs, outputs = mine.shape[axis], theirs.shape[axis]
    if not is_map and mine.shape[:-1] != theirs.shape[:-1]:
        raise OptionError(
            f"features of shape {list(mine.shape)} cannot be led to {list(theirs.shape)}: they differ in more than the "
            "last dimension",
            hint="pair nodes with as many tokens",
        )
    if inputs == outputs:
        return nn.Identity()
    return _POINTWISE[mine.ndim](inputs, outputs, 1) if is_map else nn.Linear(inputs, outputs)


_POINTWISE = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_AVERAGED = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


def _same_size(mine: torch.Tensor, theirs: torch.Tensor, is_map: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps at the smaller size in each direction, the larger one averaged."""
    if not is_map or mine.ndim != theirs.ndim or mine.shape[2:] == theirs.shape[2:]:
        return mine, theirs
    size = [min(a, b) for a, b in zip(mine.shape[2:], theirs.shape[2:])]
    return _AVERAGED[mine.ndim](mine, size), _AVERAGED[mine.ndim](theirs, size)  # type: ignore[operator]


def _require_temperature(value: float) -> None:
    if not value > 0:
        raise OptionError(f"the temperature is {value!r}", hint="give a positive number, such as 4")


def _require_classes(student: Seen, teacher: Seen) -> None:
    """Raise OptionError for scores of one class: their softmax is 1 whatever the network says."""
    for seen in (student, teacher):
        if seen.scores.ndim < 2 or seen.scores.shape[1] < 2:
            raise OptionError(
                f"scores of shape {list(seen.scores.shape)} tell no classes apart: there is nothing to learn from them",
                hint="give Features, matched_values or an objective of your own",
            )


def _require_pairs(pairs: Pairs) -> None:
    if not pairs or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise OptionError(f"pairs are {pairs!r}", hint='give (student, teacher) names: (("layer1", "layer1"),)')
