"""Learned rounding: weight by weight up or down, so that each block gives what it gave in float."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import fx

from ....errors import OptionError
from ....frontend.batch_dim import batched
from ....frontend.program import Program
from ...base import INTERFACE, Change, Context, Pass, register_pass
from ...prune.recovery.partial_run import PartialRun
from ...rewrite import constant, is_op, update_constant
from ..annotate import annotation
from ..spec import Target
from ..stem import blocked_weight
from .blocks import Block, find_blocks
from .correct_bias import sample_means, shift_bias, typical
from .float_twin import FLOAT_TWIN, IntegerLayer, Twins, make_twins
from .soft_rounding import SoftWeight, differentiable, sharpness, soften
from .trials import Batch, Verdict, judge_outputs, required_target, split_samples

_JUDGE = 64
_CHUNK = 16  # samples in a step
_BYTES = 1 << 29  # of the samples' values at the ends of a block; fewer samples are taken where they would need more
_TRAVEL = 6.0  # learning rate times steps: how far v can go, which is 5 from one end of its range to the other
_WARM_UP = 0.2  # share of the steps without regularizer
_DECIDE = 1.0  # weight of the regularizer against the error, which is 1 where all weights are rounded to nearest

Pair = tuple[fx.Node, fx.Node]


@register_pass
@dataclass(frozen=True)
class LearnRounding(Pass):
    """Learn which weights to round up and which down, block by block, on unlabelled samples.

    Rounding to nearest is the best for single weights and not for a layer: errors can cancel. AdaRound (Nagel et al.
    2020, arXiv 2004.10568) relaxes each decision to a number in [0, 1], trains it so that the layer gives what the
    float one gave, and hardens it; here blocks are reconstructed as in BRECQ (Li et al. 2021, arXiv 2102.05426), fed by
    the quantized layers before them, with the activations quantized (the gradient passes their rounding unchanged).
    The scales stay, so the result is int8 weights like any others. The least squared error shrinks what it is uncertain
    of, so the mean of each layer's output is put right by its bias (see `correct-bias`). A block whose error on
    held-out samples does not fall keeps its weights, and the program keeps all where its outputs come no closer.

    `steps` of Adam for each block on 16 samples each; all blocks together take about `seconds` at most (then the steps
    become fewer, and the result depends on how fast the machine is). At most `samples` calibration samples are held in
    memory, fewer where their values at the ends of a block would exceed 512 MB.
    """

    name = "learn-rounding"
    preserves = frozenset({INTERFACE})
    reads = frozenset({FLOAT_TWIN})

    steps: int = 300
    seconds: float = 600.0
    samples: int = 256

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 1 or not self.seconds > 0:
            raise OptionError("learn-rounding needs steps, seconds and samples above 0", hint="leave them out")

    def run(self, program: Program, context: Context) -> Change:
        trial = program.copy()
        twins = make_twins(trial, context, self.name)
        blocks = find_blocks(twins)
        held = min(self.samples, samples_within(blocks, _BYTES))
        samples = split_samples(program, context.calibration, held, min(_JUDGE, held), self.name)
        learning = Learning(twins, required_target(context), self.steps, time.monotonic() + self.seconds, context)
        learned = learning.run(blocks, samples.fit, samples.judge)
        trial.graph_module.recompile()
        verdict = Verdict(*judge_outputs(twins.floating, [program, trial], samples.judge))
        layers = sum(len(b.layers) for b in blocks)
        notes = [verdict.told(f"learning the rounding of {learned} of {layers} layers, with the biases of all")]
        if learning.short:
            notes.append(f"{learning.short} blocks had fewer than {self.steps} steps: raise seconds to give them all")
        if verdict.helps:
            program.graph_module = trial.graph_module
        return Change(layers if verdict.helps else 0, notes)


def samples_within(blocks: list[Block], limit: int) -> int:
    """How many samples fit into `limit` bytes where most are held: at both ends of a block, in both programs."""
    largest = max(sum(map(_sample_bytes, _ends(b))) for b in blocks)
    return max(1, limit // max(2 * largest, 1))


def _ends(block: Block) -> list[fx.Node]:
    return [pair[0] for pair in ((block.start,) if block.start else ()) + block.ends]


def _sample_bytes(node: fx.Node) -> int:
    """The bytes of one sample's float32 values, from the sizes that are known (another is the batch)."""
    size = 4
    for dim in node.meta["val"].shape:
        size *= dim if isinstance(dim, int) else 1
    return size


# -- block after block ---------------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    """Some samples on their way through both programs: the inputs, and the values at the last cut."""

    batch: Batch
    quantized: dict[fx.Node, torch.Tensor]
    floating: dict[fx.Node, torch.Tensor]


