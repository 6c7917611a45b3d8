"""What a pruned program will take in the runtime, from measured parts: the cost of a latency budget.

    latency(keep) = sum over units of table(sizes that the unit has under `keep`)

A unit (see `units`) is analysed by itself, its borders left open, which tells its independent sizes: channels in and
channels out of a convolution, one for a depthwise one, heads and features of an attention. Units alike share a table.
With one or two sizes the table is a grid of measured counts, piecewise linear between them; with more, the times are
fitted by a roofline, t = a + b MACs + c bytes (Williams et al. 2009), with coefficients that are not negative. Both
are monotone, as kernels are but for noise. That a network's latency is close to the sum of those of its ops, looked
up in a table, is from ProxylessNAS (Cai et al. 2019) and NetAdapt (Yang et al. 2018).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import fx

from ....errors import PruningError
from ....frontend.program import Program
from ...rewrite import fake_mode_of
from ..analysis import Analysis
from ..axes import Axes, Reason, Vector
from ..rules.table import relate
from ..slicing import Cut, slice_program
from .budget import Budget, Selection, keep_mask, select
from .choices import Choice, allowed_counts, granule
from .costs import Cost, Term, macs_cost
from .measuring import OpLatencies
from .units import Unit, describe, extract, find_units

GRAIN = 16  # counts in a table are multiples of it (of less in narrow layers) where the user asks for no rounding
_LEVELS = 5  # counts of each size in a table
_POINTS = 1500  # measurements for a program at most; more would make tables coarser instead
_TRIES = 6  # whole models measured for one plan at most
_PAIRS = 20  # changes of two groups at once whose cost is looked up
_SAME = 1e-3  # relative difference of two questions to the table that have one answer
_CLOSE = 0.01  # relative distance of the measured ratio from the budget at which no more are tried

Counts = tuple[int, ...]


# -- one unit by itself -------------------------------------------------------------------------------------------


def analyze_open(program: Program) -> Analysis:
    """The axes of a part of a program: unlike those of a whole one, its inputs and outputs may change."""
    analysis = Analysis(program)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            analysis.values[node] = analysis.tensor_axes(str(node.target))
        elif node.op == "placeholder":
            analysis.values[node] = tuple(analysis.atoms.fresh(n) for n in node.meta["val"].shape)
        elif node.op == "call_function":
            analysis.values[node] = relate(analysis, node)
    return analysis


@dataclass(frozen=True)
class Size:
    """An independent size of a unit: literals of the unit's own analysis, and the positions of the whole program's
    atoms that say which of them are kept, as [slots, literals, positions of each]."""

    literals: Vector
    slots: Vector

    def count(self, keep: Vector) -> int:
        """How many are kept under a mask over the whole program's atoms."""
        return int(keep[self.slots].all(axis=0).any(axis=-1).sum())


