"""A training's parts as JSON values: a checkpoint must be refused where one of them is another one.

Two runs that are to give the same result have the same description. Objects that others hold (a logger, a progress bar)
change from run to run, and are known by their class alone, unless they are fxpress's own or data classes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..frontend.program import Program
from .checkpoint import digest

_DEPTH = 6


def described(value: Any, depth: int = _DEPTH) -> Any:
    """`value` as JSON values: numbers as they are, arrays and weights by a checksum, functions by their code and what
    they hold, other objects by their class, the outermost by its public attributes too. An object may say it itself
    with `described()`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.generic, torch.Tensor, np.ndarray)):
        return value.item() if np.ndim(value) == 0 else digest({"": torch.as_tensor(value)})
    if isinstance(value, (Program, torch.nn.Module)) and not hasattr(value, "described"):
        return {"kind": type(value).__name__, "weights": digest(value.state_dict())}
    if depth == 0 or isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__name__)
    inner = functools.partial(described, depth=depth - 1)
    if isinstance(value, Mapping):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [inner(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, functools.partial):
        return {"function": inner(value.func), "given": [inner(value.args), inner(value.keywords)]}
    if isinstance(value, types.MethodType):
        return {"function": inner(value.__func__), "of": inner(value.__self__)}
    if isinstance(value, types.FunctionType):
        return _function(value, inner)
    if hasattr(value, "described") and not isinstance(value, type):
        return {"kind": type(value).__name__, **inner(value.described())}
    known = dataclasses.is_dataclass(value) or type(value).__module__.startswith(__package__.partition(".")[0])
    held = _attributes(value) if known or depth == _DEPTH else ()
    return {"kind": type(value).__name__, **{k: inner(v) for k, v in held}}


def _function(function: types.FunctionType, inner: Any) -> dict[str, Any]:
    cells = [c.cell_contents for c in function.__closure__ or () if _is_filled(c)]
    held = [inner(v) for v in (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())]
    return {"function": function.__qualname__, "code": _code(function.__code__), "holds": held}


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _code(code: types.CodeType) -> str:
    """A checksum of what a function does, wherever it stands in its file."""
    total = hashlib.sha256(code.co_code)
    total.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        text = _code(constant) if isinstance(constant, types.CodeType) else repr(constant)
        total.update(text.encode())
    return total.hexdigest()[:16]


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return
    yield from ((k, v) for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_"))

