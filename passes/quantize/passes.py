"""Quantization as passes: annotate, observe, calibrate, fold; and `quantize`, which is the four in a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from ...errors import DataError, OptionError, QuantizationError
from ...frontend.program import Program
from ..base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from ..rewrite import refuse_quantized
from .accuracy.float_twin import keep_float_twin
from .annotate import annotate_program
from .expand import concerns
from .fold import fold_program
from .observe import calibrate_program, insert_observers
from .ranges.channels import RangeChoice
from .ranges.choose import choose_ranges
from .ranges.rules import Ranges as Ranges
from .spec import Target

WeightRanges = Literal["minmax", "mse"]


@register_pass
@dataclass(frozen=True)
class Annotate(Pass):
    """Decide by the target's table what is computed on integers.

    `keep_float` names what stays in float all the same: nodes, layers or modules, by glob. `forms` turns named forms
    of the target on (`attention`) or off (`-attention`); `use_integer` turns all optional forms on for what it names;
    what `use_int16` names has activations of 16 bits, on targets that have them (`qnn`).
    """

    name = "annotate"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False

    keep_float: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    use_integer: tuple[str, ...] = ()
    use_int16: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Change:
        refuse_quantized(program, "it is quantized once")
        target = _target(context).with_forms(self.forms)
        idle = [f for f in self.forms if not _concerns_any(f, program, target)]
        count, reasons = annotate_program(program, target, self.keep_float, self.use_integer, self.use_int16)
        if count == 0:
            raise QuantizationError(
                f"target {_target(context).name} computes nothing of this program on integers"
                + "".join(f"\n  {r}" for r in reasons[:5]),
                hint="use the recipe `float`, or another target",
            )
        for form in idle:  # what is written for a target (masks, stems) may have it all the same
            if not _concerns_any(form, program, target):
                raise OptionError(
                    f"forms: {form!r} changes nothing: the program has nothing in this form", hint=f"leave {form!r} out"
                )
        return Change(count, reasons)


@register_pass
@dataclass(frozen=True)
class Observe(Pass):
    """Put an observer on every tensor that will be quantized.

    `ranges` is the rule by which a range follows from the values; `auto` chooses by measuring. `percentile` (99.999) is
    that of the rule of this name: how many percent of the values each end of the range includes.
    """

    name = "observe"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False

    ranges: Ranges = "auto"
    percentile: float | None = None

    def run(self, program: Program, context: Context) -> Change:
        form = context.target.activation if context.target is not None else None
        return Change(insert_observers(program, RangeChoice(self.ranges, self.percentile, form)))


@register_pass
@dataclass(frozen=True)
class Calibrate(Pass):
    """Run the calibration data through the observers."""

    name = "calibrate"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False

    def run(self, program: Program, context: Context) -> Change:
        count = calibrate_program(program, _calibration(context), context)
        return Change(count, [f"{count} samples"])


@register_pass
@dataclass(frozen=True)
class Fold(Pass):
    """Fold observers and weights into integers.

    `weights` is the rule for the range of weights. `tie`: tensors that are concatenated share one scale where that
    costs no more than 0.5 dB, since the runtime then copies them.
    """

    name = "fold"
    preserves = frozenset({INTERFACE})
    writes_weights = False

    weights: WeightRanges = "minmax"
    tie: bool = True

    def run(self, program: Program, context: Context) -> Change:
        notes = choose_ranges(program, _target(context), self.weights, context, self.tie)
        keep_float_twin(program, context)
        return Change(fold_program(program, _target(context), self.weights), notes)


@register_pass
@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize for the target: annotate, observe, calibrate, fold.

    `keep_float`, `forms`, `use_integer` and `use_int16` are those of `annotate`: what stays in float, which optional
    forms of the target are on, and what has 16 bits. `ranges` and `percentile` are those of `observe`, `weights` and
    `tie` are those of `fold`.
    """

    name = "quantize"
    preserves = frozenset({INTERFACE})
    writes_weights = False

    ranges: Ranges = "auto"
    weights: WeightRanges = "minmax"
    keep_float: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    use_integer: tuple[str, ...] = ()
    use_int16: tuple[str, ...] = ()
    percentile: float | None = None
    tie: bool = True

    def steps(self) -> tuple[Pass, ...]:
        """The passes that this one is short for."""
        annotate = Annotate(self.keep_float, self.forms, self.use_integer, self.use_int16)
        return annotate, Observe(self.ranges, self.percentile), Calibrate(), Fold(self.weights, self.tie)

    def run(self, program: Program, context: Context) -> Change:
        changes = [step.run(program, context) for step in self.steps()]
        return Change(changes[-1].count, [note for c in changes for note in c.notes])


def _concerns_any(form: str, program: Program, target: Target) -> bool:
    return any(concerns(form.removeprefix("-"), n, target) for n in program.graph.nodes if n.op == "call_function")


def _target(context: Context) -> Target:
    if context.target is None:
        raise QuantizationError("quantization needs a target", hint="pass --target, for example ort-x86")
    return context.target


def _calibration(context: Context) -> Iterable[tuple[torch.Tensor, ...]]:
    if context.calibration is None:
        raise DataError("quantization needs calibration data", hint="pass --data, or calibration=batches from Python")
    return context.calibration
