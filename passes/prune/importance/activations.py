"""Importances that look at what the network does with data."""

from __future__ import annotations

import torch

from .criteria import Activations, Contributions, Criterion, Gradients, Moments

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
    covariance = seen.products - torch.outer(seen.means, seen.means)
    variances = covariance.diagonal().clamp_min(0)
    spread = variances.clamp_min(1e-30).sqrt()
    count = len(spread)
    ridge = _RIDGE + count / max(seen.samples, 1)  # few samples would explain everything
    correlation = covariance / torch.outer(spread, spread)
    inverse = torch.linalg.inv(correlation + ridge * torch.eye(count, dtype=spread.dtype))
    own = (1 / inverse.diagonal()).clamp(0, 1)  # the share of a channel's variance that no others explain
    return seen.energy * own * variances / seen.products.diagonal().clamp_min(1e-30)


def taylor(seen: Gradients) -> torch.Tensor:
    """Square of the mean magnitude of the first-order change of an example's loss (Molchanov et al. 2017, 2019).

    The gates and the square are those of the paper of 2019, the magnitude of each example's change that of 2017.
    """
    return seen.magnitudes.square()


def hessian(seen: Gradients) -> torch.Tensor:
    """Second-order change of the loss by the diagonal of its Hessian (OBD, LeCun et al. 1990).

    The squares of the examples' gradients by a gate stand for the diagonal: the empirical Fisher matrix where a loss is
    given (Theis et al. 2018); the exact Gauss-Newton matrix, estimated as by Hutchinson (1990), where it is the change
    of the outputs themselves.
    """
    return seen.squares / 2


DATA_CRITERIA = (
    Criterion("wanda", wanda, reads="activations"),
    Criterion("reconstruction", reconstruction, reads="contributions", aggregate="sum"),
    Criterion("compensated", compensated, reads="moments", aggregate="sum"),
    Criterion("taylor", taylor, reads="gradients", normalize="cost"),
    Criterion("hessian", hessian, reads="gradients", normalize="cost"),
)
