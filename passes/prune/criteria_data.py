"""Importances that look at what the network does with data."""

from __future__ import annotations

import torch

from .criteria import Activations, Contributions, Criterion, Moments

_RIDGE = 1e-4  # least share of a channel that is taken to be its own


def wanda(seen: Activations) -> torch.Tensor:
    """|W| times |X|, summed over the consumer's column (Wanda, Sun et al. 2024, structured)."""
    return seen.norms * seen.weights


def reconstruction(seen: Contributions) -> torch.Tensor:
    """Relative squared error of each consumer's output without the channel (ThiNet, Luo et al. 2017)."""
    return seen.energy


def compensated(seen: Moments) -> torch.Tensor:
    """The same error after the consumer's weights and bias took over what other channels can explain.

    The share of a channel's values that no linear combination of the others (and a constant) gives is
    1 / (C^-1)_ii / E x_i^2 with their covariance C, as in Optimal Brain Surgeon (Hassibi and Stork 1993) and SparseGPT
    (Frantar and Alistarh 2023); He et al. 2017 prune channels by the error after least squares. Exact for linear layers
    and 1x1 convolutions; for larger kernels it takes what is left of a channel to be spread in space as the channel is.
    """
    count, powers = len(seen.means), seen.products.diagonal()
    scale = powers.clamp_min(1e-30).sqrt()
    covariance = (seen.products - torch.outer(seen.means, seen.means)) / torch.outer(scale, scale)
    ridge = _RIDGE + count / max(seen.samples, 1)  # few samples would explain everything
    inverse = torch.linalg.inv(covariance + ridge * torch.eye(count, dtype=covariance.dtype))
    left = (1 / inverse.diagonal().clamp_min(1e-30)).clamp(0, 1)
    return seen.energy * torch.where(powers > 0, left, torch.zeros_like(left))


def taylor(gradients: torch.Tensor) -> torch.Tensor:
    """Magnitude of the first-order change of each example's loss (Molchanov et al. 2017, 2019: gates)."""
    return gradients.abs()


def hessian(gradients: torch.Tensor) -> torch.Tensor:
    """Second-order change of the loss by the diagonal of its Hessian (OBD, LeCun et al. 1990).

    The squares of the examples' gradients by a gate stand for the diagonal: the empirical Fisher matrix where a loss is
    given (Theis et al. 2018); the exact Gauss-Newton matrix, estimated as by Hutchinson (1990), where it is the change
    of the outputs themselves.
    """
    return gradients.square() / 2


DATA_CRITERIA = (
    Criterion("wanda", wanda, reads="activations"),
    Criterion("reconstruction", reconstruction, reads="contributions", aggregate="sum"),
    Criterion("compensated", compensated, reads="moments", aggregate="sum"),
    Criterion("taylor", taylor, reads="gradients", normalize="none"),
    Criterion("hessian", hessian, reads="gradients", normalize="none"),
)
