"""Residual blocks: every add(x, f(x)) whose branch f can be left out as a whole.

    a block     add(a, b) of one shape and dtype, where b is computed from a and the path from a to b reads parameters
    removal     the readers of the sum read a; what only the branch needed is dead code

So ResNet, MobileNetV2, ConvNeXt and the attention and MLP halves of transformers give blocks, and the GELU that is
spelled x + 0.04 * x**3 does not. A branch may read other tensors as well (an attention mask, an encoder's output), so
that "a dominates b" would ask too much. In x + f(x) + g(x) both f and g are blocks: a sum of which a summand leads to
b counts as a. Layer scale and stochastic depth are part of the branch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ....errors import PruningError
from ....frontend.program import Program, get_attribute
from ...cleanup import is_identity
from ...rewrite import argument, aten, call_before, erase_dead


@dataclass(frozen=True)
class Block:
    """One residual block: the sum is node `node`, its argument `identity` (0 or 1) is what the branch is added to.

    `tensors` are the parameters and buffers that nothing but the branch reads. `name` is the module that the parameters
    have in common ("layer1.0").
    """

    name: str
    node: str
    identity: int
    tensors: tuple[str, ...]


# -- on a program -------------------------------------------------------------------------------------------------


def remove_blocks(program: Program, blocks: Iterable[Block]) -> None:
    """Leave the branches out, in place. Raises PruningError for a block that this program does not have."""
    for node, block in _located(program, blocks):
        identity = node.args[block.identity]
        assert isinstance(identity, fx.Node)
        node.replace_all_uses_with(identity)
    erase_dead(program)
    program.graph.lint()
    program.graph_module.recompile()


def silence_blocks(program: Program, blocks: Iterable[Block]) -> None:
    """The oracle: multiply each branch by zero before it is added, in place. The graph stays whole."""
    for node, block in _located(program, blocks):
        branch = node.args[1 - block.identity]
        silent = call_before(node, aten.mul.Tensor, branch, 0.0)
        node.args = (node.args[0], silent) if block.identity == 0 else (silent, node.args[1])
    program.graph.lint()
    program.graph_module.recompile()


def _located(program: Program, blocks: Iterable[Block]) -> list[tuple[fx.Node, Block]]:
    """The sum of every block, checked: it is such a sum, and the same parameters depend on it."""
    wanted = list(blocks)
    nodes = {n.name: n for n in program.graph.nodes} if wanted else {}
    flow = DataFlow(program) if wanted else None
    for block in wanted:
        node = nodes.get(block.node)
        fits = flow is not None and node is not None and block.identity in flow.identities(node)
        if not fits or not set(block.tensors) <= flow.read_by(node):  # type: ignore[union-attr,arg-type]
            raise PruningError(
                f"the plan removes the residual block {block.name} (added at node {block.node}), which this model "
                "does not have",
                hint="plans only fit the architecture (and the stage of the pipeline) that they were made for",
            )
    return [(nodes[b.node], b) for b in wanted]


# -- finding them -------------------------------------------------------------------------------------------------


def find_blocks(program: Program) -> list[Block]:
    """All residual blocks of `program`, in graph order. One may lie within another."""
    flow = DataFlow(program)
    found = [(node, i) for node in program.graph.nodes for i in flow.identities(node)]
    everything = flow.live([])
    owned = [everything - flow.live([(node.name, i)]) for node, i in found]
    named_by = [gone if gone & flow.parameters else flow.read_by(n) for gone, (n, _) in zip(owned, found)]
    names = _names(program, [tensors & flow.parameters for tensors in named_by])
    return [Block(name, n.name, i, tuple(sorted(gone))) for (n, i), name, gone in zip(found, names, owned)]


class DataFlow:
    """Which tensors of a program depend on which: for each node its ancestors as the bits of one integer.

    Sizes (`sym_size`) do not count: everything would depend on the input through its batch size.
    """

    def __init__(self, program: Program) -> None:
        self._nodes = [n for n in program.graph.nodes if n.op != "output" and _has_tensors(n)]
        self._number = {n: i for i, n in enumerate(self._nodes)}
        self._above: list[int] = []
        self._tensors = {i: str(n.target) for i, n in enumerate(self._nodes) if n.op == "get_attr"}
        self.parameters = {n for n in self._tensors.values() if _is_parameter(program, n)}
        self._parameter_bits = sum(1 << i for i, name in self._tensors.items() if name in self.parameters)
        self._inputs = sum(1 << i for i, n in enumerate(self._nodes) if n.op == "placeholder")
        (self._output,) = [n for n in program.graph.nodes if n.op == "output"]
        for node in self._nodes:
            parents = [self._number[p] for p in node.all_input_nodes if p in self._number]
            bits = 0
            for p in parents:
                bits |= self._above[p] | 1 << p
            self._above.append(bits)

    def identities(self, node: fx.Node) -> list[int]:
        """Which argument of `node` is the x of x + f(x): [0], [1], or [] where it is no such sum."""
        if not _is_sum(node):
            return []
        fitting = [i for i in (0, 1) if self._fits(node, i)]
        for origins in (_itself, _summands):
            found = [i for i in fitting if any(self._makes_block(x, node.args[1 - i]) for x in origins(node.args[i]))]
            if found:
                return found[:1]
        return []

    def _fits(self, node: fx.Node, identity: int) -> bool:
        """May the sum be replaced by this argument?"""
        x = node.args[identity]
        scaled = identity == 1 and argument(node, "alpha") != 1
        return not scaled and isinstance(x, fx.Node) and _form(x) == _form(node)

    def _makes_block(self, x: object, branch: object) -> bool:
        """Is `branch` computed from `x`, which depends on the inputs, with parameters on the way?"""
        if not isinstance(x, fx.Node) or not isinstance(branch, fx.Node) or x is branch:
            return False
        first, last = self._number[x], self._number[branch]
        if not self._above[last] >> first & 1 or not (self._above[first] | 1 << first) & self._inputs:
            return False
        return any(self._reads_parameters(i) for i in self._between(first, last))

    def _between(self, first: int, last: int) -> Iterator[int]:
        """The nodes on paths from `first` (left out) to `last`."""
        for i in range(first + 1, last + 1):
            if self._above[i] >> first & 1 and (i == last or self._above[last] >> i & 1):
                yield i

    def _reads_parameters(self, number: int) -> bool:
        """Does a node read a parameter, itself or through arithmetic on constants (weight norm)?"""
        parents = (self._number[p] for p in self._nodes[number].all_input_nodes if p in self._number)
        sources = (self._above[p] | 1 << p for p in parents)
        return any(not bits & self._inputs and bits & self._parameter_bits for bits in sources)

    def read_by(self, node: fx.Node) -> set[str]:
        """The parameters and buffers on the way to a node."""
        bits = self._above[self._number[node]]
        return {name for i, name in self._tensors.items() if bits >> i & 1}

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Is `node` computed from `on`?"""
        return bool(self._above[self._number[node]] >> self._number[on] & 1)

    def live(self, removed: Collection[tuple[str, int]]) -> set[str]:
        """The parameters and buffers that the outputs need when these sums (name, identity) become their identity."""
        return {str(n.target) for n in self.live_nodes(removed) if n.op == "get_attr"}

    def live_nodes(self, removed: Collection[tuple[str, int]]) -> set[fx.Node]:
        """The nodes that the outputs need when these sums (name, identity) become their identity."""
        identities = dict(removed)
        found: set[fx.Node] = set()
        stack: list[fx.Node] = [self._output]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            kept = [node.args[identities[node.name]]] if node.name in identities else node.all_input_nodes
            stack += [n for n in kept if isinstance(n, fx.Node)]
        return found


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, torch.Tensor) for v in values)


