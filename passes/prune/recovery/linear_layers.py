"""Layers that are linear in their weights, seen as regressions: rows of inputs times a matrix give rows of outputs.

    linear, matmul          y = x W^T: a row for each vector
    convolution             a row for each position that the kernel visits, its features are the patch under the kernel
    transposed convolution  the convolution of the input with zeros put between its positions, kernel flipped
    BatchNorm, by itself    y = a x + c: one feature for each channel (its running statistics stay as they are)

Grouped layers are one regression for each group; a depthwise convolution and BatchNorm have as many groups as channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ....frontend.program import Program, get_attribute
from ...fuse_batchnorm import CONVS, TRANSPOSED
from ...rewrite import argument, aten, is_constant

Tensors = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LinearLayer:
    """One layer as a regression for each of its groups.

    `rows`: input of the layer -> [groups, rows, features]; `outputs`: a tensor like the layer's output (or a residual
    of it) -> [groups, rows, outputs]; `matrix`: weight -> [groups, features, outputs]; `weights`: that back to the
    shape of the weight. `bias` is the node that reads the bias, or None.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: Tensors
    outputs: Tensors
    matrix: Tensors
    weights: Tensors


def linear_layer(program: Program, node: fx.Node) -> LinearLayer | None:
    """How to read `node` as a regression; None for other ops and for weights that are computed."""
    if node.op != "call_function":
        return None
    make = _LAYERS.get(node.target)
    layer = make(program, node) if make is not None else None
    return layer if layer is not None and _owns_weights(layer) else None


def _owns_weights(layer: LinearLayer) -> bool:
    return is_constant(layer.weight) and (layer.bias is None or is_constant(layer.bias))


def _shape(program: Program, node: fx.Node) -> torch.Size:
    return get_attribute(program.graph_module, str(node.target)).shape


# -- linear -------------------------------------------------------------------------------------------------------


def _linear(program: Program, node: fx.Node) -> LinearLayer | None:
    weight = argument(node, "weight")
    if not is_constant(weight) or len(_shape(program, weight)) != 2:
        return None
    return _dense(node, argument(node, "input"), weight, argument(node, "bias"), transposed=True)


def _matmul(program: Program, node: fx.Node) -> LinearLayer | None:
    """x W with a constant W on the right."""
    source, weight = node.args[:2]
    if not is_constant(weight) or is_constant(source) or len(_shape(program, weight)) != 2:  # type: ignore[arg-type]
        return None
    return _dense(node, source, weight, None, transposed=False)


def _add_matmul(program: Program, node: fx.Node) -> LinearLayer | None:
    """bias + x W, as GPT-2 spells its linear layers."""
    bias, source, weight = node.args[:3]
    plain = all(argument(node, n) == 1 for n in ("alpha", "beta"))
    if not (plain and is_constant(weight) and is_constant(bias)) or len(_shape(program, bias)) != 1:  # type: ignore[arg-type]
        return None
    return _dense(node, source, weight, bias, transposed=False)


def _dense(node: fx.Node, source: Any, weight: Any, bias: Any, transposed: bool) -> LinearLayer:
    turn: Tensors = (lambda w: w.squeeze(0).T) if transposed else (lambda w: w.squeeze(0))
    return LinearLayer(
        node=node,
        source=source,
        weight=weight,
        bias=bias,
        rows=lambda x: x.reshape(1, -1, x.shape[-1]),
        outputs=lambda y: y.reshape(1, -1, y.shape[-1]),
        matrix=lambda w: (w.T if transposed else w)[None],
        weights=turn,
    )


# -- convolution --------------------------------------------------------------------------------------------------


