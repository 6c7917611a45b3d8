"""Depthwise convolutions on a whole number of vectors.

Integer kernels of depthwise convolutions take twice as long where the channels are no multiple of a vector's: on 58
channels 2.4 times what they take on 64 (docs/results.md). Channels of zeros are added from the convolution that writes
what a depthwise one reads to those that read its result, whose weights for them are zeros:

    conv C -> 58, relu, depthwise 58, relu, conv 58 -> D    ->    conv C -> 64, relu, depthwise 64, relu, conv 64 -> D

What is between may be activation functions, quantizations, global pools, and products of two such tensors (squeeze and
excite). The added channels are read by zeros alone, so the result is the same to the last bit.
"""

from __future__ import annotations

import torch
from torch import fx

from ...frontend.program import Program
from ..rewrite import argument, aten, call_before, constant, find, is_op, put_constant, set_argument, share_work

_CONVOLUTION = aten.conv2d.default
# What computes each channel from the same channel of what it reads.
_BY_CHANNEL = frozenset(
    (
        *("fxpress.quantize", "fxpress.dequantize", "aten.relu", "aten.hardtanh", "aten.leaky_relu", "aten.sigmoid"),
        *("aten.hardsigmoid", "aten.silu", "aten.hardswish", "aten.gelu", "aten.adaptive_avg_pool2d"),
    )
)
_MOST = 1.5  # times as many channels, all zeros: the file grows by their weights
_PAIRS = (aten.mul.Tensor,)


def depthwise_to_widen(program: Program, multiple: int) -> dict[fx.Node, int]:
    """The depthwise convolutions on channels that are no multiple, and what they may be widened to."""
    found = {}
    for node in find(program, _CONVOLUTION):
        channels = argument(node, "groups")
        wide = -(-channels // multiple) * multiple
        if is_depthwise(node) and _by_channel(node.args[1]) and channels < wide <= _MOST * channels:
            found[node] = wide
    return found


def is_depthwise(conv: fx.Node) -> bool:
    """One filter for each channel."""
    weight = conv.args[1].meta["val"]  # type: ignore[union-attr]
    return bool(argument(conv, "groups") > 1 and weight.shape[1] == 1 and weight.shape[0] == argument(conv, "groups"))


def widen_depthwise(program: Program, conv: fx.Node, channels: int) -> None:
    """Widen a depthwise convolution and what lies around it; nothing where something else depends on the number of
    channels, or where it has been widened with another one."""
    had = conv.meta["val"].shape[1]
    region = _region(conv) if had < channels else None
    if region is None:
        return
    inside, writers, readers = region
    for node in [*writers, *(n for n in inside if n.target is _CONVOLUTION)]:
        _pad_constant(program, node, 1, channels - had, outputs=True)
        _pad_constant(program, node, 2, channels - had, outputs=True)
        share_work(node, had / channels)
        if node in inside:
            set_argument(node, "groups", channels)
    for node in readers:
        _pad_constant(program, node, 1, channels - had, outputs=False)
        share_work(node, had / channels)
    for node in [*inside, *writers]:
        val = node.meta["val"]
        node.meta["val"] = val.new_empty((val.shape[0], channels, *val.shape[2:]))


Nodes = dict[fx.Node, None]  # a set that keeps its order, so that a file is the same each time it is written


def _region(conv: fx.Node) -> tuple[Nodes, Nodes, Nodes] | None:
    """(nodes of which each channel depends on the same channel, convolutions that write them, convolutions that read
    them); None where anything else does."""
    inside, writers, readers = Nodes(), Nodes(), Nodes()
    channels, pending = conv.meta["val"].shape[1], [conv]
    while pending:
        node = pending.pop()
        if node in inside or node in writers:
            continue
        form = node.meta.get("val")
        if not isinstance(form, torch.Tensor) or form.ndim != 4 or form.shape[1] != channels:
            return None  # one gate for all channels, say
        if node.target is _CONVOLUTION and not is_depthwise(node):
            if not _widens(node):
                return None
            writers[node] = None
        elif _keeps_channels(node):
            inside[node] = None
            pending += [a for a in node.args[: 2 if node.target in _PAIRS else 1] if isinstance(a, fx.Node)]
        else:
            return None
        for user in node.users:
            if user.target is _CONVOLUTION and not is_depthwise(user):
                if user.args[0] is not node or not _widens(user):
                    return None
                readers[user] = None
            else:
                pending.append(user)
    return inside, writers, readers


def _keeps_channels(node: fx.Node) -> bool:
    """Does each channel of its output depend on the same channel of its input?"""
    if node.op != "call_function":
        return False
    if node.target is _CONVOLUTION:
        return is_depthwise(node) and _widens(node)
    return node.target in _PAIRS or str(node.target).removesuffix(".default") in _BY_CHANNEL


def _by_channel(value: object) -> bool:
    """Are these integers with a scale for each output channel?"""
    return is_op(value, torch.ops.fxpress.dequantize_channel.default)


def _widens(conv: fx.Node) -> bool:
    """Can channels of zeros be added to a convolution?"""
    dense = argument(conv, "groups") == 1 or is_depthwise(conv)
    bias = argument(conv, "bias")
    return dense and _by_channel(conv.args[1]) and (bias is None or _by_channel(bias))


def _pad_constant(program: Program, conv: fx.Node, position: int, more: int, outputs: bool) -> None:
    """More output channels, or more input channels, for a weight or bias."""
    old = conv.args[position] if position < len(conv.args) else None
    if old is None:
        return
    assert isinstance(old, fx.Node)
    integers, scales = constant(program, old.args[0]), constant(program, old.args[1])
    assert integers is not None
    assert scales is not None
    ends = [0, 0] * (integers.ndim - 1) + [0, more] if outputs else [0, 0] * (integers.ndim - 2) + [0, more]
    name = f"{old.args[0].target}_wide"  # type: ignore[union-attr]
    stored = put_constant(program, name, torch.nn.functional.pad(integers, ends), old)
    said = old.args[1]
    if outputs:
        # Those of a channel that is there: the scale of a bias must be that of the input times that of the weights.
        padded = torch.cat([scales, scales[-1:].expand(more)])
        said = put_constant(program, f"{old.args[1].target}_wide", padded, old)  # type: ignore[union-attr]
    form = stored.meta["val"].to(torch.float32)
    conv.update_arg(position, call_before(old, old.target, stored, said, *old.args[2:], value=form))  # type: ignore[arg-type]