def _is_parameter(program: Program, name: str) -> bool:
    return isinstance(get_attribute(program.graph_module, name), torch.nn.Parameter)


def _is_sum(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is aten.add.Tensor


def _form(node: fx.Node) -> tuple[str, torch.dtype]:
    value = node.meta["val"]
    return str(tuple(value.shape)), value.dtype


def _itself(value: object) -> Iterator[fx.Node]:
    """A node, and what it is a copy of."""
    while isinstance(value, fx.Node):
        yield value
        value = value.args[0] if value.op == "call_function" and is_identity(value) else None


def _summands(value: object) -> Iterator[fx.Node]:
    """The terms of a sum that is read only by another sum, without scaled ones."""
    if isinstance(value, fx.Node) and _is_sum(value) and len(value.users) == 1 and argument(value, "alpha") == 1:
        for term in value.args:
            yield from _itself(term)
            yield from _summands(term)


# -- names --------------------------------------------------------------------------------------------------------


def _names(program: Program, parameters: list[set[str]]) -> list[str]:
    """A name for each block: the module common to its parameters; the child with most of them where that repeats."""
    names = [_common_module(p) for p in parameters]
    repeated = {n for n, times in Counter(names).items() if times > 1 or not n}
    longer = [_largest_child(program, n, p) if n in repeated else n for n, p in zip(names, parameters)]
    seen: Counter[str] = Counter()
    result = []
    for name in longer:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _common_module(names: set[str]) -> str:
    paths = [n.split(".")[:-1] for n in names]
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _largest_child(program: Program, module: str, names: set[str]) -> str:
    """"blocks.0" and names of parameters below it -> "blocks.0.attn"."""
    start = len(module) + 1 if module else 0
    sizes: Counter[str] = Counter()
    for name in sorted(names):
        sizes[name[start:].split(".")[0]] += get_attribute(program.graph_module, name).numel()
    child = max(sizes, key=lambda c: sizes[c])
    return f"{module}.{child}" if module else child
