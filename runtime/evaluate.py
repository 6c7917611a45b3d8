"""One metric for PyTorch and ONNX Runtime alike.

A metric is a function `evaluate(run) -> float`, higher is better. `run` maps a batch of inputs (tensor, tuple or dict)
to what the model returns: torch tensors for torch inputs, numpy arrays for numpy inputs, whichever engine runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..errors import DataError, FxpressError, OptionError, line_of
from ..frontend.batch_dim import count_examples
from ..frontend.batches import check_batch, flat_inputs
from ..frontend.program import Program
from ..frontend.tensor_info import TensorInfo
from .feed import leaves
from .session import Session

Run = Callable[..., Any]
Evaluate = Callable[[Run], float]


@dataclass(frozen=True)
class Metric:
    """The value of a metric and the number of examples that it saw."""

    name: str
    value: float
    count: int


@dataclass
class Runner:
    """Feeds a metric's batches to one engine, checks that they fit, and counts them.

    `flat` maps flat input tensors to flat output tensors, `pack` flat outputs to what the user's module returns.
    """

    inputs: tuple[TensorInfo, ...]
    flat: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
    pack: Callable[[tuple[Any, ...]], Any]
    count: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if len(args) == 1 and not kwargs else (args, kwargs)
        batch = flat_inputs(self.inputs, given)
        check_batch(self.inputs, batch, self.batches)
        self.batches += 1
        self.count += count_examples(self.inputs, batch)
        results = self.flat(batch)
        as_numpy = any(isinstance(x, np.ndarray) for x in pytree.tree_leaves(given))
        return self.pack(tuple(r.numpy() for r in results) if as_numpy else results)


def torch_runner(program: Program) -> Runner:
    """A runner that computes with PyTorch."""
    return Runner(program.inputs, lambda batch: program.run_flat(leaves(program, batch)), _packer(program))


def session_runner(program: Program, session: Session) -> Runner:
    """A runner that computes with ONNX Runtime; `program` says what inputs and outputs look like."""
    return Runner(program.inputs, lambda batch: _run_session(session, batch), _packer(program))


def file_runner(inputs: tuple[TensorInfo, ...], session: Session) -> Runner:
    """A runner for a model of which only the file is left: several outputs come as a tuple."""
    return Runner(inputs, lambda batch: _run_session(session, batch), lambda r: r[0] if len(r) == 1 else r)


def _run_session(session: Session, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.array(y)) for y in session.run(*(x.numpy() for x in batch)))


def _packer(program: Program) -> Callable[[tuple[Any, ...]], Any]:
    """Results in the structure that the user's module returns, where it holds tensors only; else flat."""
    spec = program.graph._codegen.pytree_info.out_spec

    def pack(results: tuple[Any, ...]) -> Any:
        if spec.num_leaves == len(results):
            return pytree.tree_unflatten(list(results), spec)
        return results[0] if len(results) == 1 else results

    return pack


def measure(evaluate: Evaluate, runner: Runner) -> Metric:
    """Run a metric. Raises OptionError where it does not return a finite number."""
    name = str(getattr(evaluate, "name", getattr(evaluate, "__name__", type(evaluate).__name__)))
    runner.count = runner.batches = 0
    try:
        value = evaluate(runner)
    except FxpressError:
        raise
    except Exception as error:
        raise OptionError(
            f"evaluate ({name}) fails: {type(error).__name__}: {error}",
            where=line_of(error),
            hint="it must work with any `run` that maps a batch of inputs to outputs",
        ) from error
    if not isinstance(value, (int, float, np.number)) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise OptionError(f"evaluate ({name}) returned a {type(value).__name__}", hint="return a number")
    with contextlib.suppress(OverflowError):  # an integer beyond all floats is no finite number either
        if math.isfinite(float(value)):
            return Metric(name, float(value), runner.count)
    shown = str(value)[:20]
    raise OptionError(f"evaluate ({name}) returned {shown}", hint="check the model's outputs for NaN")


@dataclass
class Top1:
    """Share of examples whose largest output is at their label. `data` yields `(inputs, labels)` batches."""

    data: Iterable[Any]
    name: str = "top-1"

    def __call__(self, run: Run) -> float:
        right = total = 0
        for item in self.data:
            inputs, labels = split_labels(item)
            scores = _scores(run(inputs))
            check_labels(labels, scores)
            right += int((scores.argmax(1) == labels).sum())
            total += len(labels)
        if total == 0:
            raise DataError("the evaluation data hold no examples", hint="give at least one labelled batch")
        return right / total


def split_labels(item: Any) -> tuple[Any, torch.Tensor]:
    """(inputs, labels) of a labelled batch. Raises DataError."""
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(
            "the evaluation data have no labels", hint="give class subfolders, arrays with labels, or (inputs, labels)"
        )
    labels = torch.as_tensor(item[-1])
    inputs = item[0] if len(item) == 2 else tuple(item[:-1])
    if labels.ndim != 1 or labels.is_floating_point():
        raise DataError(
            f"labels are {labels.dtype} of shape {list(labels.shape)}", hint="top-1 needs one whole number per example"
        )
    return inputs, labels


def check_labels(labels: torch.Tensor, scores: torch.Tensor) -> None:
    """Raise DataError unless every label is one of the model's classes."""
    if scores.ndim != 2 or scores.shape[0] != labels.shape[0]:
        raise DataError(
            f"top-1 needs outputs [batch, classes], the model gives {list(scores.shape)} for {len(labels)} labels",
            hint="from Python, pass your own evaluate(run)",
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise DataError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, the model has {scores.shape[1]} classes",
            hint="check that data and model belong together",
        )


def _scores(result: Any) -> torch.Tensor:
    return torch.as_tensor(pytree.tree_leaves(result)[0])


def least_allowed(before: float, drop: float) -> float:
    """The least metric that is within the allowance: 0.82 is within 0.01 of 0.83, however binary fractions round."""
    return before - drop - 1e-9 * max(abs(before), 1.0)
