"""Write ops that a target has no integer kernel for as ops that it has (`Target.expand` names which).

    silu(x)              x * sigmoid(x)                                        behind an integer op
    hardswish(x)         x * hardsigmoid(x)                                    behind an integer op
    avg_pool2d(x)        a depthwise convolution with weights 1 / window        behind an integer op
    addmm(b, x, W)       linear(x, W^T, b)                                     where W and b are parameters
    matmul(x, W) [+ b]   linear(x, W^T, b)                                     where W and b are constants
    linear(x[..., K])    reshape to [tokens, K], linear, reshape back           anywhere: its row is for matrices
    attention(q, k, v)   matmul(softmax(matmul(q c, k^T) + mask), v)            where the form "attention" is on

All are the same function in float; they change what can be quantized. Those that belong to a named form of the target
(`Row.form`) are written only where that form is on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...frontend.program import Program
from ..rewrite import argument, aten, call_before, constant, is_constant, is_op, put_constant, replace
from .attention import attention_mix, attention_scores
from .conditions import LARGE_WINDOW
from .spec import KEPT_FLOAT, USE_INT16, USE_INTEGER, Target


def expand_program(program: Program, target: Target) -> int:
    """Expand what the target names, in place. Returns how many nodes were rewritten."""
    count = 0
    for node in list(program.graph.nodes):
        expansion = _expansion_of(node, target)
        if expansion is None or (expansion.behind_integers and not _follows_integers(node, target)):
            continue
        before = node.prev
        expanded = expansion.write(program, node)
        if expanded is not None:
            inherit(before, node)
            # The report compares with the float program, which has the node under its old name.
            name_after(expanded, node.name)
            replace(node, expanded)
            count += 1
    return count


def _expansion_of(node: fx.Node, target: Target) -> Expansion | None:
    if node.meta.get(KEPT_FLOAT) or form_turned_off(node, target) is not None:
        return None
    return _listed(node, target)


def _listed(node: fx.Node, target: Target) -> Expansion | None:
    """How the target writes the op of a node, whether or not its form is on."""
    name = str(node.target)
    return EXPANSIONS[name] if node.op == "call_function" and name in target.expand else None


def form_turned_off(node: fx.Node, target: Target) -> str | None:
    """The name of the form for which the node would be expanded, if that form is off here."""
    expansion = _listed(node, target)
    if expansion is None or node.meta.get(USE_INTEGER) or target.forms.get(expansion.form) is not False:
        return None
    return expansion.form


def may_turn_on(node: fx.Node, target: Target) -> bool:
    """Does the target have an optional row for the node, or for what it is expanded into?"""
    expansion = _listed(node, target)
    if expansion is not None and target.forms.get(expansion.form) is False:
        return True
    applicable = [r for r in target.rows_about(node) if r.declines(node) is None]
    return bool(applicable) and applicable[0].optional


def concerns(form: str, node: fx.Node, target: Target) -> bool:
    """Has the target a row of that form for the node, or for what it is expanded into?"""
    expansion = _listed(node, target)
    if expansion is not None and expansion.form == form:
        return True
    return any(r.form == form and r.declines(node) is None for r in target.rows_about(node))


def inherit(before: fx.Node, node: fx.Node) -> None:
    """What the user said of `node` holds for the nodes between `before` and it, which were written for it."""
    said = {key: True for key in (KEPT_FLOAT, USE_INTEGER, USE_INT16) if node.meta.get(key)}
    new = node.prev
    while new is not before:
        new.meta.update(said)
        new = new.prev


def name_after(node: fx.Node, float_name: str) -> None:
    """Note which node of the float program has these values."""
    node.meta["custom"] = {**node.meta.get("custom", {}), "float_name": float_name}


def _follows_integers(node: fx.Node, target: Target) -> bool:
    """Does the op read, through activations alone, what a row of the table computes?"""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.op == "call_function" and str(source.target) in target.absorbs:
        source = source.args[0]
    row = target.row_for(source) if isinstance(source, fx.Node) and source.op == "call_function" else None
    return row is not None and row.kind != "float" and not row.float_output


def _silu(program: Program, node: fx.Node) -> fx.Node:
    gate = call_before(node, aten.sigmoid.default, node.args[0])
    return call_before(node, aten.mul.Tensor, node.args[0], gate)


def _hardswish(program: Program, node: fx.Node) -> fx.Node:
    gate = call_before(node, aten.hardsigmoid.default, node.args[0])
    return call_before(node, aten.mul.Tensor, node.args[0], gate)


def _average_pool(program: Program, node: fx.Node) -> fx.Node | None:
    """ONNX Runtime's integer depthwise convolution takes less than half the time of its float AveragePool, and a
    seventh of its integer one (docs/results.md)."""
    value = node.meta["val"]
    padding = argument(node, "padding")
    padding = [0, 0] if not padding else [padding[0], padding[-1]]
    if any(padding) and not argument(node, "count_include_pad"):
        return None
    if argument(node, "ceil_mode") or argument(node, "divisor_override") or not isinstance(value.shape[1], int):
        return None
    kernel = argument(node, "kernel_size")
    kernel = [kernel[0], kernel[-1]]
    if kernel[0] * kernel[1] >= LARGE_WINDOW:
        return None
    stride = argument(node, "stride") or kernel
    weight = torch.full((value.shape[1], 1, *kernel), 1.0 / (kernel[0] * kernel[1]))
    stored = put_constant(program, f"average.{node.name}", weight, node)
    options = ([stride[0], stride[-1]], padding, [1, 1], value.shape[1])
    return call_before(node, aten.conv2d.default, node.args[0], stored, None, *options)


def _addmm(program: Program, node: fx.Node) -> fx.Node | None:
    bias, x, weight = node.args[:3]
    if not is_constant(weight) or not is_constant(bias) or (argument(node, "beta"), argument(node, "alpha")) != (1, 1):
        return None
    values = constant(program, weight), constant(program, bias)
    if values[1] is None or values[0] is None or values[1].ndim != 1:
        return None
    return _as_linear(program, node, x, weight, bias)


def _matmul(program: Program, node: fx.Node) -> fx.Node | None:
    """A product with a constant matrix; where a constant is added to it, that is written together (`_biased`)."""
    reader = next(iter(node.users), None)
    if not _is_layer(program, node) or (reader is not None and _biased_product(program, reader) is not None):
        return None
    return _as_linear(program, node, node.args[0], node.args[1])


def _biased(program: Program, node: fx.Node) -> fx.Node | None:
    found = _biased_product(program, node)
    if found is None:
        return None
    product, bias = found
    return _as_linear(program, node, product.args[0], product.args[1], bias)


def _biased_product(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product of a layer that nobody else reads, and the constant vector that `node` adds to it."""
    if not is_op(node, aten.add.Tensor) or argument(node, "alpha") != 1:
        return None
    for product, bias in (node.args[:2], node.args[1::-1]):
        if not is_op(product, aten.matmul.default) or len(product.users) != 1 or not is_constant(bias):  # type: ignore[union-attr]
            continue
        value = constant(program, bias)
        fits = value is not None and value.shape == product.meta["val"].shape[-1:]  # type: ignore[union-attr]
        if fits and value.dtype is torch.float32 and _is_layer(program, product):  # type: ignore[arg-type, union-attr]
            return product, bias  # type: ignore[return-value]
    return None


