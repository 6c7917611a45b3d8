"""Training as passes, so that a recipe can chain it with pruning and quantization:

    cleanup,prune{macs=0.5},distil{epochs=3},canonicalize,fuse-batchnorm{keep=true},qat{epochs=1,soft=0.9,labels=0.1}

They read training data from the context (`--train-data`, or `training=` from Python). The teacher is the program that
pruning began with; `qat` without pruning before it learns from the float program that it quantizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError, OptionError, QuantizationError
from ..frontend.program import Program
from ..passes.base import INTERFACE, Change, Context, Pass, register_pass
from ..passes.fuse_batchnorm import FuseBatchNorm
from ..passes.prune.passes import ORIGINAL, RESULT
from ..passes.prune.plan import PruningPlan
from ..passes.quantize.fake_quant import FakeQuantize
from ..passes.quantize.fold_fake_quant import FoldFakeQuantize
from ..passes.quantize.passes import Annotate, Calibrate, Observe
from .distill import Distillation
from .distill_terms import Attention, Features, Relations, SoftLabels, Term
from .loop import Trained, train
from .matching import matched_values
from .objectives import Objective
from .options import SGD, AdamW, Muon, Optimizer, TrainingOptions
from .qat import Simulation, freeze_norms, thaw_norms, train_simulated

Augmentation = Literal["none", "flip-shift", "flip-shift-cutmix"]


@dataclass(frozen=True)
class Training(Pass):
    """What all training passes have in common: how the weights are trained on the context's training data."""

    epochs: int = 1
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    weight_decay: float = 5e-4
    batch_size: int = 64
    warmup: float = 0.0
    augment: Augmentation = "none"
    hold_out: float = 0.0

    preserves = frozenset({INTERFACE})

    @property
    def reads_labels(self) -> bool:
        """Must the data have labels?"""
        return True

    def options(self, context: Context) -> TrainingOptions:
        """These options as the training loop takes them."""
        optimizers: dict[str, Optimizer] = {
            "sgd": SGD(self.learning_rate, nesterov=True, weight_decay=self.weight_decay),
            "adamw": AdamW(self.learning_rate, weight_decay=self.weight_decay),
            "muon": Muon(self.learning_rate, weight_decay=self.weight_decay),
        }
        return TrainingOptions(
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=optimizers[self.optimizer],
            warmup=self.warmup,
            hold_out=self.hold_out,
            seed=context.seed,
        )

    def choices(self, context: Context, labels: float = 1.0) -> dict[str, Any]:
        """What `train` is told beside its options. Weights that a sparse plan made zero stay zero. `labels` is what the
        labels weigh: mixed pictures have none."""
        if "cutmix" in self.augment and labels:
            raise OptionError(
                f"{self.augment} mixes pictures, not their labels", hint="distil with labels=0, or use flip-shift"
            )
        plan = _plan(context)
        sparse = plan if plan is not None and plan.masks else None
        augment = None if self.augment == "none" else self.augment
        return {"augment": augment, "progress": context.progress, "plan": sparse, "name": self.name}


@register_pass
@dataclass(frozen=True)
class Finetune(Training):
    """Train on labelled data.

    SGD with Nesterov momentum (or AdamW), the learning rate falling by a cosine. `augment` varies pictures
    (flip-shift), `hold_out` is the share of the data that judges each epoch, of which the best is kept.
    """

    name = "finetune"

    label_smoothing: float = 0.0

    def run(self, program: Program, context: Context) -> Change:
        options = TrainingOptions(**{**vars(self.options(context)), "label_smoothing": self.label_smoothing})
        return _trained(program, train(program, training_data(context), options, **self.choices(context)))


@register_pass
@dataclass(frozen=True)
class Distil(Training):
    """Train a pruned program to say what the program before pruning says.

    `soft` weighs the teacher's probabilities at `temperature`, `labels` the labels, `relations` DIST; `match` weighs
    the values of all sums of residual branches, found in the graph, and the scores; `features` and `attention` name
    modules whose values, or places of large values, are matched. `freeze`: BatchNorm keeps its statistics, which is
    better for a network that `recover` has brought near its teacher (the default with `match`). The other options are
    those of `finetune`.
    """

    name = "distil"

    soft: float = 0.9
    labels: float = 0.1
    temperature: float = 4.0
    relations: float = 0.0
    match: float = 0.0
    features: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    freeze: bool | None = None

    @property
    def reads_labels(self) -> bool:
        return bool(self.labels or self.hold_out)

    def run(self, program: Program, context: Context) -> Change:
        teacher = context.results.get(ORIGINAL)
        if not isinstance(teacher, Program):
            raise OptionError("distil has no teacher", hint="put it after prune{...}, or use finetune")
        freeze = bool(self.match) if self.freeze is None else self.freeze
        frozen = freeze_norms(program) if freeze else []
        if not frozen and self.freeze:
            raise OptionError("freeze has no effect: the program has no BatchNorm", hint="leave it out")
        terms = _terms(self.soft, self.temperature, self.features)
        terms += [Relations(self.relations, temperature=self.temperature)] if self.relations else []
        terms += [matched_values(program, teacher, _plan(context), self.match)] if self.match else []
        terms += [Attention(_pairs(self.attention))] if self.attention else []
        objective = Distillation(program, teacher, terms, labels=self.labels, seed=context.seed)
        options, choices = self.options(context), self.choices(context, self.labels)
        trained = train(program, training_data(context), options, objective=objective, **choices)
        thaw_norms(trained.program, frozen)
        return _trained(program, trained)


