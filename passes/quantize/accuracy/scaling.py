"""Where a factor per channel can move from one place of a float program to another without changing what it computes.

    y = f(x / s) * s      for positive s per channel, where f commutes with scaling (relu, pooling, moves, ...)

A `Link` is a producer, whose output channels can be divided by s in its weights, and the layers behind it that can take
s into the weights of their input channels. Every reader on the way must be one of the two: an op that commutes with the
scaling, or such a layer. Cross-layer equalization and SmoothQuant differ only in how they choose s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from ....frontend.program import Program, layer_name
from ...fuse_batchnorm import CONVS, LAYERS, TRANSPOSED, not_owned, scale_inputs, scale_outputs
from ...rewrite import argument, argument_names, aten, constant, is_constant, is_op, update_constant

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class Reader:
    """A layer that reads the scaled tensor; `repeat` of its input features in a row belong to one channel (flatten)."""

    node: fx.Node
    repeat: int = 1


@dataclass(frozen=True)
class Link:
    """A producer with `channels` output channels, the ops between in graph order, and the layers that read it."""

    producer: fx.Node
    channels: int
    between: tuple[fx.Node, ...]
    readers: tuple[Reader, ...]


@dataclass
class _Walk:
    """What a walk forward from a producer has met."""

    between: list[fx.Node] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    scaled: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class _Channels:
    """Which dim of a tensor holds the channels, each `repeat` times in a row."""

    dim: int
    repeat: int = 1


def find_link(program: Program, producer: fx.Node) -> Link | str | None:
    """The link that starts at `producer`; why there is none; or None where the node cannot produce one at all."""
    dim = _producing_dim(producer)
    if dim is None:
        return None
    if (reason := _not_movable(producer)) is not None:
        return reason
    size = producer.meta["val"].shape[dim]
    walk = _Walk()
    reason = _follow(producer, _Channels(dim), walk) or _multiplied_by_itself(walk)
    if reason is not None:
        return reason
    walk.between.sort()
    return Link(producer, int(size), tuple(walk.between), tuple(walk.readers))


def divide_outputs(program: Program, producer: fx.Node, factors: torch.Tensor) -> None:
    """Divide the output channels of a producer by `factors` [channels], in its weights."""
    inverse = 1.0 / factors.double()
    for node in _weights_of(producer):
        old = constant(program, node)
        assert old is not None
        value = old.detach().double()
        new = scale_outputs(producer, value, inverse) if value.ndim > 1 else value * inverse
        update_constant(program, node, new.to(old.dtype))


def multiply_inputs(program: Program, reader: Reader, factors: torch.Tensor) -> None:
    """Multiply the weights of a layer's input channels by `factors` [channels]."""
    weight = constant(program, reader.node.args[1])
    assert weight is not None
    spread = factors.double().repeat_interleave(reader.repeat)
    scaled, _ = scale_inputs(weight.detach().double(), spread, torch.zeros_like(spread), groups_of(reader.node))
    update_constant(program, reader.node.args[1], scaled.to(weight.dtype))  # type: ignore[arg-type]


def input_ranges(program: Program, reader: Reader, channels: int) -> torch.Tensor:
    """The largest |weight| that reads each channel, float64[channels]."""
    weight = constant(program, reader.node.args[1])
    assert weight is not None
    groups = groups_of(reader.node)
    per_group = weight.detach().double().abs().reshape(groups, -1, *weight.shape[1:])
    largest = per_group.flatten(3).amax(3).amax(1) if per_group.ndim > 3 else per_group.amax(1)
    return largest.reshape(channels, reader.repeat).amax(1)


def output_ranges(program: Program, producer: fx.Node) -> torch.Tensor:
    """The largest |weight| of each output channel of a layer (not a norm), float64[channels]."""
    weight = constant(program, producer.args[1])
    assert weight is not None
    value = weight.detach().double().abs()
    if is_op(producer, *TRANSPOSED):
        groups = argument(producer, "groups")
        return value.reshape(groups, -1, *value.shape[1:]).flatten(3).amax(3).amax(1).flatten()
    return value.flatten(1).amax(1)


