"""Make an exported graph functional: no in-place op, no hidden subgraph, no assertion.

Rules:
1. A nested `set_grad_enabled` or `autocast` graph is inlined. What was under autocast is computed in the dtype of its
   weights: how few bits numbers have is for the passes to say.
2. `relu_(x)` and its kind become `relu(x)`, and everything that reads `x` afterwards, or whatever shares its memory,
   reads the result (writes.py).
3. Assertions, `detach`, `alias` and `lift_fresh_copy` vanish.
4. `view` becomes `reshape`: which tensors share memory has no meaning any more, so strides must not matter either.
A write that none of these rules can express is a `CaptureError` with its source line.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .program import get_attribute
from .writes import fake_values, replace_writes

UPDATED = "fxpress_updated"  # in meta: names of buffers and parameters that the model writes into as it runs
AUTOCAST = "fxpress_autocast"  # in meta: the dtype of a region that the model computes under autocast

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


def functionalize(graph_module: fx.GraphModule) -> None:
    """Apply the rules in place."""
    lowered = _inline_wrappers(graph_module)
    _drop_transparent(graph_module.graph)
    if lowered:
        graph_module.meta[AUTOCAST] = lowered[0]
        for node, value in fake_values(graph_module).items():
            node.meta["val"] = value
    updated = replace_writes(graph_module)
    if updated:
        graph_module.meta[UPDATED] = updated
    for node in graph_module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph_module.graph.erase_node(node)
    graph_module.graph.lint()


def resolve_masks(graph_module: fx.GraphModule) -> None:
    """A mask that no input has a part in chooses always the same: its positions are indices, their number is known."""
    graph, found = graph_module.graph, 0
    for node in graph.nodes:
        if node.target is not aten.index.Tensor:
            continue
        chosen: list[Any] = []
        for index in node.args[1]:
            mask = _constant_mask(graph_module, index)
            if mask is None:
                chosen.append(index)
                continue
            for dim, positions in enumerate(mask.nonzero(as_tuple=True)):
                name = f"{index.name}_positions_{found}_{dim}"
                graph_module.register_buffer(name, positions)
                with graph.inserting_before(node):
                    chosen.append(graph.get_attr(name))
            found += 1
        node.args = (node.args[0], chosen)
    if found:
        for node, value in fake_values(graph_module).items():
            node.meta["val"] = value


def _constant_mask(graph_module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The value of a boolean tensor that depends on no input; None for any other."""
    example = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(example, torch.Tensor) or example.dtype is not torch.bool:
        return None
    needed: dict[fx.Node, Any] = {}
    waiting = [node]
    while waiting:
        last = waiting.pop()
        if last.op not in ("get_attr", "call_function"):
            return None
        if last not in needed:
            needed[last] = None
            waiting += last.all_input_nodes
    for part in sorted(needed):
        if part.op == "get_attr":
            needed[part] = get_attribute(graph_module, str(part.target))
        else:
            args, kwargs = fx.map_arg((part.args, dict(part.kwargs)), needed.__getitem__)
            needed[part] = part.target(*args, **kwargs)  # type: ignore[operator]
    return needed[node]


def _inline_wrappers(graph_module: fx.GraphModule) -> list[torch.dtype]:
    """Returns the dtypes of the autocast regions that there were."""
    graph, lowered = graph_module.graph, []
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            place = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            body = get_attribute(graph_module, str(node.args[place].target))
            lowered += [node.args[1]] if name == "wrap_with_autocast" and node.args[2] else []
            lowered += _inline_wrappers(body)
            _inline(graph_module, node, body, list(node.args[place + 1 :]))
    return lowered


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
