"""What the manager checks after every pass, so that no pass has to be believed.

1. The graph is well formed (`Graph.lint`), and no parameter or buffer is without a reader.
2. Shapes and dtypes, propagated anew with fake tensors, equal what the nodes say (stale ones are refreshed when the
   pass did not declare that it preserves the interface only for the outputs).
3. A pass that preserves the interface leaves names, dtypes and dims of inputs and outputs alone.
4. A pass that preserves values gives the same outputs on the example inputs, within its tolerance.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import PassError
from ..frontend.agreement import draws_random
from ..frontend.fake_run import FakeRun
from ..frontend.program import Program, TensorInfo, describe_tensors, dtype_name, source_of
from .base import INTERFACE, VALUES, Pass
from .rewrite import erase_unused_state, fake_mode_of, is_op


def check_structure(program: Program, who: str) -> None:
    """Rules 1 and 2. Raises PassError naming the pass `who`."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise PassError(f"pass {who!r} left a malformed graph: {error}", hint=_BUG) from error
    erase_unused_state(program)
    program.graph_module.recompile()
    refresh_values(program, who)


def refresh_values(program: Program, who: str = "refresh") -> None:
    """Propagate shapes and dtypes with fake tensors through the whole graph and store them on the nodes."""
    mode = fake_mode_of(program.graph)
    if mode is None:
        return
    follow_weights(program)
    propagate = _Propagate(program.graph_module, mode, who)
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    propagate.run_nodes([n.meta.get("val") for n in placeholders])


def fingerprint(program: Program) -> tuple[Any, ...]:
    """What differs once a pass has edited a node, or put or written a weight."""
    nodes = tuple((n.op, n.name, str(n.target), repr(n.args), repr(n.kwargs)) for n in program.graph.nodes)
    state = (*program.graph_module.named_parameters(), *program.graph_module.named_buffers())
    return nodes, tuple((name, id(tensor), tensor._version) for name, tensor in state)


def follow_weights(program: Program) -> bool:
    """After `graph_module.double()` (or half) the weights have another float dtype than capture saw: inputs and outputs
    are described anew. (Not where the graph itself converts to that dtype, as `to-half` lets it.) Returns whether they
    were."""
    dtypes = {p.dtype for p in program.parameters() if p.is_floating_point()}
    seen = {v.dtype for v in (n.meta["val"] for n in program.tensor_placeholders()) if v.is_floating_point()}
    if len(dtypes) != 1 or not seen - dtypes:
        return False
    (dtype,) = dtypes
    if any(is_op(n, torch.ops.aten.to.dtype) and n.args[1] is dtype for n in program.graph.nodes):
        return False
    for node in program.tensor_placeholders():
        if node.meta["val"].is_floating_point():
            node.meta["val"] = node.meta["val"].to(dtype)
    old = {dtype_name(d) for d in seen}
    program.inputs, program.outputs = (
        tuple(dataclasses.replace(i, dtype=dtype_name(dtype)) if i.dtype in old else i for i in infos)
        for infos in (program.inputs, program.outputs)
    )
    return True


def check_interface(item: Pass, before: Program, after: Program) -> None:
    """Rule 3; a pass that does not promise it has its new outputs described instead."""
    nodes = after.output_nodes()
    outputs = describe_tensors(nodes, [o.name for o in before.outputs], after.symbols)
    if INTERFACE not in item.preserves:
        after.outputs = outputs
        return
    if len(nodes) != len(before.outputs) or after.inputs != before.inputs or not _same_forms(before.outputs, outputs):
        raise PassError(
            f"pass {item.name!r} declares that it preserves the interface, but the outputs went from "
            f"{_list(before.outputs)} to {_list(outputs)}",
            hint=f"leave the outputs alone, or take {INTERFACE!r} out of `preserves`",
        )


def check_values(item: Pass, before: Program, after: Program) -> None:
    """Rule 4: the worst relative difference max|a - b| / max|b| over the outputs. Raises PassError above tolerance.

    A network may amplify rounding beyond any bound. Where float32 says no, float64 decides, and the allowance is then
    at least ten times what rounding the network's own weights does to its outputs.
    """
    if draws_random(before):
        return  # the passes change no draw, but in another order other numbers come
    worst, allowed = _worst(before.call_example(), after.call_example()), item.tolerance
    if not worst <= allowed:
        leaves = tuple(_doubled(x) for x in before.example_inputs)
        expected = in_double(before).run_flat(leaves)
        worst = _worst(expected, in_double(after).run_flat(leaves))
        allowed = max(allowed, 10 * _worst(expected, _rounded_weights(before).run_flat(leaves)))
    if not worst <= allowed:
        raise PassError(
            f"pass {item.name!r} declares that it preserves values, but the outputs changed by {worst:.2e} relative "
            f"(allowed {allowed:.0e})",
            hint=f"mend the pass, or take {VALUES!r} out of `preserves`",
        )


