"""What an observer has seen as plain data (numbers, texts, tensors, lists, dicts), to be sent to another process.

An observer is a dataclass. Its fields are its state; those that begin with "_" hold what can be worked out again, and
those that are no data (formats, types) are the same in every process.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch

Observed = TypeVar("Observed")
_SCALARS = (bool, int, float, str, type(None))


def state_of(value: Any) -> Any:
    """The state of an observer, or of a part of one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: state_of(getattr(value, name)) for name in _state_fields(value)}
    if isinstance(value, dict):
        return {str(key): state_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [state_of(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def with_state(observer: Observed, state: Any) -> Observed:
    """A new observer like `observer` that has seen what `state` says."""
    return _restored(copy.deepcopy(observer), state)


def _restored(value: Any, state: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {name: _restored(getattr(value, name), state[name]) for name in _state_fields(value)}
        return dataclasses.replace(value, **kept, **_fresh(value))  # type: ignore[type-var]
    if isinstance(value, dict):
        return {key: _restored(item, state[str(key)]) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == len(state):
        return type(value)(_restored(item, part) for item, part in zip(value, state))
    return state


def _state_fields(value: Any) -> list[str]:
    names = [f.name for f in dataclasses.fields(value) if f.init and not f.name.startswith("_")]
    return [n for n in names if _is_data(getattr(value, n))]


def _is_data(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        return not type(value).__dataclass_params__.frozen  # type: ignore[union-attr]
    return isinstance(value, (*_SCALARS, torch.Tensor, dict, list, tuple))


def _fresh(value: Any) -> dict[str, Any]:
    """The private fields as a new observer has them."""
    private = [f for f in dataclasses.fields(value) if f.init and f.name.startswith("_")]
    return {f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default for f in private}
