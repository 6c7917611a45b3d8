"""The table of importance criteria. A new one is one small function:

@fxpress.register_importance("l3")
def l3(slices):
    return slices.values.abs().pow(3).sum(dim=1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch

from ....errors import OptionError, did_you_mean
from .activations import DATA_CRITERIA
from .criteria import Aggregate, Criterion, Normalize, Reads, check_choice
from .weights import WEIGHT_CRITERIA

_REGISTERED: dict[str, Criterion] = {}


def register_importance(
    name: str, reads: Reads = "weights", normalize: Normalize = "mean", aggregate: Aggregate = "mean"
) -> Callable[[Callable[[Any], torch.Tensor]], Callable[[Any], torch.Tensor]]:
    """Decorator: make a function known as the importance `name`, to `plan_pruning` and to the pass `prune`.

    Raises OptionError for a name that is taken and for options that do not exist.
    """
    check_choice("reads", reads, get_args(Reads))
    check_choice("normalize", normalize, get_args(Normalize))
    check_choice("aggregate", aggregate, get_args(Aggregate))

    def register(function: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        known = criteria().get(name)
        if known is not None and _origin(known.function) != _origin(function):
            raise OptionError(f"there is an importance {name!r} already: {known.summary}", hint="rename yours")
        _REGISTERED[name] = Criterion(name, function, reads, normalize, aggregate)
        return function

    return register


def criteria() -> dict[str, Criterion]:
    """Name -> criterion: the built-in ones, and the user's own."""
    return {c.name: c for c in (*WEIGHT_CRITERIA, *DATA_CRITERIA)} | _REGISTERED


def find_criterion(name: str) -> Criterion:
    """The criterion of that name. Raises OptionError."""
    known = criteria()
    if name not in known:
        raise OptionError(f"unknown importance {name!r}", hint=did_you_mean(str(name), known, "choose one of"))
    return known[name]


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
