"""Units: the parts of a program that a runtime executes as one kernel, cut out so that each can be timed alone.

A unit is one op together with what a runtime folds or fuses into it: the BatchNorm and the elementwise ops that
follow it and are its only readers (Conv + BatchNorm + Add + ReLU). Ops that only rename dimensions cost nothing and
belong to no unit; what depends on no input is computed at compile time and travels with its reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ....frontend.cost import concrete, op_name
from ....frontend.program import Program, describe_tensors
from ...rewrite import fake_mode_of
from ...verify import refresh_values
from ..analysis import rows
from ..rules.elementwise import ELEMENTWISE_RULES, create

_RENAMING = """view reshape _unsafe_view flatten unflatten view_as reshape_as ravel squeeze unsqueeze alias detach
dropout contiguous lift_fresh_copy expand expand_as"""
RENAMING = frozenset(rows(_RENAMING, create))
FOLLOWERS = frozenset({"aten.batch_norm", *(n for n, rule in ELEMENTWISE_RULES.items() if rule is not create)})


@dataclass(frozen=True, eq=False)
class Unit:
    """Nodes that run together, the tensors that they read from elsewhere, and those of theirs that others read."""

    members: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The name of its first node."""
        return self.members[0].name


def at_batch_one(program: Program) -> Program:
    """A copy whose shapes are those of a single example, where the batch is dynamic; other dynamic sizes are those of
    the example inputs. The graph is the same, so that it still runs at any batch."""
    copy = program.copy()
    mode, placeholders = fake_mode_of(copy.graph), copy.tensor_placeholders()
    if mode is None:
        return copy
    first = next(iter(placeholders[0].meta["val"].shape), 1) if placeholders else 1
    symbol = None if isinstance(first, int) else first.node.expr
    for node in placeholders:
        val = node.meta["val"]
        sizes = [1 if not isinstance(n, int) and n.node.expr == symbol else concrete(n) for n in val.shape]
        with mode:
            node.meta["val"] = torch.empty(sizes, dtype=val.dtype)
    refresh_values(copy)
    return copy


def find_units(program: Program) -> list[Unit]:
    """All units, in graph order. Shapes must be concrete (`at_batch_one`)."""
    constants = constant_nodes(program)
    member: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node in constants or not _gives_tensors(node):
            continue
        if op_name(node) == "getitem":
            source = member.get(node.args[0])
            if source is not None:
                member[node] = source
                source.append(node)
        elif op_name(node) not in RENAMING:
            chain = _chain_before(node, member, constants)
            member[node] = chain
            chain.append(node)
    chains = {id(chain): chain for chain in member.values()}
    return [_unit(chain, constants) for chain in chains.values()]


def constant_nodes(program: Program) -> set[fx.Node]:
    """Nodes that depend on no input."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _chain_before(node: fx.Node, member: dict[fx.Node, list[fx.Node]], constants: set[fx.Node]) -> list[fx.Node]:
    """The chain that `node` continues: that of its latest operand, if `node` follows it and alone reads it."""
    operands = [n for n in node.all_input_nodes if n in member]
    if op_name(node) not in FOLLOWERS or not operands:
        return []
    last = max(operands)
    alone = len(last.users) == 1 and member[last][-1] is last
    return member[last] if alone else []


def _unit(members: list[fx.Node], constants: set[fx.Node]) -> Unit:
    own = set(members)
    read = dict.fromkeys(n for m in members for n in m.all_input_nodes if n not in own and n not in constants)
    outputs = [m for m in members if any(u not in own for u in m.users)]
    return Unit(tuple(members), tuple(n for n in read if _gives_tensors(n)), tuple(outputs))


def extract(program: Program, unit: Unit) -> Program:
    """The unit as a program of its own, whose inputs and outputs are named as the nodes. Weights are shared."""
    graph, new = fx.Graph(), {}
    for node in unit.inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta["val"] = node.meta["val"]
    wanted = _with_constants(unit, constant_nodes(program))
    for node in program.graph.nodes:
        if node in wanted and node not in new:
            new[node] = graph.node_copy(node, lambda n: new[n] if n in new else concrete(n.meta["val"]))
    tensors = [n for n in unit.outputs if isinstance(n.meta["val"], torch.Tensor)]
    graph.output(tuple(new[n] for n in tensors))
    graph.set_codegen(_codegen(len(unit.inputs), len(tensors)))
    module = fx.GraphModule(program.graph_module, graph)
    result = Program(module, (), (), ())
    describe(result)
    return result


def describe(program: Program) -> None:
    """Describe inputs, outputs and example inputs anew, from the shapes of an extracted program."""
    inputs, outputs = program.tensor_placeholders(), program.output_nodes()
    program.inputs = describe_tensors(inputs, [n.name for n in inputs], {})
    program.outputs = describe_tensors(outputs, [f"{n.name}_out" for n in outputs], {})
    generator = torch.Generator().manual_seed(0)
    program.example_inputs = tuple(_example(n.meta["val"], generator) for n in inputs)


def _example(form: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers; for integers and booleans, which may be indices or masks, zeros and true."""
    if form.is_floating_point():
        return torch.randn(form.shape, generator=generator).to(form.dtype)
    return torch.full(form.shape, form.dtype is torch.bool, dtype=form.dtype)


def _with_constants(unit: Unit, constants: set[fx.Node]) -> set[fx.Node]:
    wanted: set[fx.Node] = set()
    stack = list(unit.members)
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += [n for n in node.all_input_nodes if n in constants]
    return wanted


def _codegen(inputs: int, outputs: int) -> Any:
    """The calling convention `f(x, y) -> (a, b)`, which a Program needs to be run on flat inputs."""
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

    names = [f"x{i}" for i in range(inputs)]
    in_spec = pytree.tree_structure((tuple(range(inputs)), {}))
    return _PyTreeCodeGen(_PyTreeInfo(names, in_spec, pytree.tree_structure(tuple(range(outputs)))))


def _gives_tensors(node: fx.Node) -> bool:
    return any(isinstance(v, torch.Tensor) for v in _values(node.meta.get("val")))


def _values(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