def groups_of(layer: fx.Node) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    return 1 if is_op(layer, aten.linear.default) else int(argument(layer, "groups"))


# -- producers and readers -----------------------------------------------------------------------------------------


def _producing_dim(node: fx.Node) -> int | None:
    """The dim of a node's output whose channels its own weights can scale; None for no producer."""
    if is_op(node, *CONVS, *TRANSPOSED):
        return 1 if _batched(node, node) else None
    scaling = is_op(node, aten.linear.default, *NORMS) or _vector(node) is not None
    return int(node.meta["val"].ndim) - 1 if scaling else None


def _vector(node: fx.Node) -> fx.Node | None:
    """The constant of x * w with one number per channel in the last dim (LayerScale, a written-out RMSNorm)."""
    if not is_op(node, aten.mul.Tensor):
        return None
    found = [a for a in node.args[:2] if is_constant(a)]
    size = node.meta["val"].shape[-1] if node.meta["val"].ndim else None
    return found[0] if len(found) == 1 and tuple(found[0].meta["val"].shape) == (size,) else None  # type: ignore[union-attr, return-value]


def _weights_of(producer: fx.Node) -> list[fx.Node]:
    """The constants that a factor on the output channels changes."""
    if (vector := _vector(producer)) is not None:
        return [vector]
    names = [n for n in ("weight", "bias") if n in argument_names(producer)]
    return [n for n in (argument(producer, name) for name in names) if n is not None]


def _not_movable(producer: fx.Node) -> str | None:
    if is_op(producer, *LAYERS):
        return not_owned(producer)
    if is_op(producer, *NORMS) and (
        argument(producer, "weight") is None or len(argument(producer, "normalized_shape")) != 1
    ):
        return f"{layer_name(producer)} has no weight per channel"
    if not all(map(_read_once, _weights_of(producer))):
        return f"the weights of {layer_name(producer)} are shared or computed"
    return None


def _read_once(node: fx.Node) -> bool:
    if not is_constant(node):
        return False
    return sum(len(n.users) for n in node.graph.nodes if n.op == "get_attr" and n.target == node.target) == 1


def _reads(layer: fx.Node, tensor: fx.Node, at: _Channels) -> bool:
    """Does `layer` sum over the channels of `tensor`?"""
    if layer.args[0] is not tensor or layer.all_input_nodes.count(tensor) != 1:
        return False
    return (is_op(layer, aten.linear.default) and at.dim == tensor.meta["val"].ndim - 1) or (
        is_op(layer, *CONVS) and at == _Channels(1) and _batched(layer, tensor)
    )


def _batched(layer: fx.Node, tensor: fx.Node) -> bool:
    """Is a convolution's input or output [N, C, ...], and not [C, ...]?"""
    return bool(tensor.meta["val"].ndim == layer.args[1].meta["val"].ndim)  # type: ignore[union-attr]


# -- the way between -----------------------------------------------------------------------------------------------


def _follow(tensor: fx.Node, at: _Channels, walk: _Walk) -> str | None:
    """Visit all readers of a tensor whose channels lie at `at`. Returns the reason where one of them is in the way."""
    walk.scaled.add(tensor)
    if not tensor.users:
        return "nothing reads it"
    for user in tensor.users:
        if _reads(user, tensor, at):
            if (reason := not_owned(user)) is not None:
                return reason
            walk.readers.append(Reader(user, at.repeat))
            continue
        commutes = COMMUTING.get(user.target) if user.op == "call_function" else None
        moved = commutes(user, tensor, at) if commutes else None
        if moved is None:
            return _reason(user)
        walk.between.append(user)
        if (reason := _follow(user, moved, walk)) is not None:
            return reason
    return None