@register_pass
@dataclass(frozen=True)
class QAT(Training):
    """Quantize, train on the numbers that quantization leaves, and fold (quantization-aware training).

    annotate, observe, calibrate, fake-quantize, train, fold-fake-quantize. `freeze` is the share of the training after
    which BatchNorm uses its running statistics (none: never, and they are computed anew at the end). With `soft` or
    `match` the float program, or the one before pruning, teaches, with `features` by the values of these modules too
    (see distil).
    `ranges`, `keep_float`: as for quantize. The other options are those of `finetune`.
    """

    name = "qat"

    weight_decay: float = 1e-4
    soft: float = 0.0
    labels: float = 1.0
    temperature: float = 4.0
    match: float = 0.0
    features: tuple[str, ...] = ()
    freeze: float | None = 0.75
    ranges: str = "auto"
    keep_float: tuple[str, ...] = ()
    learn_scales: bool = True
    learn_zero_points: bool = False

    @property
    def reads_labels(self) -> bool:
        return bool(self.labels or self.hold_out)

    def run(self, program: Program, context: Context) -> Change:
        if context.target is None:
            raise QuantizationError("quantization needs a target", hint="pass --target, for example ort-x86")
        data, original = training_data(context), context.results.get(ORIGINAL)
        plan = _plan(context) if isinstance(original, Program) else None
        learns = bool(self.soft or self.match)
        teacher = original if isinstance(original, Program) or not learns else program.copy()
        fake = FakeQuantize(learn_scales=self.learn_scales, learn_zero_points=self.learn_zero_points)
        before = (FuseBatchNorm(keep=True), Annotate(self.keep_float), Observe(self.ranges), Calibrate(), fake)  # type: ignore[arg-type]
        notes = [note for step in before for note in step.run(program, context).notes]
        choices = self.choices(context, self.labels)
        if (objective := self._objective(program, teacher, plan, context)) is not None:
            choices["objective"] = objective
        simulation = Simulation(fake, self.freeze)
        trained = train_simulated(program, data, self.options(context), context.calibration, simulation, **choices)
        _trained(program, trained)
        change = FoldFakeQuantize().run(program, context)
        return Change(change.count, [*notes, *trained.notes(), *change.notes])

    def _objective(
        self, program: Program, teacher: Program | None, plan: PruningPlan | None, context: Context
    ) -> Objective | None:
        if not (self.soft or self.match) or teacher is None:
            for name, idle in (("labels", self.labels != 1.0), ("features", bool(self.features))):
                if idle:
                    raise OptionError(f"{name} has no effect without soft or match", hint="give match=1 too")
            return None
        terms = _terms(self.soft, self.temperature, self.features)
        terms += [matched_values(program, teacher, plan, self.match)] if self.match else []
        return Distillation(program, teacher, terms, labels=self.labels, seed=context.seed)


def _terms(soft: float, temperature: float, features: tuple[str, ...]) -> list[Term]:
    """What is learned from a teacher's scores and from the values of its modules."""
    terms: list[Term] = [SoftLabels(soft, temperature)] if soft else []
    return [*terms, Features(_pairs(features))] if features else terms


def _plan(context: Context) -> PruningPlan | None:
    plan = context.results.get(RESULT)
    return plan if isinstance(plan, PruningPlan) else None


def training_data(context: Context) -> Any:
    """The context's training data. Raises DataError where there are none."""
    if context.training is None:
        raise DataError("training needs data", hint="pass --train-data, or training=(inputs, labels)")
    return context.training


def _trained(program: Program, trained: Trained) -> Change:
    """Let `program` become the trained one."""
    program.graph_module = trained.program.graph_module
    return Change(len(trained.history), trained.notes())


def _pairs(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((n, n) for n in names)
