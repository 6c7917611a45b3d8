"""Make an exported graph functional: no in-place op, no hidden subgraph, no assertion.

Rules:
1. A nested `set_grad_enabled` or `autocast` graph is inlined.
2. `relu_(x)` and its kind become `relu(x)`, and everything that read `x` afterwards reads the result.
3. Where `x` is a view of another tensor (a slice or select of it, say), the write is scattered back into that tensor,
   and views of it that are read later are taken again.
4. Assertions, `detach`, `alias` and `lift_fresh_copy` vanish.
5. `view` becomes `reshape`: which tensors share memory has no meaning any more, so strides must not matter either.
A write that none of these rules can express is a `CaptureError` with its source line.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError
from .program import get_attribute, source_of

aten = torch.ops.aten

_TRANSPARENT = {
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
}
_ASSERTIONS = {
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# View op -> the op that writes a source back through it: scatter(base, source, *view arguments).
_SCATTER = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
# Views that can be undone by another view of the written value.
_RESHAPES = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints}
_PERMUTES = {aten.transpose.int, aten.t.default}
_OTHER_VIEWS = {aten.permute.default, aten.expand.default, aten.chunk.default, aten.split.Tensor, aten.unbind.int}
# In-place ops whose functional form has another name or signature.
_FUNCTIONAL = {
    aten.copy_.default: aten.copy.default,
    aten.fill_.Scalar: aten.full_like.default,
    aten.zero_.default: aten.zeros_like.default,
}


def functionalize(graph_module: fx.GraphModule) -> None:
    """Apply the rules in place."""
    _inline_wrappers(graph_module)
    _drop_transparent(graph_module.graph)
    _replace_writes(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.lint()


def _inline_wrappers(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            place = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            body = get_attribute(graph_module, str(node.args[place].target))
            _inline_wrappers(body)
            _inline(graph_module, node, body, list(node.args[place + 1 :]))


def _inline(graph_module: fx.GraphModule, node: fx.Node, body: fx.GraphModule, operands: list[Any]) -> None:
    """Copy a subgraph before `node`, and let the getitems of `node` read its results."""
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, operands))
    graph = graph_module.graph
    with graph.inserting_before(node):
        result = graph.graph_copy(body.graph, values)
    results = result if isinstance(result, (tuple, list)) else (result,)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results[0])
    graph.erase_node(node)


def _drop_transparent(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _TRANSPARENT:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _ASSERTIONS:
            graph.erase_node(node)


def _replace_writes(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_write(node.target):
            _replace_write(graph, node)


def _is_write(target: Any) -> bool:
    """Does this overload write into its first argument and return it?"""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def _functional_target(node: fx.Node) -> Any:
    if node.target in _FUNCTIONAL:
        return _FUNCTIONAL[node.target]
    packet = getattr(aten, node.target._schema.name.split("::")[1].removesuffix("_"), None)
    overload = getattr(packet, node.target._overloadname, None) if packet is not None else None
    if overload is None:
        raise CaptureError(
            f"in-place op {node.target} has no functional form that fxpress knows",
            where=source_of(node),
            hint="write the line without the in-place op",
        )
    return overload


def _replace_write(graph: fx.Graph, node: fx.Node) -> None:
    written = node.args[0]
    later = _users_after(written, node)
    node.target = _functional_target(node)
    for user in later:
        user.replace_input_with(written, node)
    _retake_views(graph, written, node, None)
    if _is_view(written):
        _write_back(graph, written, node)


def _users_after(value: fx.Node, node: fx.Node) -> list[fx.Node]:
    return [u for u in value.users if u is not node and node < u]


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target in (*_SCATTER, *_RESHAPES, *_PERMUTES, *_OTHER_VIEWS)
    )


def _write_back(graph: fx.Graph, view: fx.Node, value: fx.Node) -> None:
    """`value` was written through `view`: make the new base, and let later readers of the old base read it."""
    base = view.args[0]
    later = _users_after(base, value)
    with graph.inserting_before(value.next):
        new_base = _undo_view(graph, view, base, value)
    new_base.meta = {**value.meta, "val": base.meta["val"]}
    for user in later:
        if user is not new_base:
            user.replace_input_with(base, new_base)
    _retake_views(graph, base, new_base, view)
    if _is_view(base):
        _write_back(graph, base, new_base)


def _undo_view(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    if view.target in _SCATTER:
        return graph.call_function(_SCATTER[view.target], (base, value, *view.args[1:]), dict(view.kwargs))
    if view.target in _PERMUTES:
        return graph.call_function(view.target, (value, *view.args[1:]))
    if view.target is aten.permute.default:
        dims = [d % len(view.args[1]) for d in view.args[1]]
        return graph.call_function(aten.permute.default, (value, [dims.index(i) for i in range(len(dims))]))
    if view.target in _RESHAPES:
        sizes = [
            s if isinstance(s, int) else graph.call_function(aten.sym_size.int, (base, d))
            for d, s in enumerate(base.meta["val"].shape)
        ]
        return graph.call_function(aten.reshape.default, (value, sizes))
    raise CaptureError(
        f"the model writes in place through {view.target}, which fxpress cannot express without in-place ops",
        where=source_of(value),
        hint="write it as torch.where, torch.cat or index_put",
    )


def _retake_views(graph: fx.Graph, base: fx.Node, new_base: fx.Node, written: fx.Node | None) -> None:
    """Take views of the old base again from the new one, for those who read them after the write."""
    for other in list(base.users):
        if other in (written, new_base) or not (_is_view(other) or other.target is operator.getitem):
            continue
        if not other < new_base:
            continue
        with graph.inserting_after(new_base):
            again = graph.node_copy(other, lambda n: new_base if n is base else n)
        for user in _users_after(other, new_base):
            if user is not again:
                user.replace_input_with(other, again)
        _retake_views(graph, other, again, written)