def _reason(user: fx.Node) -> str:
    if user.op == "output":
        return "it is an output of the model"
    if is_op(user, aten.hardtanh.default, aten.relu6.default, aten.clamp.default):
        return f"{user.name} is a clamp, whose bound would differ from channel to channel"
    return f"{layer_name(user)} ({user.target}) does not commute with a factor per channel"


def _multiplied_by_itself(walk: _Walk) -> str | None:
    for node in walk.between:
        if is_op(node, aten.mul.Tensor) and all(a in walk.scaled for a in node.args[:2]):
            return f"{node.name} multiplies the scaled tensor by itself"
    return None


_Commutes = Callable[[fx.Node, fx.Node, _Channels], "_Channels | None"]


def _plainly(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    return at if node.args[0] is tensor else None


def _over_pixels(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    """Pooling and resizing work on the dims behind the channels of [N, C, ...]."""
    return at if at == _Channels(1) else None


def _pad(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    padded = len(node.args[1]) // 2  # type: ignore[arg-type]
    first = tensor.meta["val"].ndim - padded
    return at if argument(node, "value") == 0 and at.dim < first else None


def _mean(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    ndim = tensor.meta["val"].ndim
    dims = argument(node, "dim")
    if not dims or at.dim in (reduced := {d % ndim for d in dims}):
        return None
    return at if argument(node, "keepdim") else _Channels(at.dim - sum(d < at.dim for d in reduced), at.repeat)


def _select(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    dim = argument(node, "dim") % tensor.meta["val"].ndim
    return None if dim == at.dim else _Channels(at.dim - (dim < at.dim), at.repeat)


def _slice(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    return None if argument(node, "dim") % tensor.meta["val"].ndim == at.dim else at


def _permute(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    ndim = tensor.meta["val"].ndim
    order = list(range(ndim))
    if is_op(node, aten.permute.default):
        order = [d % ndim for d in node.args[1]]  # type: ignore[union-attr]
    else:
        a, b = argument(node, "dim0") % ndim, argument(node, "dim1") % ndim
        order[a], order[b] = b, a
    return _Channels(order.index(at.dim), at.repeat)


def _reshape(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    """The channels stay the last dim, or become, with the known dims behind them, the last dim."""
    before, after = tensor.meta["val"].shape, node.meta["val"].shape
    behind = before[at.dim + 1 :]
    if not all(isinstance(s, int) for s in (before[at.dim], after[-1], *behind)):
        return None
    repeat = 1
    for size in behind:
        repeat *= size
    return _Channels(len(after) - 1, at.repeat * repeat) if after[-1] == before[at.dim] * repeat else None


def _multiply(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    """By a number, or by another tensor that does not make the result wider."""
    shape, result = tensor.meta["val"].shape, node.meta["val"].shape
    return at if len(shape) == len(result) and shape[at.dim] == result[at.dim] else None


def _divide(node: fx.Node, tensor: fx.Node, at: _Channels) -> _Channels | None:
    return _multiply(node, tensor, at) if node.args[0] is tensor and node.args[1] is not tensor else None


COMMUTING: dict[object, _Commutes] = {
    aten.relu.default: _plainly,
    aten.leaky_relu.default: _plainly,
    aten.dropout.default: _plainly,
    aten.clone.default: _plainly,
    aten.contiguous.default: _plainly,
    aten.alias.default: _plainly,
    aten.max_pool2d.default: _over_pixels,
    aten.avg_pool2d.default: _over_pixels,
    aten.adaptive_avg_pool2d.default: _over_pixels,
    aten.upsample_nearest2d.default: _over_pixels,
    aten.upsample_nearest2d.vec: _over_pixels,
    aten.upsample_bilinear2d.default: _over_pixels,
    aten.upsample_bilinear2d.vec: _over_pixels,
    aten.constant_pad_nd.default: _pad,
    aten.mean.dim: _mean,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.mul.Tensor: _multiply,
    aten.div.Tensor: _divide,
}
