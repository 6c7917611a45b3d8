"""The table of lowering rows: which function writes which ATen op.

A row is a function whose parameters are named as in the op's schema (`self` and `input` are called `x`):

    @row("aten.relu.default")
    def relu(g: Emitter, x: Operand) -> ir.Value:
        return g.op("Relu", x)

It receives the call's arguments by those names. A schema argument that the function does not declare must have its
default value in the call, else the call is rejected: nothing is ever ignored in silence.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import LoweringError

FAMILIES = (
    "ops_activation",
    "ops_arithmetic",
    "ops_attention",
    "ops_compare",
    "ops_conv",
    "ops_create",
    "ops_dynamic",
    "ops_index",
    "ops_linear",
    "ops_norm",
    "ops_pad",
    "ops_pool",
    "ops_quantize",
    "ops_recurrent",
    "ops_reduce",
    "ops_resize",
    "ops_shape",
    "ops_split",
)

# Arguments that say where or how a tensor is stored, not what its values are.
_STORAGE = frozenset({"device", "pin_memory", "memory_format", "non_blocking", "copy", "implicit", "requires_grad"})
_ALIASES = {"self": "x", "input": "x"}


@dataclass(frozen=True)
class Row:
    """One op overload and the function that writes it as ONNX."""

    op: str
    function: Callable[..., Any]

    @property
    def family(self) -> str:
        """The file that the row stands in: "ops_conv"."""
        return self.function.__module__.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """The first line of the function's docstring, or ""."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    @functools.cached_property
    def parameters(self) -> frozenset[str]:
        """The schema arguments that the row handles."""
        return frozenset(list(inspect.signature(self.function).parameters)[1:])

    def bind(self, schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by parameter name. Raises `LoweringError` for a value that the row does not handle."""
        bound: dict[str, Any] = {}
        for position, item in enumerate(schema.arguments):
            name = _ALIASES.get(item.name, item.name)
            default = item.default_value if item.has_default_value() else None
            value = args[position] if position < len(args) else kwargs.get(item.name, default)
            if name in self.parameters:
                bound[name] = value
            elif not _is_default(name, value, default):
                raise LoweringError(
                    f"{self.op} with {item.name}={value!r} is not lowered",
                    hint=f"only {item.name}={default!r} is; teach row {self.function.__name__!r} in {self.family}.py",
                )
        return bound


def _is_default(name: str, value: Any, default: Any) -> bool:
    if name in _STORAGE or value is None or (name == "layout" and value == torch.strided):
        return True
    return bool(isinstance(value, bool) == isinstance(default, bool) and value == default)


_ROWS: dict[str, Row] = {}

F = Callable[..., Any]


def row(*ops: str) -> Callable[[F], F]:
    """Register a function as the row of these op overloads ("aten.relu.default")."""

    def register(function: F) -> F:
        for op in ops:
            known = _ROWS.get(op)
            if known is not None and known.function.__qualname__ != function.__qualname__:
                raise LoweringError(f"two rows lower {op}: {known.function.__qualname__}, {function.__qualname__}")
            _ROWS[op] = Row(op, function)
        return function

    return register


@functools.cache
def _load_families() -> None:
    for family in FAMILIES:
        importlib.import_module(f".{family}", __package__)


def lowering_rows() -> dict[str, Row]:
    """All rows by op overload name, sorted."""
    _load_families()
    return dict(sorted(_ROWS.items()))


def find_row(target: Any) -> Row | None:
    """The row of an fx node's target, or None."""
    _load_families()
    return _ROWS.get(str(target))
