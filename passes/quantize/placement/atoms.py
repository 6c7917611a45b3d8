"""What decides together: a float program seen as atoms, and what `annotate` makes of a list of names.

An atom is what becomes one integer kernel: an op that the table computes on integers with the activation that it
absorbs, a split with its parts. All other ops are atoms of their own, which stay in float. A placement is a set of
float atoms; it is written as names for `keep_float`, so that a pipeline that says them needs no search.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ....frontend.program import Program, module_path
from ..annotate import annotate_program, annotation
from ..spec import Target

ORIGIN = "placement_origin"  # in a node's meta["custom"]: the float node that it was made of


@dataclass(frozen=True)
class Atoms:
    """`members[i]`: the names of the nodes of atom i, in graph order. `movable`: the atoms that have an integer form.

    `values`: (producing node, reading atoms) of every float tensor that passes between atoms; -1 is an output of the
    program, inputs are atoms of their own.
    """

    members: tuple[tuple[str, ...], ...]
    movable: frozenset[int]
    values: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def atom_of(self) -> dict[str, int]:
        """Node name -> index of its atom."""
        return {name: i for i, names in enumerate(self.members) for name in names}

    def floats_of(self, integers: Collection[str]) -> frozenset[int]:
        """The atoms none of whose nodes is among `integers`."""
        wanted = set(integers)
        return frozenset(i for i, names in enumerate(self.members) if wanted.isdisjoint(names))


def find_atoms(
    program: Program, target: Target, keep_float: Sequence[str] = (), use_integer: Sequence[str] = ()
) -> Atoms:
    """The atoms of a float program, given what the user keeps in float in any case."""
    groups = integer_groups(program, target, keep_float, use_integer)
    together = {name: group for group in groups for name in group}
    members: list[tuple[str, ...]] = []
    index: dict[str, int] = {}
    for node in _computing(program):
        if node.name in index:
            continue
        group = together.get(node.name, (node.name,))
        index.update(dict.fromkeys(group, len(members)))
        members.append(group)
    movable = frozenset(index[group[0]] for group in groups)
    return Atoms(tuple(members), movable, tuple(_values(program, index)))


def integer_groups(
    program: Program, target: Target, keep_float: Sequence[str] = (), use_integer: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """What `annotate` computes on integers, by names of the float program: what shares a kernel is one group."""
    marked = with_origins(program)
    annotate_program(marked, target, keep_float, use_integer)
    order = {node.name: i for i, node in enumerate(program.graph.nodes)}
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for node in marked.graph.nodes:
        note = annotation(node)
        if note is None:
            continue
        partners = [n for n in (note.output, *_parts(node)) if n is not None]
        for partner in (node, *partners):
            leader[find(origin(partner))] = find(origin(node))
    groups: dict[str, list[str]] = {}
    for name in leader:
        groups.setdefault(find(name), []).append(name)
    return [tuple(sorted(g, key=order.__getitem__)) for g in groups.values()]


def _parts(node: fx.Node) -> Iterable[fx.Node]:
    """The parts of a split, which are on integers exactly if it is."""
    return () if isinstance(node.meta.get("val"), torch.Tensor) else node.users


def with_origins(program: Program) -> Program:
    """A copy of the graph, its weights shared, in which every node knows its name (see `origin`) through all passes."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, new)
    graph.output(result)
    graph.set_codegen(program.graph._codegen)
    for before, after in new.items():
        after.meta["custom"] = {**(before.meta.get("custom") or {}), ORIGIN: before.name}
    output = next(n for n in program.graph.nodes if n.op == "output")
    next(n for n in graph.nodes if n.op == "output").meta = dict(output.meta)
    module = fx.GraphModule(program.graph_module, graph)
    module.meta.update({k: v for k, v in program.graph_module.meta.items() if k != "observers"})
    return Program(module, program.example_inputs, program.inputs, program.outputs)


def origin(node: fx.Node) -> str:
    """The name of the node of the float program that this one was made of; "" for none."""
    return str((node.meta.get("custom") or {}).get(ORIGIN, ""))


def _computing(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op in ("placeholder", "call_function")]


def _values(program: Program, index: dict[str, int]) -> Iterable[tuple[str, tuple[int, ...]]]:
    outputs = set(program.output_nodes())
    for node in _computing(program):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        readers = {index[u.name] for u in node.users if u.name in index} - {index[node.name]}
        if node in outputs:
            readers.add(-1)
        if readers:
            yield node.name, tuple(sorted(readers))


# -- names ---------------------------------------------------------------------------------------------------------


def names_for(program: Program, floats: Collection[str], integers: Collection[str]) -> tuple[str, ...]:
    """`floats` as names for `keep_float`: whole modules where none of their nodes is among `integers`, else nodes.

    Nodes that are in neither collection are in float whatever is said of them.
    """
    wanted, forbidden = set(floats), set(integers) - set(floats)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    spoiled = {path for n in nodes if n.name in forbidden for path in _paths(n)} | {n.name for n in nodes}
    names: dict[str, None] = {}
    for node in nodes:
        if node.name in wanted:
            whole = next((p for p in reversed(_paths(node)) if p not in spoiled), None)
            names[whole or node.name] = None
    return tuple(names)


def _paths(node: fx.Node) -> list[str]:
    """The modules around a node, the innermost first."""
    paths, path = [], module_path(node)
    while path:
        paths.append(path)
        path = path.rpartition(".")[0]
    return paths