class UnitModel:
    """A unit of a whole program's analysis, with its independent sizes, from which it can be built smaller."""

    def __init__(self, whole: Analysis, unit: Unit) -> None:
        self.whole, self.unit = whole, unit
        self.program = extract(whole.program, unit)
        self.local = analyze_open(self.program)
        self._pin_what_stays()
        self.sizes = self._find_sizes()

    @property
    def full(self) -> Counts:
        """All sizes, unpruned."""
        return tuple(len(s.literals) for s in self.sizes)

    @cached_property
    def key(self) -> str:
        """All that the unit's time depends on, but for the counts: ops, arguments, shapes, dtypes."""
        number = {n: f"%{i}" for i, n in enumerate(self.program.graph.nodes)}
        text = [f"{n.op if n.op != 'call_function' else n.target}{_arguments(n, number)}" for n in number]
        values = [v for n in number if isinstance(v := n.meta.get("val"), torch.Tensor)]
        shapes = [f"{v.dtype}{tuple(v.shape)}" for v in values]
        pinned = [f"{s.literals.tolist()[:1]}x{len(s.literals)}" for s in self.sizes]
        return f"{';'.join(text)} {','.join(shapes)} {pinned}"

    def keep(self, counts: Counts) -> Vector:
        """A mask over the unit's own atoms: the first `counts` literals of each size."""
        mask = np.ones(self.local.atoms.count, dtype=bool)
        for size, count in zip(self.sizes, counts):
            mask[size.literals[count:]] = False
        return mask

    def build(self, counts: Counts) -> Program:
        """The unit with these sizes. Its weights are slices of the program's own."""
        program = extract(self.whole.program, self.unit)
        if counts != self.full:
            cut = Cut(analyze_open(program), self.keep(counts))  # numbers its literals as `local` does
            for node in program.tensor_placeholders():
                with fake_mode_of(program.graph):
                    form = node.meta["val"]
                    node.meta["val"] = torch.empty(cut.sizes(cut.analysis.axes(node)), dtype=form.dtype)
            slice_program(cut)
            describe(program)
        return program

    @cached_property
    def _work(self) -> tuple[Cost, Cost]:
        """MACs and bytes moved, as costs over the unit's own atoms."""
        moved = [Term("", 4.0 * prod(len(v) for v in axes if not v.any()), tuple(v for v in axes if v.any()))
                 for axes, _ in self._borders()]  # fmt: skip
        return macs_cost(self.local), Cost(self.local, moved)

    def work(self, counts: Counts) -> Vector:
        """[1, MACs, bytes moved] with these sizes: what a roofline is linear in."""
        mask = self.keep(counts)
        return np.array([1.0, *(cost(mask) for cost in self._work)])

    def _borders(self) -> Iterator[tuple[Axes, Axes]]:
        """(axes here, axes in the whole program) of all tensors that go in and out, and of the weights."""
        inner = [*self.program.tensor_placeholders(), *self.program.output_nodes()]
        tensors = [n for n in self.unit.outputs if isinstance(n.meta["val"], torch.Tensor)]
        for here, there in zip(inner, [*self.unit.inputs, *tensors]):
            yield self.local.axes(here), self.whole.axes(there)
        for name, axes in self.local.tensors.items():
            yield axes, self.whole.tensors[name]

    def _vectors(self) -> Iterator[tuple[Vector, Vector]]:
        for here, there in self._borders():
            yield from ((a, b) for a, b in zip(here, there) if a.any())

    def _pin_what_stays(self) -> None:
        for here, there in self._vectors():
            stays = self.whole.atoms.pinned(self.whole.atoms.resolve(there)).all(axis=0)
            self.local.atoms.pin(here[stays], Reason("pinned in the whole program"))

    def _find_sizes(self) -> list[Size]:
        """Free literals that occur in the same vectors are one size."""
        atoms, vectors = self.local.atoms, list(self._vectors())
        occurs = np.zeros((len(vectors), atoms.count), dtype=bool)
        for row, (here, _) in zip(occurs, vectors):
            literals = atoms.literals(here)
            row[literals[~atoms.pinned(literals)]] = True
        free = np.flatnonzero(occurs.any(axis=0))
        _, first, index = np.unique(occurs[:, free], axis=1, return_index=True, return_inverse=True)
        members = [free[index.ravel() == index.ravel()[f]] for f in np.sort(first)]
        return [self._size(m, *vectors[int(occurs[:, m[0]].argmax())]) for m in members]

    def _size(self, literals: Vector, here: Vector, there: Vector) -> Size:
        slots = self.local.atoms.resolve(here)
        places = [np.flatnonzero((slots == literal).any(axis=0)) for literal in literals]
        width = max(map(len, places))
        positions = np.stack([np.resize(p, width) for p in places])
        return Size(literals, self.whole.atoms.resolve(there)[:, positions])


def _arguments(node: fx.Node, number: dict[fx.Node, str]) -> str:
    args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(number[n]))
    return str(args)


class _Name(str):
    """A node's number in the text of a key, printed without quotes."""

    __repr__ = str.__str__


