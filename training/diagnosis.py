"""Where the first NaN or infinity of a training step comes from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import TrainingError
from ..frontend.program import Program, layer_name, source_of
from ..runtime.feed import leaves
from .objectives import Batch

_HINT = "lower the learning rate, add warmup, or clip_norm=1.0"


def not_finite(program: Program, batch: Batch, loss: float) -> TrainingError:
    """The error for a step whose loss or gradient is not finite: which tensor is the first that is not.

    Looked at in turn: weights, activations (the step is computed once more), loss, gradients from the output backwards.
    """
    what, where, hint = (
        _bad_weight(program)
        or _bad_activation(program, batch)
        or _bad_loss(loss)
        or _bad_gradient(program)
        or ("the gradient", None, _HINT)
    )
    return TrainingError(f"step {batch.step}: {what} is not finite (loss {loss:g})", where=where, hint=hint)


Finding = tuple[str, str | None, str]


def _bad_weight(program: Program) -> Finding | None:
    bad = [n for n, t in program.named_parameters() if _is_bad(t)]
    return (f"the weight {bad[0]!r} before the step", bad[0], _HINT) if bad else None


def _bad_activation(program: Program, batch: Batch) -> Finding | None:
    search = _Search(program.graph_module)
    with torch.no_grad():
        search.run(*leaves(program, batch.inputs), enable_io_processing=False)
    if search.found is None:
        return None
    where = source_of(search.found) or search.found.name
    return f"the output of {layer_name(search.found)!r} ({search.found.name}), the first in the graph,", where, _HINT


class _Search(fx.Interpreter):
    """Runs the graph and remembers the first node with a value that is not finite. A mask's -inf is what it is for."""

    found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and n.op == "call_function" and any(_is_bad(t) for t in pytree.tree_leaves(value)):
            self.found = None if _is_mask(n, value) else n
        return value


def _is_mask(node: fx.Node, value: Any) -> bool:
    """Minus infinity alone, which softmax turns into zeros, is no fault."""
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return not any(t.isnan().any() or t.isposinf().any() for t in tensors) and "output" not in [
        u.op for u in node.users
    ]


def _bad_loss(loss: float) -> Finding | None:
    if loss == loss and abs(loss) != float("inf"):
        return None
    hint = "the model's outputs are finite: look at the labels and at the objective"
    return "the loss", "the objective", hint


def _bad_gradient(program: Program) -> Finding | None:
    """Gradients flow backwards: of the weights with a bad one, that which is read last has it first."""
    by_name = dict(program.named_parameters())
    order: dict[str, None] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                order.pop(str(source.target), None)
                order[str(source.target)] = None
    for name in reversed(order):
        parameter = by_name.get(name)
        if parameter is not None and parameter.grad is not None and _is_bad(parameter.grad):
            return f"the gradient of {name!r}, the first on the way back,", name, _HINT
    return None


def _is_bad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())


def checked_scalar(loss: Any) -> torch.Tensor:
    """The loss, if it is a scalar with a gradient. Raises TrainingError."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TrainingError(f"the objective returned {shape}", hint="return the mean loss of the batch: a scalar")
    if not loss.requires_grad:
        raise TrainingError("the loss does not depend on the weights", hint="call the program without torch.no_grad()")
    return loss.reshape(())
