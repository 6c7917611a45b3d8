"""What each atom of a placement takes in float and on integers, measured in ONNX Runtime on this machine.

The float model and the integer model are written once and cut into parts, one for each atom in either form; each part
is timed alone (`kernel_seconds`) and remembered by what it computes (`signature`). Left out are kernels that a part
has only because it was cut: changes of layout and conversions at its borders. Those that a border between float and
integers really needs are timed on their own, by the shape of the tensor, between two convolutions: QuantizeLinear or
DequantizeLinear with the changes of layout around it. What fuses in float (Conv + Add + Relu) is timed fused, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

import onnx

from ..backends.onnx.lower import lower
from ..backends.onnx.part import CONVERSIONS, Parts, node_of, signature
from ..frontend.program import Program, describe_tensors
from ..passes.base import Context, Pass
from ..passes.prune.budgets.units import at_batch_one, find_units
from ..passes.quantize.placement.atoms import Atoms, origin, with_origins
from ..passes.quantize.placement.minimum_cut import Atom, Problem, Saving, Tensor
from ..passes.verify import check_structure
from .conversions import Conversions, conversion_model, conversion_seconds
from .feed import example_tensors, take
from .latency import LatencyTable, kernel_seconds
from .layouts import Layouts, image
from .probes import PROBE, probed

_METHOD = "part-3"  # how parts are timed: figures that were measured otherwise are not taken
_LAYOUT = frozenset({"ReorderInput", "ReorderOutput"})


@dataclass
class PartClock:
    """Times parts and conversions, from the table where they are known. `measured` counts what was not."""

    table: LatencyTable
    threads: int = 1
    effort: float = 0.015
    measured: int = 0
    _seen: dict[str, float] = field(default_factory=dict)

    def part(self, model: onnx.ModelProto) -> float:
        """The kernel time of a part."""
        return self._known(f"{_METHOD} {signature(model)}", lambda: self._time_part(model))

    def conversions(self, shape: tuple[int, ...], within: bool) -> Conversions:
        """The conversions of a tensor; `within` a network there are changes of layout besides."""
        key = f"{_METHOD} conversions {list(shape)} {'within' if within else 'alone'}"
        measured: list[Conversions] = []

        def measure(name: str) -> float:
            if not measured:
                measured.append(conversion_seconds(conversion_model(shape, within), self.effort, self.threads))
            return float(getattr(measured[0], name))

        names = [f.name for f in fields(Conversions)]
        return Conversions(*(self._known(f"{name} {key}", functools.partial(measure, name)) for name in names))

    def _time_part(self, part: onnx.ModelProto) -> float:
        model = probed(part)
        between = model is not part
        own = {n.name for n in model.graph.node}
        outer = {v.name for v in (*model.graph.input, *model.graph.output)}
        borders = {n.name for n in model.graph.node if n.op_type in CONVERSIONS and _turns_float(n) in outer}

        def ignored(op: str, node: str) -> bool:
            if op in _LAYOUT or node in borders or node.startswith(PROBE):
                return True
            # The runtime adds transposes around integer convolutions; at the ends they are there for the cut alone.
            return op == "Transpose" and node not in own and not between

        return kernel_seconds(model.SerializeToString(), self.effort, self.threads, ignored)

    def _known(self, key: str, measure: Callable[[], float]) -> float:
        if key in self._seen:
            return self._seen[key]
        seconds = self.table.get(key)
        if seconds is None:
            seconds = measure()
            self.table.put(key, seconds)
            self.measured += 1
        self._seen[key] = seconds
        return seconds


def _turns_float(node: onnx.NodeProto) -> str:
    """The float end of a conversion."""
    return node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]


def measure_problem(
    program: Program,
    atoms: Atoms,
    passes: Iterable[Pass],
    context: Context,
    clock: PartClock,
    tell: Callable[[int, int], None] | None = None,
) -> Problem:
    """All costs of placing `program`, whose atoms are given; `passes` put all movable atoms on integers."""
    one = at_one_example(program)
    floating = _timed_parts(lower(one), {name: name for name in atoms.atom_of}, atoms)
    integer = _timed_parts(*_integer_model(one, passes, context), atoms)
    times = _Times(clock, floating, integer, tell)
    costs = [times.atom(i, atoms) for i in range(len(atoms.members))]
    chains = [_chain(unit.members, atoms) for unit in find_units(one)]
    savings = tuple(s for chain in chains for s in times.savings(chain, costs))
    costs.append(Atom("outputs"))
    layouts = Layouts(costs, lambda shape: clock.conversions(shape, True))
    tensors = tuple(_tensors(one, atoms, clock, layouts))
    clock.table.save()
    return Problem(tuple(layouts.atoms), (*tensors, *layouts.tensors), savings)


def at_one_example(program: Program) -> Program:
    """A copy with fixed shapes, for a single example."""
    one = at_batch_one(program)
    inputs, outputs = one.tensor_placeholders(), one.output_nodes()
    single = iter(take(program, example_tensors(program), 1))
    one.inputs = describe_tensors(inputs, [i.name for i in program.inputs], {})
    one.outputs = describe_tensors(outputs, [o.name for o in program.outputs], {})
    one.example_inputs = tuple(next(single) if hasattr(x, "shape") else x for x in program.example_inputs)
    return one


def _integer_model(one: Program, passes: Iterable[Pass], context: Context) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The quantized model, and for each of its nodes the float node that it was made of."""
    marked = with_origins(one)
    alone = Context(context.target, [example_tensors(one)], seed=context.seed)
    for item in passes:
        item.run(marked, alone)
    check_structure(marked, "placement")
    return lower(marked), {n.name: origin(n) for n in marked.graph.nodes}


