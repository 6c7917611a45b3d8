"""Each layer of a quantized program on its own: does ONNX Runtime compute it as PyTorch does, and what did it lose?

`check_layers` feeds each layer the same integers in both, `layer_table` tells how much each layer loses to
quantization, alone and with what came before it; `judge_layers` does both for one simulation of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from ..backends.onnx.lower import lower
from ..errors import VerificationError
from ..frontend.operators import dequantize, quantize
from ..frontend.program import Program
from ..frontend.sqnr import Sqnr
from ..passes.memory import return_memory
from .cut import Cut, Site, cut_program, leading_op, watch, weight_bytes
from .feed import examples, leaves
from .session import Runnable, make_session
from .verify import FLOAT_BOUND, differences, relative, to_numpy

Values = dict[str, torch.Tensor]
Load = Callable[[onnx.ModelProto], Runnable]


@dataclass(frozen=True)
class LayerSteps:
    """One layer, fed the same integers: greatest difference in quantization steps, share of equal values."""

    name: str
    max_steps: int
    share_equal: float


@dataclass(frozen=True)
class LayerParity:
    """All layers. `share_equal` is over all values; `output_relative` is max |a - b| / max |b| of the float outputs,
    `bound` how large it may be."""

    layers: tuple[LayerSteps, ...]
    max_steps: int
    share_equal: float
    output_relative: float
    bound: float = FLOAT_BOUND

    @property
    def kept(self) -> bool:
        return self.max_steps <= 1 and self.output_relative <= self.bound


@dataclass(frozen=True)
class LayerRow:
    """What quantization costs at one layer. SQNR = 10 log10(sum ref^2 / sum err^2) in dB, at most 200 in size.

    `isolated`: the layer alone, fed the float program's values, quantized; `accumulated`: in the quantized program.
    None where the float program has no such value. `low`, `high`: what the layer's output can hold. `bytes`: of the
    parameters that the layer reads.
    """

    name: str
    op: str
    sqnr_isolated_db: float | None
    sqnr_accumulated_db: float | None
    low: float
    high: float
    scale: float
    zero_point: int
    bytes: int


def check_layers(program: Program, inputs: Sequence[torch.Tensor], load: Load = make_session) -> LayerParity:
    """Feed each layer in ONNX Runtime the integers that the PyTorch simulation had on `inputs`, and compare.

    `inputs` are the flat input tensors of one batch. Examples go through one at a time where the batch is dynamic.
    `load` loads the model into another runtime.
    Raises `VerificationError` for a program without quantized activations.
    """
    cut = cut_program(program)
    steps = _Steps(program, cut, load)
    for example in examples(program, inputs):
        steps.add(example, *_simulated(program, cut, example))
        return_memory()
    return steps.parity()


def layer_table(float_program: Program, quantized_program: Program, inputs: Sequence[torch.Tensor]) -> list[LayerRow]:
    """One row for each quantized activation, in order. `float_program` is the program just before quantization."""
    losses = _Losses(float_program, quantized_program, cut_program(quantized_program))
    for example in examples(quantized_program, inputs):
        losses.add(example, _simulated(quantized_program, losses.cut, example)[0])
        return_memory()
    return losses.rows()


def judge_layers(
    float_program: Program, program: Program, inputs: Sequence[torch.Tensor]
) -> tuple[LayerParity, list[LayerRow]]:
    """`check_layers` and `layer_table` on the same examples, each of which is simulated once.

    The integers of all examples are kept until the runtime is asked: they take far less than its session does, which is
    made when the float values are gone.
    """
    cut = cut_program(program)
    losses = _Losses(float_program, program, cut)
    kept = []
    for example in examples(program, inputs):
        values, outputs = _simulated(program, cut, example)
        losses.add(example, values)
        kept.append((example, values, outputs))
        return_memory()
    steps = _Steps(program, cut, make_session)
    for simulated in kept:
        steps.add(*simulated)
        return_memory()
    return steps.parity(), losses.rows()


def _simulated(program: Program, cut: Cut, example: tuple[torch.Tensor, ...]) -> tuple[Values, list[torch.Tensor]]:
    """The integers at every site, by name, and the outputs."""
    return watch(program, leaves(program, example), {s.node.name for s in cut.sites})


# -- the same in both? ----------------------------------------------------------------------------------------------


class _Steps:
    """How far ONNX Runtime is from the simulation at each site, over examples."""

    def __init__(self, program: Program, cut: Cut, load: Load) -> None:
        if not cut.sites:
            raise VerificationError(
                "the program has no quantized activations", hint="use check_parity for float programs"
            )
        self.sites, self.session = cut.sites, load(lower(cut.program))
        self.counters = [_StepCounter() for _ in cut.sites]
        self.worst = 0.0

    def add(self, example: tuple[torch.Tensor, ...], values: Values, outputs: list[torch.Tensor]) -> None:
        """Compare one batch, for which the simulation gave `values` and `outputs`."""
        integers = [to_numpy(values[s.node.name]) for s in self.sites]
        results = self.session.run(*map(to_numpy, example), *integers)
        for counter, ours, theirs in zip(self.counters, results, integers):
            counter.add(ours, theirs)
        floats = zip(results[len(integers) :], map(to_numpy, outputs))
        pairs = [(ours, theirs) for ours, theirs in floats if theirs.dtype.kind == "f"]
        found = (relative(*differences(ours, theirs.reshape(ours.shape))) for ours, theirs in pairs)
        self.worst = max(self.worst, *found, 0.0)

    def parity(self) -> LayerParity:
        counters = self.counters
        layers = tuple(LayerSteps(s.layer, c.most, c.share) for s, c in zip(self.sites, counters))
        equal, total = sum(c.equal for c in counters), sum(c.count for c in counters)
        return LayerParity(layers, max(c.most for c in counters), equal / max(total, 1), self.worst)


@dataclass
class _StepCounter:
    most: int = 0
    equal: int = 0
    count: int = 0

    @property
    def share(self) -> float:
        return self.equal / self.count if self.count else 1.0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        steps = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))
        self.most = max(self.most, int(steps.max(initial=0)))
        self.equal += int((steps == 0).sum())
        self.count += steps.size


# -- what quantization costs ----------------------------------------------------------------------------------------


class _Losses:
    """What quantization costs at each site, over examples."""

    def __init__(self, float_program: Program, quantized_program: Program, cut: Cut) -> None:
        self.floating, self.quantized, self.cut = float_program, quantized_program, cut
        self.noises = [(Sqnr(), Sqnr()) for _ in cut.sites]

    def add(self, example: tuple[torch.Tensor, ...], values: Values) -> None:
        """Take in one batch, for which the simulation gave `values`."""
        sites = self.cut.sites
        references, _ = watch(self.floating, leaves(self.floating, example), {s.layer for s in sites})
        fed = [_fed(site, references, values) for site in sites]
        _, results = watch(self.cut.program, [*example, *fed], set())
        for site, (isolated, accumulated), result in zip(sites, self.noises, results):
            value = values[site.node.name]
            reference = _reference(site, references, value)
            if reference is not None:
                isolated.add(reference, dequantize(result, site.scale, site.zero_point))
                accumulated.add(reference, dequantize(value, site.scale, site.zero_point))

    def rows(self) -> list[LayerRow]:
        noises = zip(self.cut.sites, self.noises)
        return [_row(site, self.quantized, isolated, accumulated) for site, (isolated, accumulated) in noises]


def _reference(site: Site, references: dict[str, torch.Tensor], value: torch.Tensor) -> torch.Tensor | None:
    """The float program's value of a site; one that is a reshape of it there (tokens as a matrix) is reshaped."""
    reference = references.get(site.layer)
    if reference is None or reference.numel() != value.numel():
        return None
    return reference.reshape(value.shape)


def _fed(site: Site, references: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float program's value, quantized; the quantized program's own where the float program has none."""
    value = values[site.node.name]
    reference = _reference(site, references, value)
    if reference is None:
        return value
    return quantize(reference, site.scale, site.zero_point, site.dtype)


def _row(site: Site, program: Program, isolated: Sqnr, accumulated: Sqnr) -> LayerRow:
    low, high = site.bounds
    return LayerRow(
        name=site.layer,
        op=leading_op(site),
        sqnr_isolated_db=isolated.decibel,
        sqnr_accumulated_db=accumulated.decibel,
        low=low,
        high=high,
        scale=site.scale,
        zero_point=site.zero_point,
        bytes=weight_bytes(site, program),
    )