# -- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Seconds at a grid of counts, piecewise linear between them and constant below the least."""

    levels: tuple[Vector, ...]
    seconds: Vector

    def __call__(self, counts: Counts) -> float:
        values = self.seconds
        for levels, count in zip(self.levels, counts):
            right = int(np.clip(np.searchsorted(levels, count), 1, max(len(levels) - 1, 1)))
            if len(levels) == 1:
                values = values[0]
                continue
            low, high = levels[right - 1], levels[right]
            share = min(max((count - low) / (high - low), 0.0), 1.0)
            values = values[right - 1] * (1 - share) + values[right] * share
        return float(values)


@dataclass(frozen=True)
class Roofline:
    """Seconds as a combination of 1, MACs and bytes moved."""

    model: UnitModel
    coefficients: Vector

    def __call__(self, counts: Counts) -> float:
        return float(self.coefficients @ self.model.work(counts))


def monotone(values: Vector) -> Vector:
    """The mean of the least monotone array above and the greatest below: what noise bends is made straight."""
    above, below = values, values
    for axis in range(values.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    return (above + below) / 2


def fit_roofline(work: Vector, seconds: Vector) -> Vector:
    """Coefficients >= 0 with the least relative squared error; `work` is [points, 3]."""
    best, least = np.zeros(work.shape[1]), np.inf
    scaled = work / seconds[:, None]
    for size in range(1, work.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(work.shape[1]), size)):
            part = np.linalg.lstsq(scaled[:, chosen], np.ones(len(work)), rcond=None)[0]
            error = float(np.square(scaled[:, chosen] @ part - 1).sum())
            if (part >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(work.shape[1]), error
                best[chosen] = part
    return best


def table_levels(size: int, round_to: int, most: int) -> Vector:
    """Up to `most` counts for a size, all of them included, at multiples of its rounding."""
    step = granule(size, round_to)
    counts = allowed_counts(size, step, step)
    if len(counts) > most:
        counts = counts[np.unique(np.linspace(0, len(counts) - 1, most).round().astype(int))]
    return counts


def _points(full: Counts, levels: Sequence[Vector]) -> list[Counts]:
    """Where to measure: the whole grid of up to two sizes; of more, all alike and each by itself."""
    if len(full) <= 2:
        return [tuple(map(int, p)) for p in itertools.product(*levels)]
    alike = [tuple(int(v[min(i, len(v) - 1)]) for v in levels) for i in range(max(map(len, levels)))]
    single = [(*full[:i], int(levels[i][len(levels[i]) // 2]), *full[i + 1 :]) for i in range(min(len(full), 8))]
    return list(dict.fromkeys([*alike, *single, full]))


# -- the cost of a program ----------------------------------------------------------------------------------------


class LatencyCost:
    """Seconds of one example as a function of what is kept. Making one measures what the table does not know."""

    def __init__(self, analysis: Analysis, latencies: OpLatencies, round_to: int | None = None) -> None:
        units = [u for u in find_units(analysis.program) if u.outputs and u.inputs]
        self.models = [UnitModel(analysis, u) for u in units]
        self._round_to = round_to if round_to and round_to > 1 else GRAIN
        distinct = {m.key: m for m in self.models}
        tables = self._measure(distinct, latencies)
        self._tables = [tables[m.key] for m in self.models]
        self._counters: dict[bytes, Size] = {}
        self._numbers = [[self._number(s) for s in m.sizes] for m in self.models]

    @property
    def names(self) -> list[str]:
        """The name of each unit, by its first node."""
        return [m.unit.name for m in self.models]

    def parts(self, keep: Vector) -> Vector:
        """The seconds of each unit."""
        counts = {key: size.count(keep) for key, size in self._counters.items()}
        sized = [tuple(counts[n] for n in numbers) for numbers in self._numbers]
        return np.array([table(c) for table, c in zip(self._tables, sized)])

    def __call__(self, keep: Vector) -> float:
        return float(self.parts(keep).sum())

    def _number(self, size: Size) -> bytes:
        key = size.slots.tobytes() + bytes(str(size.slots.shape), "ascii")
        self._counters.setdefault(key, size)
        return key

    def _measure(self, distinct: dict[str, UnitModel], clock: OpLatencies) -> dict[str, Callable[[Counts], float]]:
        plans = self._plan(distinct)
        total, done = sum(len(p) for _, p in plans.values()), 0
        tables: dict[str, Callable[[Counts], float]] = {}
        try:
            for key, (levels, points) in plans.items():
                clock.tell(done, total)
                tables[key] = measure_table(distinct[key], levels, points, clock)
                done += len(points)
        finally:
            clock.save()
        return tables

    def _plan(self, distinct: dict[str, UnitModel]) -> dict[str, tuple[list[Vector], list[Counts]]]:
        """Levels and points of every table: as fine as the number of measurements allows."""
        for most in range(_LEVELS, 1, -1):
            plans = {}
            for key, model in distinct.items():
                levels = [table_levels(n, self._round_to, most) for n in model.full]
                plans[key] = (levels, _points(model.full, levels))
            if sum(len(p) for _, p in plans.values()) <= _POINTS:
                break
        return plans


def measure_table(
    model: UnitModel, levels: Sequence[Vector], points: Sequence[Counts], clock: OpLatencies
) -> Callable[[Counts], float]:
    """The table of one unit from its times at `points`."""
    times = [clock.seconds(f"{model.key} @ {p}", lambda p=p: model.build(p)) for p in points]  # type: ignore[misc]
    if len(levels) <= 2:
        return Grid(tuple(levels), monotone(np.array(times).reshape([len(v) for v in levels])))
    work = np.stack([model.work(p) for p in points])
    return Roofline(model, fit_roofline(work, np.maximum(times, 1e-9)))


# -- meeting a latency budget ---------------------------------------------------------------------------------------


def select_latency(
    analysis: Analysis, choices: list[Choice], budget: Budget, clock: OpLatencies, ratio_of: Callable[[Vector], float]
) -> Selection:
    """Keep what makes the measured latency of the whole program the budget's share of the unpruned one.

    The table says what to prune; `ratio_of` (mask -> measured ratio) says how fast that is in truth, and the share that
    is asked of the table is corrected by the secant until both agree. Where its answers are too coarse for that, one
    group or two keep a step more or less. By layer, every unit meets the share by itself as the table has it, and the
    whole is measured only to be told.
    """
    cost = LatencyCost(analysis, clock, budget.limits.round_to)
    tried = _Tried(choices, budget.share, ratio_of)
    if budget.share == 1 or budget.scope == "layer":
        tried.measure(select(analysis, choices, budget, cost))
        at_limit = False
    else:
        ask = lambda share: select(analysis, choices, replace(budget, share=share), cost)  # noqa: E731
        at_limit = _ask_table(tried, budget, ask)
        _look_around(tried, analysis, cost)
    measured, best, _ = tried.best
    note = _measured_note(budget, measured, len(tried.known), at_limit)
    layers = [n for n in best.notes if "ended at" not in n]  # what the table says of the total was measured instead
    return replace(best, notes=[note, *layers])


class _Tried:
    """The whole models that were timed: (ratio, selection, counts of the choices), by what they keep."""

    def __init__(self, choices: list[Choice], share: float, ratio_of: Callable[[Vector], float]) -> None:
        self.choices, self.share, self._ratio_of = choices, share, ratio_of
        self.known: dict[bytes, tuple[float, Selection, Counts]] = {}

    def measure(self, selection: Selection) -> float:
        """The ratio of what the choices keep now, timed if it is new."""
        key = selection.keep.tobytes()
        if key not in self.known:
            self.known[key] = self._ratio_of(selection.keep), selection, tuple(c.count for c in self.choices)
        return self.known[key][0]

    @property
    def best(self) -> tuple[float, Selection, Counts]:
        return min(self.known.values(), key=lambda k: abs(k[0] / self.share - 1))

    @property
    def done(self) -> bool:
        """Is one close enough, or has enough been timed?"""
        return len(self.known) >= _TRIES or (bool(self.known) and abs(self.best[0] / self.share - 1) <= _CLOSE)


def _ask_table(tried: _Tried, budget: Budget, answer: Callable[[float], Selection]) -> bool:
    """Time what the table says is of some share, until the share asked for is measured or two questions have one
    answer. Returns whether less was asked for than can be. Raises PruningError if already the budget cannot be met."""
    known, impossible = [(1.0, 1.0)], 0.0
    asked, before, repeated = budget.share, 1.0, False
    while not tried.done and not (repeated and abs(asked - before) < _SAME * asked):
        before, timed = asked, len(tried.known)
        try:
            known.append((asked, tried.measure(answer(asked))))
        except PruningError:
            if not tried.known:
                raise
            impossible = asked
        else:
            repeated = len(tried.known) == timed
        asked = next_share(budget.share, known, halve=repeated)
        if asked <= impossible:
            asked = (impossible + min(a for a, _ in known)) / 2
    return impossible > 0


def _look_around(tried: _Tried, analysis: Analysis, cost: LatencyCost) -> None:
    """Time what keeps a step more or less of one or two groups than the best, as long as the table, put right by what
    was measured of the best, has one nearer to the budget."""
    while not tried.done:
        measured, best, counts = tried.best
        seconds = cost(best.keep)
        wanted = seconds * tried.share / measured
        steps = [(i, n) for i, c in enumerate(tried.choices) for n in (counts[i] - 1, counts[i] + 1)
                 if 0 <= n < len(c.allowed)]  # fmt: skip
        change = {step: cost(_set(tried.choices, counts, [step], analysis)) - seconds for step in steps}
        pairs = ((a, b) for a, b in itertools.combinations(steps, 2) if a[0] != b[0])
        near = heapq.nsmallest(_PAIRS, pairs, key=lambda m: abs(seconds + change[m[0]] + change[m[1]] - wanted))
        moves: list[tuple[tuple[int, int], ...]] = [*((s,) for s in steps), *near]
        nearest, chosen = abs(seconds - wanted), None
        for move in moves:
            keep = _set(tried.choices, counts, move, analysis)
            distance = abs(cost(keep) - wanted)
            if distance < nearest and keep.tobytes() not in tried.known:
                nearest, chosen = distance, move
        if chosen is None:
            return
        keep = _set(tried.choices, counts, chosen, analysis)
        tried.measure(replace(best, keep=keep, cost=cost(keep)))


def _set(choices: list[Choice], counts: Counts, move: Iterable[tuple[int, int]], analysis: Analysis) -> Vector:
    """What is kept with these counts, but for the (choice, count) of `move`."""
    changed = dict(move)
    for i, (choice, count) in enumerate(zip(choices, counts)):
        choice.count = changed.get(i, count)
    return keep_mask(analysis, choices)


def next_share(wanted: float, known: Sequence[tuple[float, float]], halve: bool = False) -> float:
    """What to ask of the table so that `wanted` is measured, from known (asked, measured): between the nearest on both
    sides, or beyond the two nearest above, but not less than half. `halve` takes the middle between both sides, for
    where the secant only finds what is known: steps."""
    above, *higher = sorted((k for k in known if k[1] >= wanted), key=lambda k: (k[1], k[0]))
    below = max((k for k in known if k[1] < wanted), key=lambda k: (k[1], k[0]), default=None)
    if below is None:
        far = next(((a, m) for a, m in higher if a > above[0] and m > above[1]), (0.0, 0.0))
        asked = above[0] - (above[1] - wanted) * (far[0] - above[0]) / (far[1] - above[1])
        return max(asked, above[0] / 2, 1e-3)
    share = 0.5 if halve or above[1] == below[1] else (wanted - below[1]) / (above[1] - below[1])
    return below[0] + (above[0] - below[0]) * share


def _measured_note(budget: Budget, measured: float, tries: int, at_limit: bool) -> str:
    note = f"measured latency is {measured:.3f} of the unpruned model ({tries} models timed)"
    if abs(measured / budget.share - 1) <= _CLOSE:
        return note
    note += f" instead of {budget.share:g}: "
    if budget.scope == "layer":
        return note + "every layer meets that by itself, as far as it can"
    if at_limit and measured > budget.share:
        return note + "no more may be removed"
    return note + "the steps in which channels save time, and the noise of timing, are no finer"
