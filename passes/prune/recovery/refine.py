"""Train a pruned program to do as its reference does, on unlabelled data: distillation after the least squares.

    loss = mean over matched nodes of relative(node), the i-th weighing i  +  1/20 mean over outputs of relative(output)
    relative(node) = E |pruned - kept part of the reference|^2 / E |reference - its mean|^2

The matched nodes are among those that least squares matched layer by layer: the sums of residual branches, if there are
any. Here all weights move together, by Muon (muon.py) with a warm-up and a cosine decay. Matching features
and not only outputs is from Romero et al. 2015 ("FitNets"), matching logits by squares from Ba and Caruana 2014.
Outputs weigh little: a few hundred examples are soon known by heart, and their scores say less about others than their
features do. (ResNet-20 at 1.5x, divergence of the predictions on held-out train images after 15 epochs: 0.080 before,
0.058 with weight 1, 0.047 with 1/5, 0.042 with 1/20; docs/results.md.) Late nodes weigh more: what an early one misses
can still be mended, and the last ones decide (0.032 for 0.034 after 60 epochs). BatchNorm stays in evaluation: its
scale and shift are trained, its statistics stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....errors import OptionError
from ....frontend.program import Program
from .linear_layers import linear_layer
from .muon import Muon, lookup_tables
from .pairing import Pair
from .partial_run import PartialRun
from .reconstruct import reconstruct
from .shuffle import Augment, Batch, shuffled
from .targets import Target, Values, targets

_WARM_UP = 0.1  # share of the steps
_OUTPUT_WEIGHT = 0.05
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Schedule:
    """How to train: `epochs` over the data, the peak `learning_rate`, examples in a step, how inputs are varied.

    `bfloat16`: compute layers in bfloat16 (weights and their updates stay as they are), faster where the processor has
    instructions for it.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    augment: Augment
    bfloat16: bool
    seed: int


def refine(
    pair: Pair,
    batches: Iterable[Batch],
    schedule: Schedule,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Train `pair.pruned` in place. Returns relative(output) on the data as they are, before and after.

    At the end, the layers that give the outputs are solved for once more, since what they read has changed. Where the
    outputs got no better, all weights are put back. Plans with single zeroed weights are refused: OptionError.
    """
    if pair.plan.masks:
        raise OptionError("training would fill the zeros of a sparse plan", hint="leave epochs out")
    loss = Loss(pair)
    weights = [p for p in pair.pruned.parameters() if p.is_floating_point()]
    saved = {name: tensor.detach().clone() for name, tensor in pair.pruned.state_dict().items()}
    before = loss.of_outputs(batches)
    with _trainable(weights):
        _train(loss, weights, batches, schedule, progress)
    reconstruct(pair, batches, last=True)
    after = loss.of_outputs(batches)
    if not after < before:
        with torch.no_grad():
            for name, tensor in pair.pruned.state_dict().items():
                tensor.copy_(saved[name])
        after = before
    return before, after


class Loss:
    """How far the pruned program is from the reference on one batch, at the outputs and at the matched nodes."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self.program = pair.pruned
        self._outputs = list(dict.fromkeys(pair.pruned.output_nodes()))
        self._features = [n for n in matched_nodes(pair) if n not in self._outputs]
        nodes = [*self._outputs, *self._features]
        self._partners = {n: p for n in nodes if (p := pair.counterpart(n)) is not None}
        self._pruned = PartialRun(pair.pruned, self._partners)
        self._reference = PartialRun(pair.reference, self._partners.values())

    def __call__(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            expected = self._reference(batch)
        values = self._pruned(batch)
        nodes = later_counts_more(self._terms(self._features, values, expected))
        return nodes + _OUTPUT_WEIGHT * self._mean(self._outputs, values, expected)

    def of_outputs(self, batches: Iterable[Batch]) -> float:
        """The mean relative(output) over batches."""
        losses = []
        with torch.no_grad():
            for batch in batches:
                losses.append(float(self._mean(self._outputs, self._pruned(batch), self._reference(batch))))
        return sum(losses) / max(len(losses), 1)

    def _mean(self, nodes: list[fx.Node], values: Values, expected: Values) -> torch.Tensor:
        terms = self._terms(nodes, values, expected)
        return torch.stack(terms).mean() if terms else torch.zeros(())

    def _terms(self, nodes: list[fx.Node], values: Values, expected: Values) -> list[torch.Tensor]:
        terms = [self._term(n, values[n], expected[self._partners[n]]) for n in nodes if n in self._partners]
        return [t for t in terms if t is not None]

    def _term(self, node: fx.Node, value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor | None:
        if not value.is_floating_point():
            return None
        value, expected = value.float(), self._pair.kept(node, expected).float()
        return (value - expected).square().mean() / expected.var().clamp_min(_SMALLEST)


def later_counts_more(terms: list[torch.Tensor]) -> torch.Tensor:
    """The mean of scalars in graph order, the i-th (from 1) with weight i; 0 for none."""
    if not terms:
        return torch.zeros(())
    weights = torch.arange(1.0, len(terms) + 1, device=terms[0].device)
    return (torch.stack(terms) * weights).sum() / weights.sum()


def matched_nodes(pair: Pair) -> list[fx.Node]:
    """What layers behind a loss may be asked to match, in graph order: sums of branches, or outputs where there is no
    sum in the program."""
    found = farthest(pair.pruned, lambda n: n in pair.affected, lambda n: pair.counterpart(n) is not None)
    chosen = {t.node for t in found if t.joining} or {t.node for t in found}
    return [n for n in pair.pruned.graph.nodes if n in chosen]


def farthest(program: Program, layers: Callable[[fx.Node], bool], allowed: Callable[[fx.Node], bool]) -> list[Target]:
    """For each of the linear `layers` the farthest `allowed` node that it flows into, in graph order."""
    chosen = [n for n in program.graph.nodes if layers(n) and linear_layer(program, n) is not None]
    found = [next((t for t in targets(n) if allowed(t.node)), None) for n in chosen]
    return [t for t in found if t is not None]


@contextmanager
def _trainable(weights: list[torch.nn.Parameter]) -> Iterator[None]:
    before = [w.requires_grad for w in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, value in zip(weights, before):
            weight.grad = None
            weight.requires_grad_(value)


def _train(
    loss: Loss,
    weights: list[torch.nn.Parameter],
    batches: Iterable[Batch],
    schedule: Schedule,
    progress: Callable[[int, int], None] | None,
) -> None:
    optimizer = Muon(_groups(loss.program, weights), schedule.learning_rate)
    generator = torch.Generator().manual_seed(schedule.seed)
    steps = 0  # in an epoch; known after the first, of which the warm-up is a part
    for epoch in range(schedule.epochs):
        number = 0
        for batch in shuffled(loss.program, batches, schedule.batch_size, generator):
            share = number / steps if steps else 0.5
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * rate((epoch + share) / schedule.epochs)
            optimizer.zero_grad()
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
                loss(schedule.augment(batch, generator)).backward()
            optimizer.step()
            number += 1
        steps = number
        if progress:
            progress(epoch + 1, schedule.epochs)


def _groups(program: Program, weights: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    tables = lookup_tables(program)
    names = {id(p): n for n, p in program.named_parameters()}
    looked_up = [w for w in weights if names[id(w)] in tables]
    others = [w for w in weights if names[id(w)] not in tables]
    return [g for g in ({"params": others}, {"params": looked_up, "matrices": False}) if g["params"]]


def rate(done: float) -> float:
    """The learning rate relative to its peak when the share `done` of the training is over."""
    if done < _WARM_UP:
        return 0.1 + 0.9 * done / _WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP))
