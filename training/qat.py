"""Quantization-aware training: the network learns on the numbers that it will have, then it is folded.

    int8 = fxpress.train_quantized(program, data, TrainingOptions(epochs=1, optimizer=SGD(0.01)), calibration=batches)

    cleanup,canonicalize,fuse-batchnorm{keep=true},annotate,observe,calibrate  ->  fake-quantize  ->  train
      ->  fold-fake-quantize

The steps are passes; only the training is here. BatchNorm trains on the statistics of its batch at first. From the
freeze point on it uses its running statistics, as the folded program will, and the weights settle for those (Jacob et
al. 2018, Krishnamoorthi 2018). It comes late, at a low learning rate: nothing normalizes large steps any more. Without
a freeze point the statistics lag behind the weights to the end, so they are then computed anew on the calibration data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from ..backends.targets import load_target
from ..errors import OptionError
from ..frontend.batches import as_batches
from ..frontend.program import FROZEN, Program, require_program
from ..passes.base import Context
from ..passes.manager import PassManager
from ..passes.pipeline import parse_pipeline
from ..passes.prune.recovery.reestimate import reestimate_statistics
from ..passes.quantize.fake_quant import FakeQuantize
from ..passes.quantize.fold_fake_quant import FoldFakeQuantize
from ..passes.quantize.passes import Annotate, Calibrate, Observe
from ..passes.rewrite import argument, aten, find
from .loop import Trained, train
from .objectives import Batch, CrossEntropy, Objective, reads_labels, tells_classes
from .options import SGD, TrainingOptions
from .schedules import check_numbers

_PREPARED = "cleanup,canonicalize,fuse-batchnorm{keep=true}"  # as fxpress.quantize does, its norms kept
DEFAULT_OPTIONS = TrainingOptions(epochs=1, optimizer=SGD(0.01, weight_decay=1e-4))


@dataclass(frozen=True)
class Simulation:
    """How quantization is simulated in training: `fake` are the options of the pass `fake-quantize`.

    `freeze`: the share of the steps after which BatchNorm uses its running statistics, None for never. `reestimate`:
    give BatchNorm new statistics on the calibration data at the end; by default where it was never frozen.
    """

    fake: FakeQuantize = field(default_factory=FakeQuantize)
    freeze: float | None = 0.75
    reestimate: bool | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.freeze is not None and not 0 <= self.freeze <= 1:
            raise OptionError(f"freeze is {self.freeze}", hint="give a share of the training in [0, 1], or None")


def train_quantized(
    program: Program,
    data: Any,
    options: TrainingOptions | None = None,
    *,
    calibration: Iterable[Any],
    target: str = "ort-x86",
    simulation: Simulation | None = None,
    keep_float: tuple[str, ...] = (),
    **choices: Any,
) -> Program:
    """An integer copy of the float `program`, trained with simulated quantization on labelled `data`.

    `calibration` gives the first ranges. `choices` are those of `fxpress.train`: objective, evaluate, augment,
    checkpoint and so on. What simulates activations with fewer bits than the target's cannot be folded: for that there
    is `train_simulated`.
    Raises what `fxpress.quantize` and `fxpress.train` raise.
    """
    require_program(program)
    options, simulation = options or DEFAULT_OPTIONS, simulation or Simulation()
    context = Context(load_target(target), as_batches(program, calibration), seed=options.seed)
    passes = [*parse_pipeline(_PREPARED), Annotate(keep_float), Observe(), Calibrate(), simulation.fake]
    fake = PassManager(passes).run(program, context)
    trained = train_simulated(fake, data, options, context.calibration, simulation, **choices)
    return PassManager([FoldFakeQuantize()]).run(trained.program, context)


def train_simulated(
    fake: Program,
    data: Any,
    options: TrainingOptions,
    calibration: Iterable[tuple[torch.Tensor, ...]] | None,
    simulation: Simulation | None = None,
    **choices: Any,
) -> Trained:
    """Train a fake-quantized program as `simulation` says, and return it unfolded. `choices` are those of `train`."""
    simulation = simulation or Simulation()
    if options.precision == "float16" and any(n.endswith("log_change") for n, _ in fake.named_parameters()):
        raise OptionError(
            "scales cannot be learned from a loss that is scaled up for float16",
            hint='use "bfloat16", or learn_scales=false',
        )
    norms = {n.name for n in _norms(fake) if not _is_frozen(n)}  # those that are frozen for good stay so
    if norms and simulation.freeze is not None:
        objective = choices.pop("objective", None)
        if objective is None:
            objective, options = CrossEntropy(options.label_smoothing), replace(options, label_smoothing=0.0)
        choices["objective"] = FreezeNorms(objective, simulation.freeze)
    trained = train(fake, data, options, name=choices.pop("name", "qat"), **choices)
    anew = simulation.reestimate
    if anew is None:  # never frozen, or stopped before
        anew = simulation.freeze is None or not all(map(_is_frozen, _norms(trained.program)))
    thaw_norms(trained.program, norms)
    if norms and anew:
        if calibration is None:
            raise OptionError("BatchNorm's statistics are computed on calibration data", hint="give calibration")
        reestimate_statistics(trained.program, calibration)
    return trained


class FreezeNorms(nn.Module):
    """An objective under which BatchNorm uses its running statistics from the share `freeze` of the training on."""

    def __init__(self, objective: Objective, freeze: float) -> None:
        super().__init__()
        self.objective, self.freeze = objective, freeze
        self.reads_labels = reads_labels(objective)

    @property
    def tells_classes(self) -> bool:
        """As the objective inside."""
        return tells_classes(self.objective)

    def described(self) -> dict[str, Any]:
        """For checkpoints (describe.py)."""
        return {"objective": self.objective, "freeze": self.freeze}

    def forward(self, program: Program, batch: Batch) -> torch.Tensor:
        """The loss of `objective`, the norms frozen before it where the time has come."""
        if batch.done >= self.freeze and program.training:
            freeze_norms(program)
        return self.objective(program, batch)


def freeze_norms(program: Program) -> list[str]:
    """Let every BatchNorm keep its running statistics, in training too, in place. Returns the names of the nodes that
    were not frozen."""
    changed = [n for n in _norms(program) if not _is_frozen(n)]
    for node in changed:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), FROZEN: True}
    if changed:
        program.train(program.training)
    return [n.name for n in changed]


def thaw_norms(program: Program, names: Collection[str]) -> None:
    """Let the named BatchNorm nodes train their statistics again, in place."""
    for node in _norms(program):
        if node.name in names and _is_frozen(node):
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != FROZEN}
    program.train(program.training)


def _norms(program: Program) -> list[fx.Node]:
    """The BatchNorm nodes that have running statistics."""
    return [n for n in find(program, aten.batch_norm.default) if argument(n, "running_mean") is not None]


def _is_frozen(node: fx.Node) -> bool:
    return bool((node.meta.get("custom") or {}).get(FROZEN))
