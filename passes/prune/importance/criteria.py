"""What an importance criterion is: what its function is shown, and what it gives back. The table is registry.py.

`reads` says which of the classes here the function gets; scores.py does the rest: it finds the places in the axes, adds
positions up to literals, normalizes, and aggregates what the coupled layers say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ....errors import OptionError

Reads = Literal["weights", "norms", "activations", "contributions", "moments", "gradients"]
Aggregate = Literal["mean", "sum", "max", "prod"]
Normalize = Literal["mean", "max", "sum", "gaussian", "lamp", "cost", "none"]

DATA_READS: tuple[Reads, ...] = ("activations", "contributions", "moments", "gradients")


@dataclass(frozen=True)
class Slices:
    """reads="weights" or "norms": `values` [positions, n], the slices of a parameter along one dimension (float64).

    For "norms" it is the scale of a normalization, n = 1. `generator` is for criteria that draw. The function gives
    one score for each position.
    """

    values: torch.Tensor
    generator: np.random.Generator


@dataclass(frozen=True)
class Activations:
    """reads="activations": one operand that a layer sums over, position by position.

    `norms` [positions]: root of the mean square of the position's values over the data. `weights` [positions]: the sum
    of the magnitudes of what it is multiplied by. The function gives one score for each position.
    """

    norms: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Contributions:
    """reads="contributions": what `n` channels of one operand add to the output of the layer that sums over them.

    `energy` [n]: E |what the channel adds|^2, relative to E |output|^2. The function gives one score for each channel.
    """

    energy: torch.Tensor


@dataclass(frozen=True)
class Moments(Contributions):
    """reads="moments": besides, how the channels' values x_i at the same place go together, over `samples` places.

    `means` [n]: E x_i; `products` [n, n]: E x_i x_j.
    """

    means: torch.Tensor
    products: torch.Tensor
    samples: int


@dataclass(frozen=True)
class Gradients:
    """reads="gradients": moments over the examples of g, the derivative of an example's loss by a channel's gate.

    A gate is a factor 1 at every operand that holds the channel and is summed over; at 0 the channel is removed.
    `means` [n]: E g, `magnitudes` [n]: E |g|, `squares` [n]: E g^2. The function gives one score for each channel.
    """

    means: torch.Tensor
    magnitudes: torch.Tensor
    squares: torch.Tensor


@dataclass(frozen=True)
class Criterion:
    """One importance: its function, what that reads, and the normalization and aggregation that suit it."""

    name: str
    function: Callable[[Any], torch.Tensor]
    reads: Reads = "weights"
    normalize: Normalize = "mean"
    aggregate: Aggregate = "mean"

    @property
    def needs_data(self) -> bool:
        """Does it look at activations or gradients?"""
        return self.reads in DATA_READS

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Raise OptionError unless `value` is one of `choices`."""
    if value not in list(choices):
        raise OptionError(f"{option} is {value!r}", hint=f"choose one of {', '.join(choices)}")
