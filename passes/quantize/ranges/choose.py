"""Choose the range rule by measuring: fold with each candidate, run calibration samples, keep the most faithful.

No rule wins everywhere. Clipping by squared error is best on CIFAR ResNets; on MobileNetV2, where a few huge values in
the last blocks carry no meaning, the average of the samples' own ranges is 2.5 dB better (docs/results.md). The measure
is the SQNR of the program's outputs against the float program on unlabelled calibration samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ....frontend.program import Program
from ...base import Context
from ...rewrite import aten, call_before, erase_dead, find, is_op, replace
from ..fold import fold_program
from ..observe import sites_of
from ..spec import Target
from .observers import OBSERVERS, Candidates

_SAMPLES = 32


def choose_ranges(program: Program, target: Target, weight_ranges: str, context: Context) -> list[str]:
    """Settle on one rule for all `Candidates` in the program. Returns notes, none if nothing was to choose."""
    observers = [s.observer for s in sites_of(program).by_key.values()]
    candidates = [o for o in observers if isinstance(o, Candidates)]
    if not candidates or context.calibration is None:
        return []
    batches = list(_first_samples(program, context.calibration))
    expected = [program_outputs(program, batch) for batch in batches]
    scores = {}
    for rule in OBSERVERS:
        _choose(candidates, rule)
        trial = program.copy()
        fold_program(trial, target, weight_ranges)
        _stay_in_float(trial)
        scores[rule] = mean_sqnr(expected, (program_outputs(trial, b) for b in batches))
    best = max(scores, key=lambda rule: scores[rule])
    _choose(candidates, best)
    listed = ", ".join(f"{rule} {score:.1f} dB" for rule, score in scores.items())
    return [f"ranges by {best} (SQNR of the outputs on calibration samples: {listed})"]


def _stay_in_float(trial: Program) -> None:
    """Each quantize/dequantize pair as clamp(round(x / scale)) * scale: the same numbers without the way through
    integers and back, which takes three quarters of the time."""
    for node in find(trial, torch.ops.fxpress.dequantize.default):
        q = node.args[0]
        if is_op(q, torch.ops.fxpress.quantize.default):
            x, scale, zero_point, dtype = q.args  # type: ignore[union-attr, misc]
            limits = torch.iinfo(dtype)  # type: ignore[arg-type]
            steps = call_before(node, aten.round.default, call_before(node, aten.div.Tensor, x, scale))
            kept = call_before(node, aten.clamp.default, steps, limits.min - zero_point, limits.max - zero_point)  # type: ignore[operator]
            replace(node, call_before(node, aten.mul.Tensor, kept, node.args[1]))
    erase_dead(trial)
    trial.graph_module.recompile()


def _choose(candidates: list[Candidates], rule: str) -> None:
    for candidate in candidates:
        candidate.chosen = rule


def _first_samples(
    program: Program, calibration: Iterable[tuple[torch.Tensor, ...]]
) -> Iterable[tuple[torch.Tensor, ...]]:
    """Batches until `_SAMPLES` are reached; the last is cut where the program's batch is dynamic."""
    cut = all(i.dims and isinstance(i.dims[0], str) for i in program.inputs)
    total = 0
    for batch in calibration:
        yield tuple(x[: _SAMPLES - total] for x in batch) if cut else batch
        total += int(batch[0].shape[0]) if batch[0].ndim else 1
        if total >= _SAMPLES:
            return


def program_outputs(program: Program, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The flat outputs on one batch of flat input tensors."""
    given = iter(batch)
    leaves = [next(given) if isinstance(e, torch.Tensor) else e for e in program.example_inputs]
    return program.run_flat(leaves)


def mean_sqnr(expected: Iterable[tuple[torch.Tensor, ...]], got: Iterable[tuple[torch.Tensor, ...]]) -> float:
    """10 log10 of signal over error power in dB, over all batches, averaged over the outputs."""
    signal: dict[int, float] = {}
    error: dict[int, float] = {}
    for want, have in zip(expected, got):
        for i, (a, b) in enumerate(zip(want, have)):
            signal[i] = signal.get(i, 0.0) + float(a.double().pow(2).sum())
            error[i] = error.get(i, 0.0) + float((a.double() - b.double()).pow(2).sum())
    values = [10 * math.log10(max(signal[i], 1e-30) / max(error[i], 1e-30 * max(signal[i], 1.0))) for i in signal]
    return sum(values) / len(values) if values else 0.0
