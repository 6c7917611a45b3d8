"""BatchNorm in training divides by the spread of its batch: of a single value per channel there is none."""

from __future__ import annotations

from math import prod

from torch import fx

from ..errors import TrainingError
from ..frontend.cost import Sizes
from ..frontend.program import Program, layer_name, source_of
from ..passes.rewrite import argument, aten, find


def one_value_norms(program: Program) -> list[fx.Node]:
    """The BatchNorm nodes that see one value per channel where the batch holds one example: [1, C] or [1, C, 1, 1]."""
    sizes = Sizes(program)
    return [n for n in find(program, aten.batch_norm.default) if prod(_places(sizes.of(n))) == 1]


def _places(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1], *shape[2:])


def require_statistics(norms: list[fx.Node], step: int) -> None:
    """Raise TrainingError where one of `norms` takes the statistics of its batch, which is one example: its variance
    would be 0/0, and so would the running one for good (PyTorch's module refuses that too)."""
    trained = [n for n in norms if argument(n, "training")]
    if trained:
        raise TrainingError(
            f"step {step}: the BatchNorm {layer_name(trained[0])!r} has a single value per channel, which has no "
            "variance: a process works on one example",
            where=source_of(trained[0]),
            hint="leave a short last batch out (drop_last=True), or give a larger batch_size",
        )
