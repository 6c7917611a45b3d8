"""The batch of a program: which dim it is, how many examples flat inputs hold, and some of them.

The batch is the first dim of the first input whose first dim is symbolic. Inputs need not all have it: a mask or a
scalar is the same for all examples. Everything here takes the `inputs` of a Program and flat tensors in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .tensor_info import TensorInfo

Batch = tuple[torch.Tensor, ...]


def batch_name(infos: Sequence[TensorInfo]) -> str | None:
    """The name of the batch dim; None where the batch is fixed."""
    return next((i.dims[0] for i in infos if i.dims and isinstance(i.dims[0], str)), None)


def batched(infos: Sequence[TensorInfo]) -> tuple[bool, ...]:
    """Which inputs have the batch as their first dim."""
    name = batch_name(infos)
    return tuple(name is not None and bool(i.dims) and i.dims[0] == name for i in infos)


def count_examples(infos: Sequence[TensorInfo], inputs: Sequence[torch.Tensor]) -> int:
    """The number of examples of flat inputs; where the batch is fixed, the first size of the first that has one."""
    of_batch = [x for x, b in zip(inputs, batched(infos)) if b] or [x for x in inputs if x.ndim]
    return int(of_batch[0].shape[0]) if of_batch else 1


def some_examples(infos: Sequence[TensorInfo], inputs: Sequence[torch.Tensor], which: slice | torch.Tensor) -> Batch:
    """The examples `which` (a slice, a mask or indices) of flat inputs; inputs without the batch as they are."""
    return tuple(x[which] if b else x for x, b in zip(inputs, batched(infos)))