@dataclass
class _Task:
    """What to learn: the layers, what they read, what they should give, on chunks to fit and chunks to judge."""

    layers: tuple[IntegerLayer, ...]
    given: tuple[fx.Node, ...]
    ends: tuple[Pair, ...]
    fit: list[_Example]
    judge: list[_Example]

    def error(self, program: Program, examples: list[_Example]) -> float:
        """The mean relative error of the ends over examples."""
        run = PartialRun(program, [n for n, _ in self.ends], self.given)
        total = 0.0
        for example in examples:
            with torch.no_grad():
                total += float(_error(run(example.batch, example.given), self, example))
        return total / len(examples)


@dataclass
class _Example:
    """One chunk: what the layers read in the quantized program, what they should give, their own float mean outputs."""

    batch: Batch
    given: dict[fx.Node, torch.Tensor]
    wanted: list[torch.Tensor]
    means: dict[IntegerLayer, torch.Tensor]


@dataclass
class Learning:
    """Goes through the blocks and learns each; `short` counts those for which the time did not suffice."""

    twins: Twins
    target: Target
    steps: int
    deadline: float
    context: Context
    short: int = 0

    def run(self, blocks: list[Block], fit: list[Batch], judge: list[Batch]) -> int:
        """Learn in place. Returns how many layers have other weights than before."""
        chunks = [[_Chunk(b, {}, {}) for b in _chunked(self.twins.program, part)] for part in (fit, judge)]
        changed = 0
        for number, block in enumerate(blocks):
            tasks = [block] if block.whole else [_alone(layer) for layer in block.layers]
            for place, unit in enumerate(tasks):
                left = sum(len(b.layers) for b in blocks[number + 1 :]) + sum(len(t.layers) for t in tasks[place:])
                seconds = max(0.0, self.deadline - time.monotonic()) * len(unit.layers) / left
                task = self._task(block, unit, chunks)
                changed += self._learn(task, seconds)
            for part in chunks:
                self._advance(block, part)
            if self.context.progress:
                self.context.progress(LearnRounding.name, number + 1, len(blocks))
        return changed

    def _task(self, block: Block, unit: Block, chunks: list[list[_Chunk]]) -> _Task:
        """Run both programs from the block's start to what the unit reads and should give."""
        given = unit.start[:1] if unit.start else ()
        inner = unit is not block
        start = block.start[:1] if block.start else ()
        twin_start = block.start[1:] if block.start else ()
        reads = PartialRun(self.twins.program, given, start) if inner else None
        twins = [twin for _, twin in unit.ends] + [k.twin for k in unit.layers]
        gives = PartialRun(self.twins.floating, twins, twin_start)
        examples = [[_example(c, unit, reads, gives) for c in part] for part in chunks]
        return _Task(unit.layers, given, unit.ends, *examples)

    def _advance(self, block: Block, chunks: list[_Chunk]) -> None:
        """Move the chunks from the start of a block to its end."""
        start, twin_start = (block.start[:1], block.start[1:]) if block.start else ((), ())
        runs = (
            PartialRun(self.twins.program, [node for node, _ in block.ends], start),
            PartialRun(self.twins.floating, [twin for _, twin in block.ends], twin_start),
        )
        for chunk in chunks:
            with torch.no_grad():
                chunk.quantized = runs[0](chunk.batch, chunk.quantized)
                chunk.floating = runs[1](chunk.batch, chunk.floating)

    def _learn(self, task: _Task, seconds: float) -> int:
        """Learn one task; keep the result where the judged error falls. Returns the number of changed layers."""
        program = self.twins.program
        soft = {k: s for k in task.layers if (s := self._soften(k)) is not None}
        if not soft:
            return 0
        before = {k: constant(program, k.weight) for k in soft}
        scale = task.error(program, task.fit)
        error = self._corrected_error(task)
        finished = _train(program, task, soft, scale, _Budget(self.steps, seconds, self.context.seed))
        self.short += not finished
        for layer, weight in soft.items():
            old = before[layer]
            assert old is not None
            update_constant(program, layer.weight, weight.integers().detach().to(old.dtype))
        if self._corrected_error(task) < error:
            return len(soft)
        for layer, old in before.items():
            assert old is not None
            update_constant(program, layer.weight, old)
        self._corrected_error(task)
        return 0

    def _corrected_error(self, task: _Task) -> float:
        """The judged error once the mean of each layer's output is that of the float one."""
        for layer in task.layers:
            run = PartialRun(self.twins.program, [layer.node], task.given)
            shifts = []
            for example in task.fit:
                with torch.no_grad():
                    value = run(example.batch, example.given)[layer.node]
                shifts.append(example.means[layer] - sample_means(layer.node, value, example.batch))
            shift_bias(self.twins.program, layer, typical(torch.cat(shifts)), self.target)
        return task.error(self.twins.program, task.judge)

    def _soften(self, layer: IntegerLayer) -> SoftWeight | None:
        """The relaxed weights of a layer; None where nothing is lost by rounding to nearest, or the forms differ."""
        weight, stored = constant(self.twins.floating, layer.twin.args[1]), constant(self.twins.program, layer.weight)
        assert weight is not None
        assert stored is not None
        if _reads_blocks(layer.node):
            weight = blocked_weight(weight.detach(), layer.twin)
        if weight.shape != stored.shape:
            return None
        note = annotation(layer.twin)
        form = (note.row.weight if note else None) or self.target.weight
        soft = soften(weight, layer.scales, layer.axis, form.limits)
        lost = (weight.detach().float() / soft.scales - stored.float()).abs().max()
        return soft if lost > 1e-3 else None


