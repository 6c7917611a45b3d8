"""Rules of the layers that hold weights, and of products of tensors: convolution, linear, matmul, norms, attention."""

from __future__ import annotations

import torch
from torch import fx

from ...rewrite import argument, argument_names, is_constant
from ..analysis import Analysis, op_name, rows, shape_of
from ..axes import Axes
from .elementwise import broadcast


def convolution(analysis: Analysis, node: fx.Node) -> Axes:
    """Weight [out, in / groups, kernel...]: channels in and out are products (groups, per group)."""
    x, weight = analysis.need(node, "input"), analysis.need(node, "weight")
    channel = len(x) - len(weight) + 1  # 0 without a batch
    slide(analysis, node, (*x[channel + 1 :], *weight[2:]))
    groups = argument(node, "groups")
    if groups == 1:
        analysis.same(x[channel], weight[1], node)
    else:
        outer, inner = analysis.atoms.split(x[channel], groups, len(x[channel]) // groups)
        of_output, _ = analysis.atoms.split(weight[0], groups, len(weight[0]) // groups)
        analysis.same(outer, of_output, node)
        analysis.same(inner, weight[1], node)
        analysis.factors[node] = outer
    if len(weight[1]) > 1:
        analysis.contract(node, "input", channel)
    _parameter(analysis, node, weight[:1], "bias")
    analysis.costs(node, weight[0], weight[1])
    return (*x[:channel], weight[0], *analysis.fixed(node, slice(channel + 1, None)))


def transposed_convolution(analysis: Analysis, node: fx.Node) -> Axes:
    """Weight [in, out / groups, kernel...]."""
    x, weight = analysis.need(node, "input"), analysis.need(node, "weight")
    channel = len(x) - len(weight) + 1
    slide(analysis, node, (*x[channel + 1 :], *weight[2:]))
    analysis.same(x[channel], weight[0], node)
    groups, out = argument(node, "groups"), weight[1]
    if groups > 1:
        outer, inner = analysis.atoms.split(x[channel], groups, len(x[channel]) // groups)
        analysis.factors[node] = outer
        out = analysis.atoms.merge(outer, weight[1])
        if len(inner) > 1:
            analysis.contract(node, "input", channel)
    else:
        analysis.contract(node, "input", channel)
    _parameter(analysis, node, (out,), "bias")
    analysis.costs(node, x[channel], weight[1])
    return (*x[:channel], out, *analysis.fixed(node, slice(channel + 1, None)))


def slide(analysis: Analysis, node: fx.Node, dims: Axes) -> None:
    """A window slides over these dimensions, so all their positions stay."""
    analysis.pin(dims, node, f"{op_name(node)} slides a window over it")


def linear(analysis: Analysis, node: fx.Node) -> Axes:
    """Weight [out, in] (or [in])."""
    x, weight = analysis.need(node, "input"), analysis.need(node, "weight")
    analysis.same(x[-1], weight[-1], node)
    analysis.contract(node, "input", -1)
    analysis.costs(node, *x[:-1], *weight)
    if len(weight) == 1:
        return x[:-1]
    _parameter(analysis, node, weight[:1], "bias")
    return (*x[:-1], weight[0])


def matmul(analysis: Analysis, node: fx.Node) -> Axes:
    """[..., n, k] x [..., k, m], either side possibly one-dimensional; batch dimensions are broadcast."""
    names = list(argument_names(node))[:2]
    return _product(analysis, node, names[0], names[1])


def add_matmul(analysis: Analysis, node: fx.Node) -> Axes:
    """`addmm` and `baddbmm`: input + a x b."""
    names = list(argument_names(node))[:3]
    result = _product(analysis, node, names[1], names[2])
    return broadcast(analysis, node, [result, analysis.need(node, names[0])], shape_of(node))


def _product(analysis: Analysis, node: fx.Node, left: str, right: str) -> Axes:
    a, b = analysis.need(node, left), analysis.need(node, right)
    inner = b[-2] if len(b) > 1 else b[-1]
    analysis.same(a[-1], inner, node)
    analysis.contract(node, left, -1)
    last = (*a[-2:-1], *(b[-1:] if len(b) > 1 else ()))
    batch_shape = shape_of(node)[: len(shape_of(node)) - len(last)]
    batch = broadcast(analysis, node, [a[:-2], b[:-2]], batch_shape)
    analysis.costs(node, *batch, *last, inner)
    return (*batch, *last)


def channel_norm(analysis: Analysis, node: fx.Node) -> Axes:
    """BatchNorm and InstanceNorm: each channel by itself, with its own parameters and statistics."""
    x = analysis.need(node, "input")
    if op_name(node) == "aten.instance_norm":
        analysis.pin(x[2:], node, "instance_norm takes its statistics over this dimension")
    elif argument(node, "training"):  # by the statistics of its input: some models standardize weights so
        analysis.normalize(node, "input", x, (0, *range(2, len(x))))
    for name in ("weight", "bias", "running_mean", "running_var"):
        _parameter(analysis, node, x[1:2], name)
    return x


def trailing_norm(analysis: Analysis, node: fx.Node) -> Axes:
    """LayerNorm and RMSNorm: statistics over the last dimensions, of what is kept of them."""
    x = analysis.need(node, "input")
    count = len(argument(node, "normalized_shape"))
    analysis.normalize(node, "input", x, tuple(range(len(x) - count, len(x))))
    for name in ("weight", "bias") if op_name(node) == "aten.layer_norm" else ("weight",):
        _parameter(analysis, node, x[-count:], name)
    return x


def group_norm(analysis: Analysis, node: fx.Node) -> Axes:
    """Channels are a product (groups, per group): whole groups may go, and the same channels of every group."""
    x, groups = analysis.need(node, "input"), argument(node, "num_groups")
    outer, inner = analysis.atoms.split(x[1], groups, len(x[1]) // groups)
    analysis.pin(x[2:], node, "group_norm takes its statistics over this dimension")
    analysis.normalize(node, "input", (x[0], outer, inner, *x[2:]), tuple(range(2, len(x) + 1)))
    analysis.factors[node] = outer
    for name in ("weight", "bias"):
        _parameter(analysis, node, x[1:2], name)
    return x


def weight_norm(analysis: Analysis, node: fx.Node) -> Axes:
    """g * v / |v|, the norm taken over all dimensions but `dim`. Slicing makes up in g for what |v| loses."""
    values, scale = analysis.need(node, "v"), analysis.need(node, "g")
    dim = argument(node, "dim") % len(values)
    analysis.same(values[dim], scale[dim], node)
    if not all(is_constant(argument(node, n)) for n in "vg") or len(argument(node, "g").users) > 1:
        analysis.pin((*values[:dim], *values[dim + 1 :]), node, "weight_norm takes its norm over this dimension")
    analysis.normalize(node, "v", values, tuple(d for d in range(len(values)) if d != dim))
    return values


def embedding(analysis: Analysis, node: fx.Node) -> Axes:
    """A table looked up by its rows."""
    weight, indices = analysis.need(node, "weight"), analysis.need(node, "indices")
    analysis.pin(weight[0], node, "rows of an embedding are looked up by number")
    return (*indices, weight[1])


def outer(analysis: Analysis, node: fx.Node) -> Axes:
    """[n] x [m] -> [n, m]."""
    first, second = (analysis.axes(n) for n in node.args[:2])
    analysis.costs(node)
    return (*first, *second)


def bilinear(analysis: Analysis, node: fx.Node) -> Axes:
    """x1^T W x2 with a weight [out, in1, in2]."""
    left, right, weight = (analysis.need(node, n) for n in ("input1", "input2", "weight"))
    for name, axes, dim in (("input1", left, 1), ("input2", right, 2)):
        analysis.same(axes[-1], weight[dim], node)
        analysis.contract(node, name, -1)
    _parameter(analysis, node, weight[:1], "bias")
    batch = broadcast(analysis, node, [left[:-1], right[:-1]], shape_of(node)[:-1])
    analysis.costs(node, *batch, *weight)
    return (*batch, weight[0])


def cosine_similarity(analysis: Analysis, node: fx.Node) -> Axes:
    """Zeros add nothing to a product or a norm."""
    dim, shape = argument(node, "dim"), shape_of(node)
    both = [analysis.need(node, n) for n in ("x1", "x2")]
    sizes = torch.broadcast_shapes(*(tuple(map(len, axes)) for axes in both))
    whole = broadcast(analysis, node, both, tuple(sizes))
    for name, axes in zip(("x1", "x2"), both):
        if len(axes) != len(whole):
            raise ValueError("operands of different rank")
        analysis.contract(node, name, dim % len(axes))
    kept = tuple(v for i, v in enumerate(whole) if i != dim % len(whole))
    assert tuple(map(len, kept)) == shape
    return kept


def grid_sample(analysis: Analysis, node: fx.Node) -> Axes:
    """Each channel is read at the same places [N, .., 2 or 3]."""
    x, grid = analysis.need(node, "input"), analysis.need(node, "grid")
    analysis.same(x[0], grid[0], node)
    slide(analysis, node, (*x[2:], *grid[1:]))
    return (*x[:2], *analysis.fixed(node, slice(2, None)))


def attention(analysis: Analysis, node: fx.Node) -> Axes:
    """softmax(q k^T * scale) v over [..., heads, tokens, features]; key positions stay, for the softmax."""
    q, k, v = (analysis.need(node, n) for n in ("query", "key", "value"))
    analysis.pin((k[-2], v[-2]), node, "softmax over the key positions")
    analysis.same(q[-1], k[-1], node)
    analysis.contract(node, "query", -1)
    if argument(node, "enable_gqa") and len(q[-3]) != len(k[-3]):
        heads, _ = analysis.atoms.split(q[-3], len(k[-3]), len(q[-3]) // len(k[-3]))
        for other in (k, v):
            analysis.same(heads, other[-3], node)
        lead = broadcast(analysis, node, [q[:-3], k[:-3], v[:-3]], shape_of(node)[:-3]) + q[-3:-2]
    else:
        lead = broadcast(analysis, node, [q[:-2], k[:-2], v[:-2]], shape_of(node)[:-2])
    mask = analysis.of(node, "attn_mask")
    if mask is not None:
        broadcast(analysis, node, [(*lead, q[-2], k[-2]), mask], (*map(len, lead), len(q[-2]), len(k[-2])))
    share = len(q[-1]) / (len(q[-1]) + len(v[-1]))
    analysis.costs(node, *lead, q[-2], k[-2], q[-1], share=share)
    analysis.costs(node, *lead, q[-2], k[-2], v[-1], share=1 - share)
    return (*lead, q[-2], v[-1])


def _parameter(analysis: Analysis, node: fx.Node, axes: Axes, name: str) -> None:
    """The parameter `name`, where there is one, has these axes."""
    for vector, given in zip(axes, analysis.of(node, name) or ()):
        analysis.same(vector, given, node)


LAYER_RULES = {
    **rows("conv1d conv2d conv3d", convolution),
    **rows("conv_transpose1d conv_transpose2d conv_transpose3d", transposed_convolution),
    **rows("linear", linear),
    **rows("matmul mm bmm mv dot", matmul),
    **rows("addmm baddbmm", add_matmul),
    **rows("batch_norm instance_norm", channel_norm),
    **rows("layer_norm rms_norm", trailing_norm),
    **rows("group_norm", group_norm),
    **rows("_weight_norm", weight_norm),
    **rows("embedding", embedding),
    **rows("outer ger", outer),
    **rows("bilinear", bilinear),
    **rows("cosine_similarity", cosine_similarity),
    **rows("grid_sampler grid_sampler_2d grid_sampler_3d", grid_sample),
    **rows("scaled_dot_product_attention", attention),
}
