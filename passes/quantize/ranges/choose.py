"""Choose the range rule by measuring: run calibration samples with each candidate, keep the most faithful.

No rule wins everywhere. Clipping by squared error is best on CIFAR ResNets; on MobileNetV2, where a few huge values in
the last blocks carry no meaning, the average of the samples' own ranges is 2.5 dB better (docs/results.md). The measure
is the SQNR of the program's outputs against the float program on unlabelled calibration samples.

A rule that cuts ranges looks good on the samples whose values it keeps: on four samples of Inception the average was
1.3 dB better than min-max, on 32 of them 3.2 dB worse. So it must win by more than so few samples can tell.

A trial is not folded: the observed program runs with its weights rounded as folding will round them (once, for all
rules) and each observed value rounded where it is read. That leaves out the rounding of biases to int32.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ....frontend.batch_dim import count_examples, some_examples
from ....frontend.cost import count_macs
from ....frontend.program import Program
from ....frontend.sqnr import Sqnr
from ...base import Context
from ...rewrite import aten, find
from ..annotate import annotation
from ..fold import params_of, quantize_weight, weight_scales
from ..observe import Sites, sites_of
from ..running import Runner, in_parts
from ..spec import QuantParams, Target
from .observers import Candidates
from .rules import CANDIDATES
from .tie import tie_concatenations

_MOST_SAMPLES, _LEAST_SAMPLES = 32, 4
_SAFE = "minmax"  # cuts nothing that calibration has seen
_DOUBT_DB = 3.0  # over the root of the number of samples: by how much another rule must win
_WORK = 10e9  # multiplications that one trial may take, the least number of samples aside


def choose_ranges(
    program: Program, target: Target, weight_ranges: str, context: Context, tie: bool = True
) -> list[str]:
    """Settle on one rule for all `Candidates` in the program, and with `tie` on one scale for what is concatenated.

    Returns notes, none if nothing was to choose.
    """
    sites = sites_of(program)
    candidates = [s.observer for s in sites.by_key.values() if isinstance(s.observer, Candidates)]
    ties = tie and any(annotation(n) is not None for n in find(program, aten.cat.default))
    if not (candidates or ties) or not sites.samples or context.calibration is None:
        return []
    parts = list(_first_samples(program, context.calibration))
    with contextlib.closing(Runner(program)) as runner:
        expected = list(_outputs(runner, parts, {}))
    with contextlib.closing(Runner(program, functools.partial(_rounded_weights, target, weight_ranges))) as runner:

        def measure() -> float:
            return mean_sqnr(expected, _outputs(runner, parts, _roundings(sites, target)))

        count = sum(count_examples(program.inputs, part) for part in parts)
        notes, sqnr = _choose_rule(candidates, measure, count) if candidates else ([], None)
        if ties:
            notes += tie_concatenations(program, target, lambda key: params_of(sites, key, target), measure, sqnr)
    return notes


def _choose_rule(candidates: list[Candidates], measure: Callable[[], float], samples: int) -> tuple[list[str], float]:
    """Let the most faithful rule count, as far as so many samples can tell. Returns notes, and its SQNR in dB."""
    scores = {}
    for rule in CANDIDATES:
        _choose(candidates, rule)
        scores[rule] = measure()
    needed = scores[_SAFE] + _DOUBT_DB / math.sqrt(samples)
    best = max((r for r in scores if scores[r] > needed), key=lambda rule: scores[rule], default=_SAFE)
    _choose(candidates, best)
    listed = ", ".join(f"{rule} {score:.1f} dB" for rule, score in scores.items())
    return [f"ranges by {best} (SQNR of the outputs on {samples} calibration samples: {listed})"], scores[best]


def _choose(candidates: list[Candidates], rule: str) -> None:
    for candidate in candidates:
        candidate.chosen = rule


# -- trials --------------------------------------------------------------------------------------------------------


def _rounded_weights(target: Target, weight_ranges: str, node: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    """The weights of a layer as folding will round them; as they are where it stays in float."""
    note = annotation(node)
    if note is None or note.row.kind != "layer":
        return weight
    form = note.row.weight or target.weight
    scales = weight_scales(weight, form, weight_ranges)
    rounded = quantize_weight(weight, scales, form).float()
    return rounded.mul_(scales.reshape(-1, *[1] * (weight.ndim - 1)))


def _roundings(sites: Sites, target: Target) -> dict[int, QuantParams]:
    """How values are rounded, by key; moves leave rounded values as they are."""
    return {k: params_of(sites, k, target) for k, site in sites.by_key.items() if site.shared is None}


def _outputs(
    runner: Runner, parts: list[tuple[torch.Tensor, ...]], roundings: dict[int, QuantParams]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The flat outputs for each part."""
    for part in parts:
        result = runner.run_batch(part, functools.partial(_round, roundings))
        yield tuple(x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))


def _round(roundings: dict[int, QuantParams], key: int, value: torch.Tensor) -> torch.Tensor:
    """The value as its integers would give it back."""
    params = roundings.get(key)
    if params is None:
        return value
    limits = torch.iinfo(params.dtype)
    return torch.fake_quantize_per_tensor_affine(value, params.scale, params.zero_point, limits.min, limits.max)


def _first_samples(
    program: Program, calibration: Iterable[tuple[torch.Tensor, ...]]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Samples from the front, in parts as they are run: 32, fewer of a network that takes long."""
    wanted = min(_MOST_SAMPLES, max(_LEAST_SAMPLES, int(_WORK / max(count_macs(program), 1))))
    for batch in calibration:
        for part in in_parts(program, batch):
            yield some_examples(program.inputs, part, slice(wanted))
            wanted -= count_examples(program.inputs, part)
            if wanted <= 0:
                return


# -- the measure ---------------------------------------------------------------------------------------------------


def program_outputs(program: Program, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The flat outputs on one batch of flat input tensors."""
    given = iter(batch)
    leaves = [next(given) if isinstance(e, torch.Tensor) else e for e in program.example_inputs]
    return program.run_flat(leaves)


def mean_sqnr(expected: Iterable[tuple[torch.Tensor, ...]], got: Iterable[tuple[torch.Tensor, ...]]) -> float:
    """The SQNR over all batches, averaged over the outputs."""
    found: dict[int, Sqnr] = {}
    for want, have in zip(expected, got):
        for i, (a, b) in enumerate(zip(want, have)):
            found.setdefault(i, Sqnr()).add(a, b)
    values = [v for s in found.values() if (v := s.decibel) is not None]
    return sum(values) / len(values) if values else 0.0
