"""Importances that read only weights. Each gives one score for each slice of a parameter along the pruned dimension."""

from __future__ import annotations

import torch

from .criteria import Criterion, Slices

_OTHERS = 2048  # distances are taken to at most so many other slices, evenly spaced


def l1(slices: Slices) -> torch.Tensor:
    """Sum of magnitudes (Li et al. 2017, Pruning Filters for Efficient ConvNets)."""
    return slices.values.abs().sum(dim=1)


def l2(slices: Slices) -> torch.Tensor:
    """Euclidean norm (Li et al. 2017; over coupled layers: Fang et al. 2023, DepGraph)."""
    return slices.values.square().sum(dim=1).sqrt()


def squares(slices: Slices) -> torch.Tensor:
    """Share of the squared norm among the slices that are no smaller (LAMP, Lee et al. 2021).

    As in DepGraph (Fang et al. 2023) whole slices take the place of single weights. This gives the squares; the shares
    are the normalization `lamp`.
    """
    return slices.values.square().sum(dim=1)


def geometric_median(slices: Slices) -> torch.Tensor:
    """Sum of distances to the other slices: what lies in their midst can be replaced (FPGM, He et al. 2019)."""
    values = slices.values
    others = values[:: max(1, -(-len(values) // _OTHERS))]
    return torch.cat([torch.cdist(part, others).sum(dim=1) for part in values.split(_OTHERS)])


def random(slices: Slices) -> torch.Tensor:
    """A random number: what every other criterion has to beat."""
    return torch.from_numpy(slices.generator.random(len(slices.values)))


def norm_scale(slices: Slices) -> torch.Tensor:
    """Magnitude of the scale of the channel's BatchNorm (Network Slimming, Liu et al. 2017)."""
    return slices.values.abs().sum(dim=1)


WEIGHT_CRITERIA = (
    Criterion("l1", l1),
    Criterion("l2", l2),
    Criterion("bn-scale", norm_scale, reads="norms"),
    Criterion("fpgm", geometric_median),
    Criterion("lamp", squares, normalize="lamp"),
    Criterion("random", random),
)
