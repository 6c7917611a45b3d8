"""Reconstruct the weights of a pruned program layer by layer, by least squares, without labels.

Each layer gets the weights with which its output, on the inputs that the pruned and already reconstructed layers before
it give, is closest to what the reference gives at the kept positions (He, Zhang and Sun 2017, "Channel pruning for
accelerating very deep neural networks"; the reference's clean output as target of the pruned network's inputs is the
asymmetric form of Zhang et al. 2015). Regressed is what is *missing*: with nothing missing, nothing changes.

Layers of the same depth (no one reads another's output) share a sweep over the data; a sweep only runs the part of both
networks that it needs. Moments are streamed, so memory does not grow with the number of samples. Of layers that see
very many positions of an example, some are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import fx

from ....frontend.batch_dim import batch_name, count_examples, some_examples
from ....frontend.program import Program, get_attribute, layer_name
from ...rewrite import argument, is_constant
from .least_squares import Correction, Moments, solve
from .linear_layers import LinearLayer, linear_layer
from .pairing import Pair, shared_weights
from .partial_run import Front, ancestors, by_depth
from .targets import Target, norm_scale, targets

Batch = tuple[torch.Tensor, ...]
CACHE_BYTES = 2**29
POSITIONS = 256  # of an example, in one layer
_GOLDEN = (sqrt(5) - 1) / 2
HELD_OUT = 5  # of so many examples one takes no part in the fit but judges it


@dataclass
class Reconstruction:
    """What was done: for each layer the root mean square of what its output misses, before and after."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    sweeps: int = 0
    notes: list[str] = field(default_factory=list)


