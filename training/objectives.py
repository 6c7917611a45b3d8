"""What is minimized: a function `(program, batch) -> loss`, so that labels, distillation and penalties compose.

An objective returns a scalar, the mean over the examples of the batch. It may depend on the batch, with its place in
the training, and on nothing that an earlier call left behind, or a resumed run would differ. One with weights of its
own (adapters, say) is an `nn.Module`: they are trained and kept in checkpoints beside those of the program. One that
says `reads_labels = False` is trained with on data without labels, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

from ..errors import DataError
from ..frontend.batches import NO_LABEL
from ..frontend.program import Program
from ..runtime.feed import leaves
from .layout import channel_dim


class Batch(NamedTuple):
    """The part of a step's examples that this process works on: inputs in the order of `program.inputs`, labels, the
    number of the step from the beginning of the training, from 0, and the share of the steps that are done before.

    `label_weight`: times this, a mean over the labels that count (not NO_LABEL) becomes what the mean over processes
    makes that of the whole batch. It is 1 in one process, and where all processes have as large a share of the labels
    that count as of the examples."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    step: int = 0
    done: float = 0.0
    label_weight: float = 1.0


Objective = Callable[[Program, Batch], torch.Tensor]


def reads_labels(objective: Objective | None) -> bool:
    """Does an objective need labelled data? Cross entropy (None), and all that do not say otherwise, do."""
    return bool(getattr(objective, "reads_labels", True))


def tells_classes(objective: Objective) -> bool:
    """Are the scores those of classes, which top-1 can judge? Objectives of one's own do not say so unless they have
    `tells_classes = True`; those that wrap another one are like it."""
    return bool(getattr(objective, "tells_classes", False))


def call(program: Program, inputs: tuple[torch.Tensor, ...]) -> Any:
    """What the user's module returns for flat inputs, with gradients."""
    args, kwargs = pytree.tree_unflatten(leaves(program, inputs), program.input_spec)
    return program.graph_module(*args, **kwargs)


def scores(program: Program, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The first output, in float32, with gradients."""
    result = pytree.tree_leaves(call(program, inputs))
    return result[0].float()


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy of the first output [N, classes, ...] with class numbers [N, ...] or shares [N, classes, ...], or
    of an output [N, tokens, classes] with class numbers [N, tokens]."""

    label_smoothing: float = 0.0
    tells_classes: ClassVar[bool] = True

    def __call__(self, program: Program, batch: Batch) -> torch.Tensor:
        output = scores(program, batch.inputs)
        if _labels_tokens(program, output, batch.labels):
            output = output.transpose(1, 2)
        return label_loss(output, batch, self.label_smoothing)


def _labels_tokens(program: Program, output: torch.Tensor, labels: torch.Tensor) -> bool:
    """Are labels [N, A] the class numbers of the tokens of an output [N, A, classes]? Where the shapes fit both ways,
    the program says it."""
    if output.ndim != 3 or labels.ndim != 2 or labels.is_floating_point():
        return False
    tokens, others = (labels.shape[1] == output.shape[dim] for dim in (1, 2))
    return tokens and (not others or scores_tokens(program))


def scores_tokens(program: Program) -> bool:
    """Is the first output [N, tokens, classes], by the layer that it comes from?"""
    node = program.output_nodes()[0]
    return node.meta["val"].ndim == 3 and channel_dim(node) == 2


def label_loss(output: torch.Tensor, batch: Batch, smoothing: float) -> torch.Tensor:
    """Cross entropy of an output [N, classes, ...] with the batch's labels, 0 where none of them counts. Raises
    DataError where they do not fit."""
    check_classes(output, batch.labels)
    if counted_labels(batch.labels) == 0:
        return output.sum() * 0
    loss = functional.cross_entropy(output, class_labels(batch.labels), label_smoothing=smoothing)
    return loss * batch.label_weight


def counted_labels(labels: torch.Tensor) -> int:
    """How many class numbers are there? Shares of classes count by the example."""
    return len(labels) if labels.is_floating_point() else int((labels != NO_LABEL).sum())


def check_classes(output: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise DataError unless `labels` are class numbers or shares of classes for `output`."""
    shares = labels.is_floating_point()
    expected = output.shape if shares else (output.shape[0], *output.shape[2:])
    if output.ndim < 2 or tuple(labels.shape) != tuple(expected):
        raise DataError(
            f"labels of shape {list(labels.shape)} ({labels.dtype}) do not fit an output of shape {list(output.shape)}",
            hint="cross entropy takes one class number per example; for other tasks give an objective of your own",
        )
    counted = labels if shares else labels[labels != NO_LABEL]
    if not shares and counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < output.shape[1]:
        raise DataError(
            f"labels go from {int(counted.min())} to {int(counted.max())}, the model has {output.shape[1]} classes",
            hint=f"check that data and model belong together (places without a label have {NO_LABEL})",
        )


def class_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels in a dtype that PyTorch's losses take: class numbers of any integer dtype as int64."""
    return labels if labels.is_floating_point() else labels.long()
