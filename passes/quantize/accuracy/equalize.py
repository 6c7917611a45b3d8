"""Cross-layer equalization and bias absorption: even out the ranges of channels before they share one scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ....frontend.program import Program, layer_name
from ...base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from ...fuse_batchnorm import LAYERS, pads, scale_inputs, store_weights
from ...prune.recovery.partial_run import PartialRun
from ...rewrite import argument, aten, constant, find, is_op
from .scaling import (
    Link,
    Reader,
    divide_outputs,
    find_link,
    groups_of,
    input_ranges,
    multiply_inputs,
    output_ranges,
)
from .trials import Batch, Samples, judge_quantized, split_samples

_ROUNDS = 20
_SETTLED = 1e-3  # the largest |log factor| of a round after which another changes nothing worth having
_LIMIT = 1e4  # a factor beyond it would only move rounding noise
_FIT, _JUDGE = 64, 32

When = Literal["helps", "always"]


@register_pass
@dataclass(frozen=True)
class Equalize(Pass):
    """Even out the weight ranges of neighbouring layers, channel by channel, and absorb high biases.

    Nagel et al. 2019 (arXiv 1906.04721), sections 4.1 and 4.1.3. A layer, an activation f with f(s x) = s f(x) and the
    layers that read it compute the same when channel i leaves the first divided by s_i and is multiplied by s_i in the
    others. With r1, r2 the largest weights that write and read a channel, s = sqrt(r1 / r2) gives both sqrt(r1 r2);
    pair after pair, until nothing changes.
    Then a channel that is above c > 0 wherever the samples went passes ReLU unchanged, so c moves through it:
    b1' = b1 - c, b2' = b2 + W2 c. (The paper takes c from BatchNorm's statistics; here it is the least value seen on
    the calibration samples and the example inputs, so an input unlike all of them may differ.)

    Legal when (1) all that read the intermediate are such layers, through ops that commute with scaling (ReLU,
    LeakyReLU, pooling, zero padding, moves); (2) the weights belong to one layer alone; (3) for absorption, no reader
    pads with zeros. ReLU6 and other clamps are left alone: their bound would differ from channel to channel.
    With `when=helps`, both programs are quantized on calibration samples and the pass keeps the better.
    """

    name = "equalize"
    preserves = frozenset({VALUES, INTERFACE})

    when: When = "helps"
    absorb: bool = True

    def run(self, program: Program, context: Context) -> Change:
        links, notes = find_links(program)
        if not links:
            return Change(0, notes or ["nothing to equalize: no layer is read by layers alone"])
        samples = _samples(self, program, context)
        trial = program.copy()
        count = _apply(trial, find_links(trial)[0], samples, self.absorb)
        told = f"equalizing {len(links)} layers" + (f" and absorbing {count} biases" if count else "")
        if samples is not None and self.when == "helps":
            verdict = judge_quantized(program, trial, samples, context)
            told = verdict.told(told)
            if not verdict.helps:
                return Change(0, [told, *notes])
        program.graph_module = trial.graph_module
        return Change(len(links), [told, *notes])


def find_links(program: Program) -> tuple[list[Link], list[str]]:
    """All layers whose output channels can trade a factor with the layers that read them; reasons for the others."""
    links, notes = [], []
    for node in find(program, *LAYERS):
        found = find_link(program, node)
        if isinstance(found, Link):
            links.append(found)
        elif found is not None and "clamp" in found:
            notes.append(f"{layer_name(node)} not equalized: {found}")
    return links, notes


def _samples(item: Equalize, program: Program, context: Context) -> Samples | None:
    """None where neither judging nor absorption asks for data."""
    if item.when == "always" and (context.calibration is None or not item.absorb):
        return None
    return split_samples(program, context.calibration, _FIT, _JUDGE, "equalize{when=helps}")


def _apply(program: Program, links: list[Link], samples: Samples | None, absorb: bool) -> int:
    """Equalize in place. Returns how many channels' biases were absorbed."""
    for _ in range(_ROUNDS):
        if max(_equalize_link(program, link) for link in links) < _SETTLED:
            break
    if not absorb or samples is None:
        return 0
    return sum(_absorb_bias(program, link, samples.fit) for link in links)


def _equalize_link(program: Program, link: Link) -> float:
    """One step for one link. Returns the largest |log| of its factors."""
    written = output_ranges(program, link.producer)
    read = torch.stack([input_ranges(program, r, link.channels) for r in link.readers]).amax(0)
    factors = balanced(written, read)
    divide_outputs(program, link.producer, factors)
    for reader in link.readers:
        multiply_inputs(program, reader, factors)
    return float(factors.log().abs().max())


def balanced(written: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """s = sqrt(r1 / r2); 1 for a channel that nothing writes or reads."""
    dead = (written <= 0) | (read <= 0)
    ratio = torch.where(dead, 1.0, written / torch.where(dead, 1.0, read))
    return ratio.sqrt().clamp(1 / _LIMIT, _LIMIT)


# -- bias absorption -----------------------------------------------------------------------------------------------

_SHIFTING = (
    aten.relu.default, aten.leaky_relu.default, aten.dropout.default, aten.clone.default, aten.contiguous.default,
    aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.view.default, aten.reshape.default,
    aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.select.int, aten.slice.Tensor,
)  # fmt: skip


def _absorb_bias(program: Program, link: Link, batches: list[Batch]) -> int:
    """Move what is always above zero through the activation into the next bias. Returns the number of channels."""
    if not _can_absorb(link):
        return 0
    shift = least_values(program, link.producer, batches).clamp_min(0.0)
    if not bool((shift > 0).any()):
        return 0
    bias = constant(program, argument(link.producer, "bias"))
    weight = constant(program, link.producer.args[1])
    assert bias is not None
    assert weight is not None
    store_weights(program, link.producer, weight.detach(), bias.detach().double() - shift)
    for reader in link.readers:
        _add_shift(program, reader, shift)
    return int((shift > 0).sum())


def _can_absorb(link: Link) -> bool:
    plain = all(is_op(n, *_SHIFTING) for n in link.between) and any(is_op(n, aten.relu.default) for n in link.between)
    return plain and argument(link.producer, "bias") is not None and all(pads(r.node) is None for r in link.readers)


def _add_shift(program: Program, reader: Reader, shift: torch.Tensor) -> None:
    weight, bias = constant(program, reader.node.args[1]), constant(program, argument(reader.node, "bias"))
    assert weight is not None
    spread = shift.double().repeat_interleave(reader.repeat)
    _, added = scale_inputs(weight.detach().double(), torch.ones_like(spread), spread, groups_of(reader.node))
    old = 0.0 if bias is None else bias.detach().double()
    store_weights(program, reader.node, weight.detach(), old + added)


def least_values(program: Program, node: fx.Node, batches: Iterable[Batch]) -> torch.Tensor:
    """The least value of each channel of a layer's output over the batches and the example inputs, float64."""
    dim = 1 if node.target is not aten.linear.default else node.meta["val"].ndim - 1
    run = PartialRun(program, [node])
    example = tuple(x for x in program.example_inputs if isinstance(x, torch.Tensor))
    least = []
    with torch.no_grad():
        for batch in (example, *batches):
            least.append(run(batch)[node].transpose(0, dim).flatten(1).amin(1).double())
    return torch.stack(least).amin(0)