def _is_layer(program: Program, node: fx.Node) -> bool:
    """Does a matmul multiply an activation [..., K] by a constant matrix [K, N]?"""
    x, weight = node.args[:2]
    if is_constant(x) or not is_constant(weight):
        return False
    value = constant(program, weight)
    return value is not None and value.ndim == 2 and value.dtype is torch.float32 and x.meta["val"].ndim >= 2  # type: ignore[union-attr]


def _as_linear(program: Program, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> fx.Node:
    """linear(x, W^T, b) before `node`, for the constant matrix W that `weight` reads."""
    value = constant(program, weight)
    assert value is not None
    transposed = torch.nn.Parameter(value.detach().t().contiguous(), requires_grad=value.requires_grad)
    stored = put_constant(program, f"{weight.target}_t", transposed, node)
    layer = call_before(node, aten.linear.default, x, stored, bias)
    return _tokens(program, layer) or layer


def _tokens(program: Program, node: fx.Node) -> fx.Node | None:
    """A linear layer on tokens [N, T, K] as one on the matrix [N T, K], shared by all that read the same tokens.

    On 3-D tokens ONNX Runtime computes a float product that dequantizes its weights at every call.
    """
    tokens, value = node.args[0], node.meta["val"]
    assert isinstance(tokens, fx.Node)
    lead = [-1 if not isinstance(s, int) else s for s in value.shape[:-1]]
    if value.ndim <= 2 or lead.count(-1) > 1 or not is_constant(node.args[1]):
        return None
    form = tokens.meta["val"]
    matrix = _shared_matrix(tokens, node)
    if matrix is None:
        matrix = call_before(
            node, aten.reshape.default, tokens, [-1, form.shape[-1]], value=form.reshape(-1, form.shape[-1])
        )
        name_after(matrix, tokens.name)
    flat = value.reshape(-1, value.shape[-1])
    product = call_before(node, aten.linear.default, matrix, *node.args[1:], value=flat)
    return call_before(node, aten.reshape.default, product, [*lead, value.shape[-1]])


def _shared_matrix(tokens: fx.Node, node: fx.Node) -> fx.Node | None:
    """An earlier reshape of the same tokens to a matrix."""
    wanted = [-1, tokens.meta["val"].shape[-1]]
    found = (u for u in tokens.users if is_op(u, aten.reshape.default) and list(u.args[1]) == wanted and u < node)  # type: ignore[arg-type]
    return next(found, None)


def _attention(program: Program, node: fx.Node) -> fx.Node | None:
    """The scale goes to the queries, which are fewer than the scores. Grouped queries and causal masks stay."""
    value = node.args[2]
    if argument(node, "dropout_p") or argument(node, "is_causal") or argument(node, "enable_gqa"):
        return None
    mask = argument(node, "attn_mask")
    width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    if (mask is not None and not mask.meta["val"].is_floating_point()) or not isinstance(width, int):
        return None
    scores = attention_scores(node)
    if scores is None:
        return None
    form = scores.meta["val"]
    if mask is not None:
        scores = call_before(node, aten.add.Tensor, scores, mask, value=form)
        return attention_mix(program, node, scores, value, mask)
    weights = call_before(node, aten.softmax.int, scores, -1, value=form)
    return call_before(node, aten.matmul.default, weights, value)


@dataclass(frozen=True)
class Expansion:
    """How an op is written, whether only behind an integer op, and the form it belongs to ("" for none)."""

    write: Callable[[Program, fx.Node], fx.Node | None]
    behind_integers: bool = False
    form: str = ""


EXPANSIONS: dict[str, Expansion] = {
    "aten.silu.default": Expansion(_silu, behind_integers=True),
    "aten.hardswish.default": Expansion(_hardswish, behind_integers=True, form="hardswish"),
    "aten.avg_pool2d.default": Expansion(_average_pool, behind_integers=True),
    "aten.addmm.default": Expansion(_addmm),
    "aten.matmul.default": Expansion(_matmul),
    "aten.add.Tensor": Expansion(_biased),
    "aten.linear.default": Expansion(_tokens),
    "aten.scaled_dot_product_attention.default": Expansion(_attention, form="attention"),
}