def _timed_parts(
    model: onnx.ModelProto, origins: dict[str, str], atoms: Atoms
) -> Callable[[Iterable[int]], onnx.ModelProto | None]:
    """Atoms (by index) -> the part of `model` that computes them."""
    parts, atom_of = Parts(model), atoms.atom_of
    nodes: dict[int, list[onnx.NodeProto]] = {}
    for node in parts.nodes:
        atom = atom_of.get(origins.get(node_of(node), ""))
        if atom is not None:
            nodes.setdefault(atom, []).append(node)
    return lambda wanted: parts.part(n for i in wanted for n in nodes.get(i, ()))


@dataclass
class _Times:
    """Asks the clock for atoms and chains of atoms."""

    clock: PartClock
    floating: Callable[[Iterable[int]], onnx.ModelProto | None]
    integer: Callable[[Iterable[int]], onnx.ModelProto | None]
    tell: Callable[[int, int], None] | None = None

    def atom(self, index: int, atoms: Atoms) -> Atom:
        """The cost of one atom in both forms; what computes nothing of its own costs nothing."""
        if self.tell:
            self.tell(index, len(atoms.members))
        floating = self._seconds(self.floating, (index,))
        integer = self._seconds(self.integer, (index,)) if index in atoms.movable else None
        return Atom(atoms.members[index][0], floating, integer)

    def savings(self, chain: tuple[int, ...], costs: list[Atom]) -> Iterable[Saving]:
        """What atoms that fuse in float save, each against the chain before it."""
        before = costs[chain[0]].floating or 0.0
        for i in range(1, len(chain)):
            alone = costs[chain[i]].floating or 0.0
            together = self._seconds(self.floating, chain[: i + 1])
            if before + alone > together:
                yield Saving(chain[i - 1], chain[i], before + alone - together)
            before = together

    def _seconds(self, parts: Callable[[Iterable[int]], onnx.ModelProto | None], wanted: Iterable[int]) -> float:
        part = parts(wanted)
        return 0.0 if part is None else self.clock.part(part)


def _chain(members: Iterable[object], atoms: Atoms) -> tuple[int, ...]:
    """The atoms that a float kernel consists of, in order."""
    atom_of = atoms.atom_of
    indices = [atom_of[n.name] for n in members if n.name in atom_of]  # type: ignore[attr-defined]
    return tuple(dict.fromkeys(indices))


def _tensors(one: Program, atoms: Atoms, clock: PartClock, layouts: Layouts) -> Iterable[Tensor]:
    """The conversions of all values that somebody could take as integers."""
    named, outside = {n.name: n for n in one.graph.nodes}, len(atoms.members)
    atom_of = atoms.atom_of
    for name, readers in atoms.values:
        node, producer = named[name], atom_of[name]
        layouts.pass_on(node, producer, [(u, atom_of[u.name]) for u in node.users if u.name in atom_of])
        if producer in atoms.movable or not atoms.movable.isdisjoint(readers):
            shape = tuple(int(s) for s in node.meta["val"].shape)
            times = clock.conversions(shape, within=image(node) is not None)
            yield Tensor(
                producer, tuple(outside if r < 0 else r for r in readers), times.quantize, times.dequantize
            )
