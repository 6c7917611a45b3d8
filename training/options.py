"""What a user decides about a training, as frozen values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import OptionError
from ..passes.prune.recovery.muon import Muon as OrthogonalSteps
from .schedules import Cosine, Schedule, check_numbers, require

Precision = Literal["float32", "bfloat16", "float16"]
Group = dict[str, Any]  # a parameter group, as torch.optim takes it


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum; `weight_decay` is added to the gradient."""

    learning_rate: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check_optimizer(self)
        require("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov has no effect without momentum", hint="give momentum=0.9")

    def make(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(groups), self.learning_rate, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check_optimizer(self)
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        require("betas", self.betas, pair and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")

    def make(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(groups), self.learning_rate, betas=self.betas)


@dataclass(frozen=True)
class Muon:
    """Orthogonal steps for the weights of layers, AdamW for everything else (passes/prune/recovery/muon.py).

    It learns from a teacher in fewer epochs. The learning rate is on the scale of AdamW's."""

    learning_rate: float = 5e-3
    momentum: float = 0.95
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_optimizer(self)
        require("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)")

    def make(self, groups: Iterable[Group]) -> torch.optim.Optimizer:
        return OrthogonalSteps(groups, self.learning_rate, momentum=self.momentum)


Optimizer = SGD | AdamW | Muon


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults suit a short fine-tuning of a network that has been pruned or quantized.

    `epochs`         passes over the data.
    `batch_size`     examples in one step, over all processes together. (Data that stream bring their own batches.)
    `optimizer`      SGD, AdamW or Muon; weight decay skips norms, biases and everything else of one dimension or none.
    `schedule`       Constant, Step, Cosine, OneCycle or Plateau.
    `warmup`         share of the training in which the learning rate rises linearly from nothing (Goyal et al. 2017).
    `label_smoothing`  for the loss on labels (Szegedy et al. 2016); an objective of one's own does without it.
    `clip_norm`      the largest norm of the whole gradient.
    `ema`            decay per step of an average of the weights, which then is what is judged and returned; it starts
                     smaller: min(ema, (1 + step) / (10 + step)).
    `precision`      the type that layers compute in; weights and their updates stay float32.
    `hold_out`       share of the examples, drawn by `seed`, that are not trained on but judge each epoch: by top-1,
                     or by the loss where labels are no class numbers or the objective is one of your own.
    `patience`       stop after so many epochs in a row without a better metric.
    `keep`           "best": return the weights of the epoch with the best metric; "last". By default best where there
                     is a metric.
    `freeze`         globs of parameter names that stay as they are.
    `device`         "auto" (a GPU where there is one) or "cpu".
    `seed`           order of the examples, augmentation and dropout depend on it alone.
    """

    epochs: int = 1
    batch_size: int = 64
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    warmup: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    precision: Precision = "float32"
    hold_out: float = 0.0
    patience: int | None = None
    keep: Literal["best", "last"] | None = None
    freeze: tuple[str, ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        known = isinstance(self.optimizer, Optimizer)
        require("optimizer", self.optimizer, known, "SGD(0.05), AdamW(1e-3) or Muon(5e-3)")
        require("schedule", self.schedule, isinstance(self.schedule, Schedule), "Cosine(), Constant(), Step(), ...")
        if isinstance(self.freeze, str):
            object.__setattr__(self, "freeze", (self.freeze,))
        globs = isinstance(self.freeze, (tuple, list)) and all(isinstance(g, str) for g in self.freeze)
        require("freeze", self.freeze, globs, 'globs of parameter names: ("stem.*",)')
        for name in ("epochs", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) > 0, "1 or more")
        for name in ("warmup", "label_smoothing", "hold_out"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a share in [0, 1)")
        require("clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "a positive number")
        require("ema", self.ema, self.ema is None or 0 < self.ema < 1, "a decay in (0, 1), such as 0.999")
        require("patience", self.patience, self.patience is None or self.patience > 0, "1 epoch or more")
        require("precision", self.precision, self.precision in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}")
        require("keep", self.keep, self.keep in (None, "best", "last"), "best or last")
        require("device", self.device, self.device in ("auto", "cpu"), "auto or cpu")

    def described(self) -> dict[str, Any]:
        """All options as JSON values: two runs with the same ones are the same run."""
        values = dataclasses.asdict(self)
        for name in ("optimizer", "schedule"):
            values[name] = {"kind": type(getattr(self, name)).__name__, **values[name]}
        return values


_PRECISIONS = ("float32", "bfloat16", "float16")


def _check_optimizer(optimizer: Optimizer) -> None:
    check_numbers(optimizer)
    require("learning_rate", optimizer.learning_rate, optimizer.learning_rate > 0, "a positive number")
    require("weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "zero or a positive number")
