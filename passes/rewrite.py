"""Small tools that passes edit graphs with: match an op, read its arguments by name, put in new nodes, swap weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx

from ..errors import QuantizationError
from ..frontend.program import Program, delete_attribute, get_attribute, set_attribute

aten = torch.ops.aten


_INTEGERS = ("fxpress.quantize", "fxpress.dequantize", "fxpress.dynamic")


def find(program: Program, *targets: Any) -> Iterator[fx.Node]:
    """All nodes that call one of `targets`, in order. Safe to edit the graph while iterating."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def is_op(value: Any, *targets: Any) -> bool:
    """Is `value` a node that calls one of `targets`?"""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def refuse_quantized(program: Program, what: str) -> None:
    """Raise QuantizationError for a program that computes on integers already."""
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(_INTEGERS):
            raise QuantizationError(f"the program is quantized already, and {what}", hint="give the float program")


def argument(node: fx.Node, name: str) -> Any:
    """The value of an op's argument by its schema name, defaults filled in.

    Raises KeyError for a name that the op's schema does not have.
    """
    position, default = signature(node.target)[name]
    args = node.args
    if position < len(args):
        return args[position]
    return node.kwargs.get(name, default)


def argument_names(node: fx.Node) -> Collection[str]:
    """The names of an op's arguments, in order."""
    return signature(node.target)


def signature(op: Any) -> dict[str, tuple[int, Any]]:
    """Name -> position and default. Reading a schema is slow, hashing an op is too, and every rule asks by name."""
    known = _SIGNATURES.get(id(op))
    if known is None or known[0] is not op:
        known = op, {a.name: (i, a.default_value) for i, a in enumerate(op._schema.arguments)}
        _SIGNATURES[id(op)] = known
    return known[1]


_SIGNATURES: dict[int, tuple[Any, dict[str, tuple[int, Any]]]] = {}  # a cache, by identity


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an op's argument by its schema name, filling in defaults before it as needed."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    names = [a.name for a in arguments]
    position = names.index(name)
    if arguments[position].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    filled = [argument(node, n) for n in names[: max(position + 1, len(node.args))]]
    filled[position] = value
    node.args = tuple(filled)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in names[: len(filled)]}


def call_before(node: fx.Node, target: Callable[..., Any], *args: Any, value: Any = None, **kwargs: Any) -> fx.Node:
    """Insert `target(*args)` before `node`, with the source of `node`. `value` is its meta["val"]."""
    with node.graph.inserting_before(node):
        return _with_meta(node.graph.call_function(target, args, kwargs), node, value)


def call_after(node: fx.Node, target: Callable[..., Any], *args: Any, value: Any = None, **kwargs: Any) -> fx.Node:
    """Insert `target(*args)` after `node`, with the source of `node`. `value` is its meta["val"]."""
    with node.graph.inserting_after(node):
        return _with_meta(node.graph.call_function(target, args, kwargs), node, value)


def _with_meta(new: fx.Node, origin: fx.Node, value: Any) -> fx.Node:
    new.meta = {k: v for k, v in origin.meta.items() if k in ("stack_trace", "nn_module_stack", "custom")}
    new.meta["val"] = origin.meta.get("val") if value is None else value
    return new


# Ops that give the values of their first argument in another shape.
SAME_VALUES = frozenset(
    {
        *(aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim),
        *(aten.slice.Tensor, aten.permute.default, aten.transpose.int),
    }
)
WORK = "work"  # in meta["custom"]: the share of a node's multiply-adds that the model has; the others are by zeros


def share_work(node: fx.Node, share: float) -> None:
    """Note that only so much of what a rewritten node computes is the model's."""
    custom = node.meta.get("custom", {})
    node.meta["custom"] = {**custom, WORK: custom.get(WORK, 1.0) * share}


def replace(node: fx.Node, value: fx.Node) -> None:
    """Let every reader of `node` read `value`, and erase `node`."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


# -- weights ------------------------------------------------------------------------------------------------------


def is_constant(value: Any) -> bool:
    """Is `value` a node that reads a parameter or buffer?"""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def constant(program: Program, node: Any) -> torch.Tensor | None:
    """The tensor that a get_attr node reads; None for None."""
    return None if node is None else get_attribute(program.graph_module, str(node.target))


def put_constant(program: Program, path: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
    """Store a parameter or buffer at `path` and read it by a new get_attr node before `before`.

    A path that is already read by other nodes gets a suffix, so that a shared weight is never changed by accident.
    """
    used = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    name, i = path, 1
    while name in used or hasattr(torch.nn.Module, name.rpartition(".")[2]):  # "to" is a method of every module
        name, i = f"{path}_{i}", i + 1
    set_attribute(program.graph_module, name, tensor)
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(name)
    node.meta["val"] = fake_like(before, tensor)
    return node


def update_constant(program: Program, node: fx.Node, tensor: torch.Tensor) -> None:
    """Replace the tensor that a get_attr node reads (and all nodes that read the same path)."""
    old = constant(program, node)
    if isinstance(old, torch.nn.Parameter) and tensor.is_floating_point():
        tensor = torch.nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    set_attribute(program.graph_module, str(node.target), tensor)
    for other in program.graph.nodes:
        if other.op == "get_attr" and other.target == node.target:
            other.meta["val"] = fake_like(node, tensor)


def fake_like(node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor with the form of `tensor`, in the fake mode that the program was captured in."""
    mode = fake_mode_of(node.graph)
    return mode.from_tensor(tensor.detach(), static_shapes=True) if mode is not None else tensor.detach()


def fake_mode_of(graph: fx.Graph) -> Any:
    """The FakeTensorMode of the graph's placeholders, or None."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if node.op == "placeholder" and mode is not None:
            return mode
    return None


def erase_dead(program: Program) -> int:
    """Erase nodes without readers and parameters without nodes. Returns how many nodes went."""
    erased = 0
    for node in reversed(list(program.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            program.graph.erase_node(node)
            erased += 1
    erase_unused_state(program)
    return erased


def erase_unused_state(program: Program) -> None:
    """Delete parameters, buffers and subgraphs that no node reads."""
    module = program.graph_module
    used = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    held = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    held += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in held:
        if name not in used:
            delete_attribute(module, name)
    for name, child in list(module.named_modules()):
        if isinstance(child, fx.GraphModule) and name and name not in used:
            delete_attribute(module, name)