def _same_forms(before: Sequence[TensorInfo], after: Sequence[TensorInfo]) -> bool:
    """Are names, dtypes and sizes the same, sizes that are written in another way ("(batch**2)//batch") included?"""
    alike = [(a.name, a.dtype, len(a.dims)) for a in before] == [(b.name, b.dtype, len(b.dims)) for b in after]
    return alike and all(_same_size(s, t) for a, b in zip(before, after) for s, t in zip(a.dims, b.dims))


def _same_size(a: int | str, b: int | str) -> bool:
    """Equal for several values of the names in them."""
    if a == b:
        return True
    try:
        sums = [ast.parse(str(size), mode="eval").body for size in (a, b)]
    except SyntaxError:  # a name that is no name in Python
        return False
    names = sorted({n.id for tree in sums for n in ast.walk(tree) if isinstance(n, ast.Name)})
    drawn = ({n: prime * (i + 1) + i for i, n in enumerate(names)} for prime in (5, 19, 61))
    values = [[_computed(tree, numbers) for tree in sums] for numbers in drawn]
    return all(first is not None and first == second for first, second in values)


def _computed(tree: ast.AST, numbers: Mapping[str, int]) -> int | None:
    """The value of a sum, product, quotient, remainder or power of numbers and names; None for anything else."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return numbers[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        value = _computed(tree.operand, numbers)
        return None if value is None else -value
    operation = _OPERATIONS.get(type(tree.op)) if isinstance(tree, ast.BinOp) else None
    if operation is None:
        return None
    left, right = (_computed(part, numbers) for part in (tree.left, tree.right))  # type: ignore[attr-defined]
    if left is None or right is None or (right <= 0 and operation not in (operator.add, operator.sub, operator.mul)):
        return None
    return operation(left, right)  # type: ignore[no-any-return]


_OPERATIONS: dict[type, Callable[[int, int], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def _rounded_weights(program: Program) -> Program:
    """The program in float64 with every weight moved by up to one rounding of its own dtype."""
    copy = in_double(program)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, tensor in zip(program.parameters(), copy.parameters()):
            if not own.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
            tensor.mul_(1 + noise * torch.finfo(own.dtype).eps / 2)
    return copy


def _worst(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> float:
    return max((relative_difference(a, b) for a, b in zip(after, before)), default=0.0)


def _doubled(leaf: Any) -> Any:
    return leaf.to(_WIDE.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf


_WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


def in_double(program: Program) -> Program:
    """A copy that computes in float64 (or complex128): weights, and dtype literals that ask for less."""
    copy = program.copy()
    copy.graph_module._apply(_doubled)
    for node in copy.graph.nodes:
        if node.op == "call_function":
            node.args = pytree.tree_map(_widened, node.args)
            node.kwargs = pytree.tree_map(_widened, dict(node.kwargs))
            if _is_created_in_float32(node):
                node.kwargs = {**node.kwargs, "dtype": torch.float64}
    copy.graph_module.recompile()
    return copy


def _is_created_in_float32(node: fx.Node) -> bool:
    """Does a `zeros` or its kind take the default dtype?"""
    schema = getattr(node.target, "_schema", None)
    takes_dtype = schema is not None and any(a.name == "dtype" and a.kwarg_only for a in schema.arguments)
    makes = not any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)
    value = node.meta.get("val")
    is_float = isinstance(value, torch.Tensor) and value.dtype is torch.float32
    return takes_dtype and makes and is_float and node.kwargs.get("dtype") is None


def _widened(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|; NaN counts as infinite unless both have it in the same places."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float((a != b).double().mean())
    if not torch.equal(torch.isnan(a), torch.isnan(b)):
        return float("inf")
    a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


_BUG = "this is a bug in the pass; run with --dump DIR to see the program before and after it"


def _list(infos: tuple[Any, ...]) -> str:
    return "(" + ", ".join(map(str, infos)) + ")"


class _Propagate(FakeRun):
    """Stores what each node gives."""

    def __init__(self, module: fx.GraphModule, mode: Any, who: str) -> None:
        super().__init__(module, mode)
        self.who = who

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            raise PassError(
                f"after pass {self.who!r} the node {n.name} ({n.target}) cannot run: {str(error).splitlines()[0]}",
                where=source_of(n),
                hint=_BUG,
            ) from error
        if n.op in ("call_function", "get_attr"):
            n.meta["val"] = value
        return value
