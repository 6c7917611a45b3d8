"""Does a captured program give what its module gives?

The tracer and the rules that make its graph functional are each right as far as anyone knows; that they were right for
this model is seen by running both on the example inputs. It costs one inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .functionalize import AUTOCAST
from .program import Program

_BOUND = 1e-3  # of the largest value
_BOUNDS = {torch.float16: 2e-2, torch.bfloat16: 5e-2}  # for narrower numbers
_ODD = 0.01  # share of whole numbers that may differ: what is sorted or rounded may be a tie


def check_same(program: Program, expected: Any, again: Callable[[], Any]) -> None:
    """Raises CaptureError where `program` does not give `expected`, the module's results on the example inputs.

    Nothing is said of programs that draw random numbers, nor of modules that give something else each time: `again`
    runs the module once more, where the first results are not met.
    """
    if draws_random(program):
        return
    narrow = program.graph_module.meta.get(AUTOCAST)
    least = _BOUNDS.get(narrow, _BOUND)
    with torch.no_grad():
        ours = list(program.call_example())
    if _difference(ours, expected, least) is None:
        return
    second = again()
    found = _difference(ours, second, least)
    if found is not None and _difference(_tensors(expected), second, least) is None:
        raise CaptureError(
            f"the captured graph does not compute what the module computes: {found}",
            hint="this is a fault of fxpress: report it with the model; until then, write as plain expressions what "
            "the model does in place or by side effects",
        )


def draws_random(program: Program) -> bool:
    """Does a program draw random numbers, in evaluation too?"""
    return any(map(_draws, program.graph.nodes))


def _draws(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    # dropout, recurrent layers and attention bear the tag as well: they draw where they are told to
    return all(_given(node, name) for name in ("train", "training", "dropout_p"))


def _given(node: fx.Node, name: str) -> Any:
    """The argument of that name, True where an op has none."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            default = node.kwargs.get(name, argument.default_value)
            return node.args[i] if i < len(node.args) else default
    return True


def _tensors(results: Any) -> list[torch.Tensor]:
    return [r for r in pytree.tree_leaves(results) if isinstance(r, torch.Tensor)]


def _difference(ours: list[torch.Tensor], results: Any, bound: float) -> str | None:
    """How the first output that differs does so; None where all are the same, within `bound` or that of their dtype."""
    theirs = _tensors(results)
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors instead of {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a.shape != b.shape:
            return f"output {i} has the shape {list(a.shape)} instead of {list(b.shape)}"
        if a.is_floating_point() or a.is_complex():
            wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
            x, y = a.detach().to(wide), b.detach().to(wide)
            close = (x == y) | (x.isnan() & y.isnan())
            largest = float(y[y.isfinite()].abs().max()) if y.isfinite().any() else 0.0
            worst = float((x - y).abs()[~close].nan_to_num(nan=float("inf")).max()) if not bool(close.all()) else 0.0
            if worst > max(bound, _BOUNDS.get(b.dtype, 0.0)) * largest:
                return f"output {i} differs by {worst:.3g} where the largest value is {largest:.3g}"
        elif a.numel() and float((a != b).double().mean()) > _ODD:
            return f"{float((a != b).double().mean()):.0%} of output {i} differ"
    return None