def _convolution(program: Program, node: fx.Node) -> LinearLayer | None:
    """Weight [out, in / groups, kernel...]."""
    weight = argument(node, "weight")
    if not is_constant(weight):
        return None
    shape = _shape(program, weight)
    kernel, groups = tuple(shape[2:]), argument(node, "groups")
    window = _Window(
        kernel=kernel,
        stride=_per_dim(argument(node, "stride"), kernel),
        dilation=_per_dim(argument(node, "dilation"), kernel),
        padding=_padding(node, kernel),
    )
    return LinearLayer(
        node=node,
        source=argument(node, "input"),
        weight=weight,
        bias=argument(node, "bias"),
        rows=lambda x: window.patches(_batched(x, len(shape)), groups),
        outputs=lambda y: _by_group(_batched(y, len(shape)), groups),
        matrix=lambda w: w.reshape(groups, shape[0] // groups, -1).transpose(1, 2),
        weights=lambda m: m.transpose(1, 2).reshape(shape),
    )


def _transposed(program: Program, node: fx.Node) -> LinearLayer | None:
    """Weight [in, out / groups, kernel...]."""
    weight = argument(node, "weight")
    if not is_constant(weight):
        return None
    shape = _shape(program, weight)
    kernel, groups = tuple(shape[2:]), argument(node, "groups")
    stride, dilation, padding, extra = (
        _per_dim(argument(node, n), kernel) for n in ("stride", "dilation", "padding", "output_padding")
    )
    ends = [(d * (k - 1) - p, d * (k - 1) - p + e) for k, d, p, e in zip(kernel, dilation, padding, extra)]
    window = _Window(kernel, (1,) * len(kernel), dilation, tuple(ends))
    flipped = tuple(range(3, 3 + len(kernel)))
    grouped = (groups, shape[0] // groups, *shape[1:])
    return LinearLayer(
        node=node,
        source=argument(node, "input"),
        weight=weight,
        bias=argument(node, "bias"),
        rows=lambda x: window.patches(_spread(_batched(x, len(shape)), stride), groups),
        outputs=lambda y: _by_group(_batched(y, len(shape)), groups),
        matrix=lambda w: w.reshape(grouped).flip(flipped).movedim(2, -1).reshape(groups, -1, shape[1]),
        weights=lambda m: (
            m.reshape(groups, shape[0] // groups, *kernel, shape[1]).movedim(-1, 2).flip(flipped).reshape(shape)
        ),
    )


@dataclass(frozen=True)
class _Window:
    """A kernel that slides: sizes for each spatial dimension; padding as (before, after), negative where it crops."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def patches(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """[n, channels, space...] -> [groups, n * positions, channels per group * kernel]."""
        x = F.pad(x, [end for pair in reversed(self.padding) for end in pair])
        for dim, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation), start=2):
            x = x.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        count = len(self.kernel)
        x = x.unflatten(1, (groups, -1)).movedim(2, 2 + count)  # [n, groups, positions..., channels, kernel...]
        features = x.shape[2 + count :].numel()
        return x.movedim(1, 0).reshape(groups, -1, features)


def _by_group(y: torch.Tensor, groups: int) -> torch.Tensor:
    """[n, channels, space...] -> [groups, n * positions, channels per group]."""
    y = y.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1)
    return y.reshape(groups, -1, y.shape[-1])


def _batched(x: torch.Tensor, dims: int) -> torch.Tensor:
    return x.unsqueeze(0) if x.ndim < dims else x


def _spread(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Put stride - 1 zeros between neighbours."""
    if all(s == 1 for s in stride):
        return x
    wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride)))
    wide[(..., *(slice(None, None, s) for s in stride))] = x
    return wide


def _per_dim(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * len(kernel) if len(values) == 1 else values)


def _padding(node: fx.Node, kernel: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    value = argument(node, "padding")
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, _per_dim(argument(node, "dilation"), kernel))]
        return tuple((t // 2, t - t // 2) for t in totals)
    return tuple((p, p) for p in _per_dim(value, kernel))


# -- BatchNorm ----------------------------------------------------------------------------------------------------


def _batch_norm(program: Program, node: fx.Node) -> LinearLayer | None:
    """y = weight * (x - mean) / sqrt(var + eps) + bias, as a layer with one feature for each channel."""
    weight, bias = argument(node, "weight"), argument(node, "bias")
    if not (is_constant(weight) and is_constant(bias) and uses_statistics(node)):
        return None
    mean, deviation = statistics(program, node)
    expanded: Tensors = lambda v: v.reshape(-1, *[1] * (node.meta["val"].ndim - 2))  # noqa: E731
    return LinearLayer(
        node=node,
        source=argument(node, "input"),
        weight=weight,
        bias=bias,
        rows=lambda x: _by_group((x.double() - expanded(mean)) / expanded(deviation), x.shape[1]),
        outputs=lambda y: _by_group(y, y.shape[1]),
        matrix=lambda w: w[:, None, None],
        weights=lambda m: m.flatten(),
    )


def uses_statistics(norm: fx.Node) -> bool:
    """Does this BatchNorm normalize by stored statistics?"""
    given = is_constant(argument(norm, "running_mean")) and is_constant(argument(norm, "running_var"))
    return given and argument(norm, "training") is False


def statistics(program: Program, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation with eps) of a BatchNorm, float64 [channels]."""
    mean, variance = (
        get_attribute(program.graph_module, str(argument(norm, n).target)).double()
        for n in ("running_mean", "running_var")
    )
    return mean, (variance + argument(norm, "eps")).sqrt()


_LAYERS: dict[Any, Callable[[Program, fx.Node], LinearLayer | None]] = {
    aten.linear.default: _linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default), _matmul),
    aten.addmm.default: _add_matmul,
    **dict.fromkeys((*CONVS, aten.conv3d.padding), _convolution),
    **dict.fromkeys(TRANSPOSED, _transposed),
    aten.batch_norm.default: _batch_norm,
}
