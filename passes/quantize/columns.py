"""The first layer, computed for several columns at once.

A stem with stride 1 reads three numbers a pixel, and integer kernels spend their time on gathering them: three copies
of nine bytes for every output. With channels last, four neighbouring pixels of a row are one pixel of four times the
channels, without moving a byte; the same convolution then gives four columns of its output at once, as four times the
channels, and gathers a quarter as often:

    y[j] = sum_k w[k] x[j + k - p]        j = G J + r,  j + k - p = G (J + q) + s
    Y[J, r] = sum_q W[r, q, s] X[J + q, s]        W[r, q, s] = w[G q + s - r + p], zero where there is no such k

The weights are the same integers in another order, filled up with zeros: the result is the same to the last bit, and
each multiply-add of the model is four of the processor, which has them to spare. Measured on ONNX Runtime
(docs/results.md): the stems of VGG, of networks for 32x32 images and of those for one channel take 0.4 to 0.7 of the
time.

Only the written file has this form (`written`).
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ...frontend.program import Program
from ..rewrite import argument, aten, call_after, call_before, constant, find, is_op, put_constant, share_work

_MOST_CHANNELS, _NARROW = 3, 16  # with one channel more it only pays for so few outputs (measured)
_MOST_GROWTH = 0.05  # of the file
_ACTIVATIONS = (aten.relu.default, aten.hardtanh.default)


def stems_for_columns(program: Program, count: int) -> list[fx.Node]:
    """All stems that can be computed for `count` columns at once, and whose zeros are a small part of the weights."""
    most = _MOST_GROWTH * sum(t.nbytes for t in program.state_dict().values())
    stems = [n for n in find(program, aten.conv2d.default) if _is_stem(n, count)]
    return [n for n in stems if _growth(n, count) <= most]


def _growth(conv: fx.Node, count: int) -> float:
    """The zeros that a stem gets, in bytes."""
    shape = conv.args[1].meta["val"].shape  # type: ignore[union-attr]
    first, last = _reach(int(argument(conv, "padding")[-1]), shape[3], count)
    return float(math.prod(shape) * (count * count * (last - first + 1) / shape[3] - 1))


def _reach(pad: int, kernel: int, count: int) -> tuple[int, int]:
    """The first and the last group that a group of outputs reads, relative to its own."""
    return math.floor(-pad / count), math.floor((count - 1 + kernel - 1 - pad) / count)


def _is_stem(conv: fx.Node, count: int) -> bool:
    """Few channels, stride 1, an output as wide as the input, of a known width that `count` divides."""
    real, weight = conv.args[0], conv.args[1]
    if not is_op(real, torch.ops.fxpress.dequantize.default) or isinstance(argument(conv, "padding"), str):
        return False
    if not is_op(weight, torch.ops.fxpress.dequantize_channel.default) or not _quantizes(conv):
        return False
    width, kernel = conv.meta["val"].shape[3], weight.meta["val"].shape[3]  # type: ignore[union-attr]
    outputs, channels = weight.meta["val"].shape[:2]  # type: ignore[union-attr]
    return (
        channels <= _MOST_CHANNELS + (outputs <= _NARROW)
        and argument(conv, "groups") == 1
        and {*argument(conv, "stride"), *argument(conv, "dilation")} == {1}
        and isinstance(width, int)
        and width == real.meta["val"].shape[3]  # type: ignore[union-attr]
        and width % count == 0
        and kernel > 1
    )


def _chain(conv: fx.Node) -> list[fx.Node]:
    """The convolution and the activation functions behind it."""
    chain = [conv]
    while len(chain[-1].users) == 1 and is_op(next(iter(chain[-1].users)), *_ACTIVATIONS):
        chain.append(next(iter(chain[-1].users)))
    return chain


def _quantizes(conv: fx.Node) -> list[fx.Node]:
    """The quantizations of the output, behind activation functions; none where something else reads it."""
    users = list(_chain(conv)[-1].users)
    return users if all(is_op(u, torch.ops.fxpress.quantize.default) for u in users) else []


def rewrite_columns(program: Program, conv: fx.Node, count: int) -> None:
    """Compute a stem for `count` columns at once; not where something else than quantizations reads it."""
    if not _is_stem(conv, count):
        return
    real, weight, bias = conv.args[0], conv.args[1], argument(conv, "bias")
    assert isinstance(real, fx.Node)
    assert isinstance(weight, fx.Node)
    rows, columns = (int(argument(conv, "padding")[i]) for i in (0, -1))
    integers = constant(program, weight.args[0])
    assert integers is not None
    wide, before, after = widened(integers, columns, count)
    ends, form, read = _quantizes(conv), _together(conv, count), _together(real, count)
    x = call_before(conv, torch.ops.fxpress.columns_together.default, real.args[0], count)
    x = call_before(conv, torch.ops.fxpress.dequantize.default, x, *real.args[1:], value=read)
    x.args[0].meta["val"] = _together(real.args[0], count)  # type: ignore[union-attr]
    n, c, h, w = read.shape
    margins = [before, after, rows, rows]
    padded = read.new_empty((n, c, h + 2 * rows, w + before + after))
    x = call_before(conv, aten.constant_pad_nd.default, x, margins, 0.0, value=padded)
    stored = put_constant(program, f"{weight.args[0].target}_columns", wide, conv)  # type: ignore[union-attr]
    conv.args = (x, _per_channel(program, weight, stored, count, conv), _bias(program, bias, count, conv))
    conv.kwargs = {}
    share_work(conv, integers.shape[3] / (count * wide.shape[3]))
    for node in _chain(conv):
        node.meta["val"] = form
    for end in ends:
        apart = call_after(end, torch.ops.fxpress.columns_apart.default, end, count)
        end.replace_all_uses_with(apart, lambda user, apart=apart: user is not apart)  # type: ignore[misc]
        end.meta["val"] = _together(end, count)


def _together(node: object, count: int) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    return torch.ops.fxpress.columns_together(node.meta["val"], count)  # type: ignore[no-any-return]


def _bias(program: Program, bias: fx.Node | None, count: int, before: fx.Node) -> fx.Node | None:
    if bias is None:
        return None
    if is_op(bias, torch.ops.fxpress.dequantize_channel.default):
        return _per_channel(program, bias, _repeated(program, bias.args[0], count, before), count, before)
    return _repeated(program, bias, count, before)


def _per_channel(program: Program, old: fx.Node, stored: fx.Node, count: int, before: fx.Node) -> fx.Node:
    """dequantize_channel of other integers, the scales of its channels repeated."""
    scales = _repeated(program, old.args[1], count, before)
    form = stored.meta["val"].to(torch.float32)
    op = torch.ops.fxpress.dequantize_channel.default
    return call_before(before, op, stored, scales, *old.args[2:], value=form)


def _repeated(program: Program, node: object, count: int, before: fx.Node) -> fx.Node:
    """A constant of one number a channel, for the channels of `count` columns."""
    assert isinstance(node, fx.Node)
    values = constant(program, node)
    assert values is not None
    return put_constant(program, f"{node.target}_columns", values.repeat(count), before)


def widened(weight: torch.Tensor, pad: int, count: int) -> tuple[torch.Tensor, int, int]:
    """Weights [O, C, K, L] of a convolution with stride 1 and padding `pad` in width as [G O, G C, K, L'] over groups
    of G = `count` columns; and the padding, in groups, before and after."""
    kernel = weight.shape[3]
    first, last = _reach(pad, kernel, count)
    outputs, channels = weight.shape[:2]
    wide = weight.new_zeros((count, outputs, count, channels, weight.shape[2], last - first + 1))
    for r in range(count):
        for k in range(kernel):
            group, column = divmod(r + k - pad, count)
            wide[r, :, column, :, :, group - first] = weight[..., k]
    return wide.flatten(2, 3).flatten(0, 1).contiguous(), -first, last
