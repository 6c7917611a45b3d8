"""Inputs for judging a program: random ones like its example inputs, real ones cut to a batch, one example at a time.

Flat inputs are the tensors of a call in the order of `program.inputs`; leaves are those with the other arguments of the
example call (numbers, None) in their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DataError
from ..frontend.batch_dim import batch_name, batched, count_examples, some_examples
from ..frontend.program import Program


def has_dynamic_batch(program: Program) -> bool:
    """Does it take any number of examples?"""
    return batch_name(program.inputs) is not None


def random_inputs(program: Program, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Inputs with the scale (floats) or the range (integers) of the example inputs."""
    forms = take(program, example_tensors(program), batch)
    return tuple(_random_like(x, generator) for x in forms)


def _random_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not x.numel():
        return x
    low, high = x.min(), x.max()
    if x.is_floating_point():
        spread = x.double().std() if x.numel() > 1 else torch.zeros(())
        values = x.double().mean() + spread * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return values.clamp(low.double(), high.double()).to(x.dtype)
    return torch.randint(int(low), int(high) + 1, x.shape, generator=generator).to(x.dtype)


def take(program: Program, inputs: Sequence[torch.Tensor], batch: int) -> tuple[torch.Tensor, ...]:
    """The first `batch` examples, repeated where there are fewer; inputs without a batch dim as they are."""
    if len(inputs) != len(program.inputs):
        raise DataError(
            f"the program takes {len(program.inputs)} inputs, got {len(inputs)}", hint="pass the flat inputs in order"
        )
    return tuple(_first(x, batch) if b else x for x, b in zip(inputs, batched(program.inputs)))


def _first(x: torch.Tensor, batch: int) -> torch.Tensor:
    if x.shape[0] == 0:
        raise DataError("an input batch is empty", hint="pass at least one example")
    copies = -(-batch // x.shape[0])
    return torch.cat([x] * copies)[:batch]


def example_tensors(program: Program) -> tuple[torch.Tensor, ...]:
    return tuple(x for x in program.example_inputs if isinstance(x, torch.Tensor))


def leaves(program: Program, inputs: Sequence[torch.Tensor]) -> list[Any]:
    """Flat inputs with the non-tensor leaves of the example call in their places."""
    given = iter(inputs)
    return [next(given) if isinstance(x, torch.Tensor) else x for x in program.example_inputs]


def examples(program: Program, inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """One example at a time where the batch is dynamic, so that only one example's activations are held."""
    if not has_dynamic_batch(program):
        return [tuple(inputs)]
    count = count_examples(program.inputs, inputs)
    return [some_examples(program.inputs, inputs, slice(i, i + 1)) for i in range(count)]
