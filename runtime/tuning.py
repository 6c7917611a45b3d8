"""Measured placement: which ops of a model run on integers on this machine, and which stay in float.

1. The model with all on integers is timed against float, as a whole.
2. Each atom is timed alone in both forms (`atom_costs`), and the best placement of these figures is found exactly
   (`minimum_cut`): the cut.
3. The figures are brought in line with the two whole models that are known, all float and all integer, by a factor
   each, and cut again; and with dearer and cheaper conversions. Each different answer is timed as a whole model.
4. What is fastest so far is refined: regions in which it differs from other placements, the first layer and depthwise
   convolutions are turned over, one at a time, the most promising first, until the time is spent.
5. The best few are timed again, with fresh sessions. A placement must beat all integer by more than such timings
   scatter to be preferred to it.

Steps 1 and 5 decide; 2 to 4 only propose. The outcome is written as options of `quantize` (`keep_float`, `forms`), so
that the pipeline makes the same model again without tuning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import QuantizationError
from ..frontend.cost import op_name
from ..frontend.program import Program
from ..frontend.sqnr import LIMIT_DB
from ..passes.base import Context, Pass
from ..passes.quantize.placement.atoms import Atoms, find_atoms, integer_groups, names_for
from ..passes.quantize.placement.minimum_cut import Problem
from ..passes.quantize.placement.regions import regions
from ..passes.quantize.placement.trials import flat_steps
from ..passes.quantize.spec import Target
from ..passes.rewrite import argument, argument_names
from .atom_costs import PartClock, measure_problem
from .latency import LatencyTable, environment_key
from .placement_trials import Placement, Trial, TrialBench, deciding

_WORTH = 0.01  # a gain below this is not told from none
_LOSS_DB = 1.0  # how much less faithful than all integer a placement may be
_FINALISTS = 3
_PINS = 8
_PATIENCE = 4  # refinements in a row that gain nothing
# Errors of the figures that are allowed for: conversions, float kernels.
_DOUBTS = ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 0.85), (1.0, 1.15))

Tell = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Tuning:
    """What was found: the best placement, all integer beside it, and all trials. `measured`: parts that were timed,
    not known from an earlier run. `told` is the speed of all integer over float by the figures of single ops."""

    best: Trial
    integer: Trial
    trials: tuple[Trial, ...]
    measured: int
    seconds: float
    told: float = 1.0

    @property
    def notes(self) -> list[str]:
        """What was moved and what it gained, for people."""
        best, integer = self.best, self.integer
        head = f"tuned: {len(self.trials)} placements timed as whole models in {self.seconds:.0f} s"
        if best.placement == integer.placement:
            return [f"{head}; all integer is the fastest ({integer.speed:.2f}x float, {integer.sqnr_db:.1f} dB)"]
        moved = len(integer.placement.integers - best.placement.integers)
        added = len(best.placement.integers - integer.placement.integers)
        if not best.placement.integers:
            return [f"{head}; all in float, since no mixed form is faster (all integer: {integer.speed:.2f}x float)"]
        return [
            f"{head}; {best.placement.name}: {moved} nodes moved to float, {added} to integers",
            f"speed over float {integer.speed:.2f}x -> {best.speed:.2f}x, "
            f"SQNR on {integer.sqnr_db:.1f} -> {best.sqnr_db:.1f} dB (ranges by minmax on few samples)",
        ]


def tune(
    program: Program,
    passes: Sequence[Pass],
    context: Context,
    samples: tuple[torch.Tensor, ...],
    *,
    threads: int = 1,
    cache: Path | None = None,
    seconds: float = 60.0,
    trial_seconds: float = 1.0,
    tell: Tell | None = None,
) -> Tuning:
    """Find the fastest placement of a float `program` that `passes` (from quantization on) will quantize.

    `samples` are flat inputs to calibrate trials and to judge SQNR on. `cache` is the folder of the latency table.
    About `seconds` are spent; a trial runs for `trial_seconds`.
    Raises QuantizationError where nothing can be quantized.
    """
    assert context.target is not None
    bench = TrialBench(program, passes, context, samples, threads, trial_seconds)
    clock = PartClock(LatencyTable(cache, environment_key(threads)), threads)
    search = _Search(bench, clock, time.monotonic(), seconds, tell)
    return search.run()


@dataclass
class _Search:
    bench: TrialBench
    clock: PartClock
    started: float
    seconds: float
    tell: Tell | None
    trials: list[Trial] = field(default_factory=list)
    factor: float = 1.0
    told: float = 1.0
    _seen: dict[frozenset[str], Trial | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.bench.program
        asked = deciding(self.bench.passes)
        self.keep_float, self.use_integer = tuple(asked.keep_float), tuple(asked.use_integer)
        assert self.bench.context.target is not None
        self.plain: Target = self.bench.context.target
        self.target, self.forms = self._with_all_forms(tuple(asked.forms))
        self.asked = asked
        self.atoms: Atoms = find_atoms(self.program, self.target, self.keep_float, self.use_integer)

    def _with_all_forms(self, asked: tuple[str, ...]) -> tuple[Target, tuple[str, ...]]:
        """Every optional form of the target that means something for this program is open to be chosen."""
        target, forms = self.plain.with_forms(asked), asked
        named = {f.removeprefix("-") for f in asked}
        for name in [n for n, on in target.forms.items() if not on and n not in named]:
            trial = target.with_forms([name])
            if self._integers(trial, self.keep_float) != self._integers(target, self.keep_float):
                target, forms = trial, (*forms, name)
        return target, forms

    # -- the steps --------------------------------------------------------------------------------------------------

    def run(self) -> Tuning:
        """All steps."""
        integer = self._try("all integer", self.keep_float, tuple(self.asked.forms))
        if integer is None:
            raise QuantizationError("nothing of the program can be quantized", hint="use the recipe `float`")
        problem = self._problem()
        everything = self._try_floats("all integer, all forms", self.program_floats())
        self._propose(problem, everything or integer)
        self._refine(problem)
        best, integer = self._finish(integer)
        spent = time.monotonic() - self.started
        return Tuning(best, integer, tuple(self.trials), self.clock.measured, spent, self.told)

    def program_floats(self) -> frozenset[int]:
        """The atoms that are in float in any case."""
        return frozenset(range(len(self.atoms.members))) - self.atoms.movable

    def _problem(self) -> Problem:
        full = Placement("", self.keep_float, self.forms, frozenset({""}))
        steps = flat_steps(self.bench.quick(full))

        def tell(done: int, total: int) -> None:
            if self.tell:
                self.tell("timing ops", done, total)

        return measure_problem(self.program, self.atoms, steps, self.bench.context, self.clock, tell)

    def _propose(self, problem: Problem, integer: Trial) -> None:
        """Steps 2 and 3."""
        told_integer = self._told(problem, self._floats(integer))
        told_float = self._told(problem, range(len(self.atoms.members)))
        # How much more float really takes, against integers, than the figures say.
        self.told = told_float / told_integer
        self.factor = integer.speed / self.told
        scales = [(1.0, 1.0), *((c, self.factor * f) for c, f in _DOUBTS)]
        for conversions, floating in scales:
            scaled = problem.scaled(conversions, floating)
            self._try_floats(f"cut (conversions x{conversions:g}, float x{floating:.2f})", self._realizable(scaled))

    def _told(self, problem: Problem, floats: Iterable[int]) -> float:
        """What the figures say of a placement."""
        outside = len(self.atoms.members)
        return problem.seconds(problem.completed({*floats, outside}, outside + 1))

    def _realizable(self, problem: Problem) -> frozenset[int]:
        """The best placement that `annotate` will make: what it refuses to put on integers is held in float."""
        floats = problem.solve()
        for _ in range(_PINS):
            refused = self._floats_of(self._names(floats)) - floats
            if not refused & self.atoms.movable:
                break
            problem = problem.held(floats=refused)
            floats = problem.solve()
        return floats

    def _refine(self, problem: Problem) -> None:
        """Step 4."""
        scaled = problem.scaled(1.0, self.factor)
        tried: set[frozenset[int]] = set()
        vain = 0
        while self._time_left() and vain < _PATIENCE:
            best = self._best()
            now = self._floats(best)
            moves = [m for m in dict.fromkeys(self._moves(now)) if now ^ m not in tried]
            if not moves:
                return
            chosen = min(moves, key=lambda m: self._told(scaled, now ^ m))
            tried.add(now ^ chosen)
            origin = best.placement.name.split(" with ")[0]
            self._try_floats(f"{origin} with {self._called(chosen)} turned over", now ^ chosen)
            vain = 0 if self._best() is not best else vain + 1

    def _moves(self, now: frozenset[int]) -> Iterable[frozenset[int]]:
        """Sets of atoms to turn over."""
        for trial in self.trials:
            yield from regions(self.atoms, (now ^ self._floats(trial)) & self.atoms.movable)
        yield from regions(self.atoms, now & self.atoms.movable)
        yield from self._kinds(now)

    def _kinds(self, now: frozenset[int]) -> Iterable[frozenset[int]]:
        """The first layer; depthwise convolutions by the size of their kernels."""
        kinds: dict[str, set[int]] = {}
        index = self.atoms.atom_of
        for node in self.program.graph.nodes:
            atom = index.get(node.name)
            if atom not in self.atoms.movable or "conv" not in op_name(node):
                continue
            if not kinds:
                kinds["first"] = {atom}
            if "groups" in argument_names(node) and argument(node, "groups") > 1:
                size = tuple(node.args[1].meta["val"].shape[2:])
                kinds.setdefault(f"groups {size}", set()).add(atom)
        for atoms in kinds.values():
            for change in (frozenset(atoms - now), frozenset(atoms & now)):
                if change:
                    yield change

    def _called(self, atoms: frozenset[int]) -> str:
        names = [self.atoms.members[i][0] for i in sorted(atoms)]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    def _finish(self, integer: Trial) -> tuple[Trial, Trial]:
        """Step 5."""
        known = [t for t in self.trials if t.sqnr_db >= integer.sqnr_db - _LOSS_DB]
        finalists = sorted(known, key=lambda t: -t.speed)[:_FINALISTS]
        chosen = {t.placement: t for t in (integer, *finalists)}
        again = {p: self.bench.again(t) for p, t in chosen.items()}
        self.trials = [again.get(t.placement, t) for t in self.trials]
        start = again[integer.placement]
        rivals = sorted((t for t in again.values() if t is not start), key=lambda t: -t.speed)
        best = next((t for t in rivals if t.speed > start.speed * (1 + _WORTH) and t.low > start.high), start)
        if best.high < 1:
            nothing = Placement("all float", (), (), frozenset())
            best = Trial(nothing, 1.0, 1.0, 1.0, best.milliseconds * best.speed, LIMIT_DB)
        return best, start

    # -- trials ------------------------------------------------------------------------------------------------------

    def _best(self) -> Trial:
        return max(self.trials, key=lambda t: t.speed)

    def _time_left(self) -> bool:
        return time.monotonic() - self.started < self.seconds

    def _try_floats(self, name: str, floats: Iterable[int]) -> Trial | None:
        if not self._time_left():
            return None
        return self._try(name, self._names(frozenset(floats)), self.forms)

    def _try(self, name: str, keep_float: tuple[str, ...], forms: tuple[str, ...]) -> Trial | None:
        """Time a placement, unless one with the same nodes on integers was timed already."""
        integers = self._integers(self.plain.with_forms(forms), keep_float)
        if integers not in self._seen:
            self._seen[integers] = None
            if integers:
                if self.tell:
                    self.tell("timing whole models", len(self.trials), None)
                self._seen[integers] = self.bench.measure(Placement(name, keep_float, forms, integers))
                self.trials.append(self._seen[integers])  # type: ignore[arg-type]
        return self._seen[integers]

    # -- names, nodes and atoms --------------------------------------------------------------------------------------

    def _names(self, floats: frozenset[int]) -> tuple[str, ...]:
        """`keep_float` for a placement: the user's own names, then those that were moved."""
        moved = {n for i in floats & self.atoms.movable for n in self.atoms.members[i]}
        stay = {n for i in self.atoms.movable - floats for n in self.atoms.members[i]}
        return (*self.keep_float, *names_for(self.program, moved, stay))

    def _integers(self, target: Target, keep_float: Sequence[str]) -> frozenset[str]:
        groups = integer_groups(self.program, target, keep_float, self.use_integer)
        return frozenset(n for group in groups for n in group)

    def _floats_of(self, keep_float: tuple[str, ...]) -> frozenset[int]:
        return self.atoms.floats_of(self._integers(self.target, keep_float))

    def _floats(self, trial: Trial) -> frozenset[int]:
        return self.atoms.floats_of(trial.placement.integers)