def reconstruct(
    pair: Pair,
    batches: Iterable[Batch],
    ridge: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache_bytes: int = CACHE_BYTES,
    last: bool = False,
) -> Reconstruction:
    """Change the weights of `pair.pruned` in place, with `last` only of the layers that give the outputs.

    `batches` is read once for each depth. Up to `cache_bytes`, values that later layers
    cannot change are kept from one sweep for the next.
    """
    result = Reconstruction()
    layers = _solvable(pair, result)
    if last:
        outputs = set(pair.pruned.output_nodes())
        layers = [layer for layer in layers if targets(layer.node)[0].node in outputs]
    stages = _stages(pair, layers)
    nodes = [layer.node for stage in stages for layer in stage]
    waiting = set(nodes)
    partners = [p for n in nodes if (p := pair.counterpart(n)) is not None]
    fronts = Front(pair.pruned, nodes, cache_bytes // 2), Front(pair.reference, partners, cache_bytes // 2)
    for number, stage in enumerate(stages):
        jobs = [Job(pair, layer, t) for layer, t in _choose_targets(pair, stage, waiting)]
        _sweep(number, jobs, batches, pair, fronts, ridge is None)
        for job in jobs:
            job.finish(ridge, result)
        waiting -= {layer.node for layer in stage}
        result.sweeps += 1
        if progress:
            progress(number + 1, len(stages))
    return result


# -- which layers, in which order, to match what ------------------------------------------------------------------


def _solvable(pair: Pair, result: Reconstruction) -> list[LinearLayer]:
    """The layers behind a loss whose weights can be solved for, in graph order; why not, for the others."""
    shared, sparse = shared_weights(pair.pruned), {m.name for m in pair.plan.masks}
    chosen: list[LinearLayer] = []
    absorbed: set[fx.Node] = set()
    for node in pair.pruned.graph.nodes:
        layer = linear_layer(pair.pruned, node) if node in pair.affected and node not in absorbed else None
        if layer is None:
            continue
        reason = _obstacle(pair, layer, shared, sparse)
        if reason is not None:
            result.notes.append(f"{layer_name(node)} left alone: {reason}")
            continue
        chosen.append(layer)
        absorbed |= set(targets(node)[0].path)
    return chosen


def _obstacle(pair: Pair, layer: LinearLayer, shared: set[str], sparse: set[str]) -> str | None:
    names = {str(n.target) for n in (layer.weight, layer.bias) if n is not None}
    if names & shared:
        return "its weights are shared with other layers"
    if names & sparse:
        return "its weights are sparse, and least squares would fill the zeros"
    if pair.counterpart(layer.node) is None:
        return "the reference has no value that it should give"
    return None


def _stages(pair: Pair, layers: list[LinearLayer]) -> list[list[LinearLayer]]:
    by_node = {layer.node: layer for layer in layers}
    return [[by_node[n] for n in level] for level in by_depth(pair.pruned, by_node)]


def _choose_targets(
    pair: Pair, stage: list[LinearLayer], waiting: set[fx.Node]
) -> Iterator[tuple[LinearLayer, Target]]:
    """The farthest target of each layer whose other branches are final, and that no other layer of the stage has."""
    taken: set[fx.Node] = set()
    for layer in reversed(stage):  # the last one to join a sum mends it
        for target in targets(layer.node):
            unfinished = ancestors(target.joining) & (waiting - {layer.node}) if target.joining else set()
            if not unfinished and target.node not in taken and pair.counterpart(target.node) is not None:
                taken.add(target.node)
                yield layer, target
                break


# -- one layer ----------------------------------------------------------------------------------------------------


class Job:
    """One layer in one sweep: gathers the moments, then changes the weights."""

    def __init__(self, pair: Pair, layer: LinearLayer, target: Target) -> None:
        self.pair, self.layer, self.target = pair, layer, target
        self.matrix = layer.matrix(self._tensor(layer.weight))
        self.seen = 0
        self.fit, self.held = (Moments(*self.matrix.shape) for _ in range(2))

    @property
    def wanted(self) -> list[fx.Node]:
        """The nodes of the pruned program whose values are read."""
        return [self.layer.source, self.target.node, *self.target.needed]

    def observe(self, values: dict[fx.Node, torch.Tensor], expected: torch.Tensor, held: bool) -> None:
        """Add one batch: what is missing at the target, taken back to the layer, against the layer's input."""
        residual = expected.double() - values[self.target.node].double()
        residual = self.target.take_back(self.pair.pruned, residual, values)
        rows, outputs = self.layer.rows(values[self.layer.source]), self.layer.outputs(residual)
        some = self._some(rows.shape[1], len(residual))
        if some is not None:
            rows, outputs = rows[:, some], outputs[:, some]
        (self.held if held else self.fit).add(rows, outputs)

    def _some(self, rows: int, examples: int) -> torch.Tensor | None:
        """About POSITIONS of the rows of each example, the same however the data are batched; None for all."""
        step = rows / max(examples, 1) / POSITIONS
        start, self.seen = self.seen, self.seen + rows
        if step <= 1:
            return None
        # Multiples of the golden ratio are spread evenly, and fit no grid.
        place = torch.arange(start, start + rows, dtype=torch.float64) * _GOLDEN % 1
        return torch.nonzero(place < 1 / step).flatten()

    def finish(self, ridge: float | None, result: Reconstruction) -> None:
        """Solve, and put the new weights in place."""
        found = solve(self.fit, self.held if self.held.count else None, ridge, self._takes_shift())
        weight = self._tensor(self.layer.weight)
        with torch.no_grad():
            weight.copy_(self.layer.weights(self.matrix.double() + found.matrix))
            if self._takes_shift():
                self._shift(found)
        self._report(found, result)

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        return get_attribute(self.pair.pruned.graph_module, str(node.target)).detach()

    def _takes_shift(self) -> bool:
        return self.layer.bias is not None or self._norm_buffer() is not None

    def _norm_buffer(self) -> tuple[torch.Tensor, torch.Tensor | float] | None:
        """Where BatchNorm behind the layer takes a shift, and by what to multiply it."""
        norm = self.target.norm
        if norm is None:
            return None
        bias = argument(norm, "bias")
        if is_constant(bias):
            return self._tensor(bias), norm_scale(self.pair.pruned, norm)
        return self._tensor(argument(norm, "running_mean")), -1.0

    def _shift(self, found: Correction) -> None:
        if self.layer.bias is not None:
            bias = self._tensor(self.layer.bias)
            bias.copy_(bias.double() + found.shift.flatten())
            return
        place = self._norm_buffer()
        assert place is not None
        place[0].copy_(place[0].double() + found.shift.flatten() * place[1])

    def _report(self, found: Correction, result: Reconstruction) -> None:
        name = layer_name(self.layer.node)
        first, _ = result.errors.get(name, (sqrt(found.before), 0.0))
        result.errors[name] = (first, sqrt(found.after))


# -- sweeps -------------------------------------------------------------------------------------------------------


def _sweep(
    number: int, jobs: list[Job], batches: Iterable[Batch], pair: Pair, fronts: tuple[Front, Front], hold_out: bool
) -> None:
    """One pass over the data for all jobs."""
    partners = {job.target.node: p for job in jobs if (p := pair.counterpart(job.target.node)) is not None}
    pruned, reference = fronts
    pruned.start(number, [n for job in jobs for n in job.wanted])
    reference.start(number, partners.values())
    parts = divided(pair.reference, batches) if hold_out else ((b, False) for b in batches)
    with torch.no_grad():
        for index, (batch, held) in enumerate(parts):
            values, expected = pruned(index, batch), reference(index, batch)
            for job in jobs:
                node = job.target.node
                job.observe(values, pair.kept(node, expected[partners[node]]), held)


def divided(program: Program, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Split each batch into (examples to fit, False) and (every fifth example of the data, True).

    It is the same examples however the data are batched. Where the batch is fixed, every fifth batch is held out.
    """
    start, fixed = 0, batch_name(program.inputs) is None
    for number, batch in enumerate(batches):
        index = torch.arange(start, start + (1 if fixed else count_examples(program.inputs, batch)))
        start += len(index)
        for held in (False, True):
            part = (index % HELD_OUT == HELD_OUT - 1) == held
            if fixed:
                part = torch.tensor([(number % HELD_OUT == HELD_OUT - 1) == held])
            if part.all():
                yield batch, held
            elif part.any():
                yield some_examples(program.inputs, batch, part), held