def _example(chunk: _Chunk, unit: Block, reads: PartialRun | None, gives: PartialRun) -> _Example:
    with torch.no_grad():
        given = reads(chunk.batch, chunk.quantized) if reads else chunk.quantized
        wanted = gives(chunk.batch, chunk.floating)
    means = {k: sample_means(k.twin, wanted[k.twin], chunk.batch) for k in unit.layers}
    return _Example(chunk.batch, given, [wanted[twin] for _, twin in unit.ends], means)


def _alone(layer: IntegerLayer) -> Block:
    """One layer as a block: what it reads, and its output before its activation."""
    return Block((layer.node.args[0], layer.twin.args[0]), ((layer.node, layer.twin),), (layer,))  # type: ignore[arg-type]


def _reads_blocks(node: fx.Node) -> bool:
    """Is it a stem that was rewritten over blocks of pixels?"""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.op == "call_function":
        if is_op(source, torch.ops.fxpress.pixel_blocks.default):
            return True
        if not is_op(source, torch.ops.fxpress.dequantize.default, torch.ops.aten.constant_pad_nd.default):
            return False
        source = source.args[0]
    return False


def _chunked(program: Program, batches: list[Batch]) -> list[Batch]:
    """The samples in chunks for one step each; batches as they are where the program's batch is fixed."""
    if not all(batched(program.inputs)):
        return batches
    whole = tuple(torch.cat(parts) for parts in zip(*batches))
    return list(zip(*(x.split(_CHUNK) for x in whole)))


# -- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Budget:
    """Steps and seconds, whichever ends first."""

    steps: int
    seconds: float
    seed: int

    def share(self, step: int, started: float) -> float:
        """How much of it is spent, 0 to 1 and above."""
        return max(step / self.steps, (time.monotonic() - started) / max(self.seconds, 1e-9))


def _train(program: Program, task: _Task, soft: dict[IntegerLayer, SoftWeight], scale: float, budget: _Budget) -> bool:
    """Train the relaxed weights, the error in units of `scale`. Returns whether all steps were made.

    Where no gradient comes back (an op between has none), the weights stay as they are.
    """
    reads = {k: k.node.args[1] for k in soft}
    given = (*task.given, *reads.values())
    run = PartialRun(program, [n for n, _ in task.ends], given, differentiable())  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([s.v for s in soft.values()], _TRAVEL / budget.steps)
    generator = torch.Generator().manual_seed(budget.seed)
    count = sum(s.v.numel() for s in soft.values())
    started, step = time.monotonic(), 0
    while (share := budget.share(step, started)) < 1:
        example = task.fit[int(torch.randint(len(task.fit), (), generator=generator))]
        optimizer.zero_grad()
        with torch.enable_grad():
            values = {**example.given, **{reads[k]: s.value() for k, s in soft.items()}}
            loss = _error(run(example.batch, values), task, example) / max(scale, 1e-12)  # type: ignore[arg-type]
            if not loss.requires_grad:
                return True
            if share > _WARM_UP:
                loss = loss + _DECIDE / count * sum(s.undecided(sharpness(share, _WARM_UP)) for s in soft.values())
            loss.backward()
        optimizer.step()
        step += 1
    return step >= budget.steps


def _error(values: dict[fx.Node, torch.Tensor], task: _Task, example: _Example) -> torch.Tensor:
    """Squared error relative to the power of what is wanted, averaged over the ends."""
    terms = [
        (values[node].reshape(wanted.shape) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-20)
        for (node, _), wanted in zip(task.ends, example.wanted)
        if wanted.is_floating_point()
    ]
    return torch.stack(terms).mean()
