"""Fold BatchNorm into the linear layer before or after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..frontend.program import Program, layer_name
from .base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from .kept_norm import keep_norm
from .rewrite import (
    argument,
    aten,
    constant,
    erase_dead,
    find,
    is_op,
    put_constant,
    replace,
    set_argument,
    update_constant,
)

CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
LAYERS = (*CONVS, *TRANSPOSED, aten.linear.default)


@register_pass
@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Fold BatchNorm into the convolution or linear layer beside it.

    In evaluation BatchNorm is y = a*x + c per channel, with a = weight / sqrt(var + eps) and c = bias - mean * a.

    After a layer y = W*x + b:    W' = a*W (per output channel),   b' = a*b + c.
    Before a layer:               W' = W*a (per input channel),    b' = b + sum of W over all but the output, times c.

    Legal when (1) BatchNorm uses its running statistics, (2) nothing else reads the value in between, (3) the weights
    belong to this layer alone, and, for BatchNorm before a layer, (4) the layer does not pad: padding puts zeros where
    BatchNorm would have put c. (5) Batch statistics in training mode are data, not constants: they are refused.
    What is not fused is reported with its reason.

    `keep` remembers what is fused after a layer, so that training with fake quantization can go on with the BatchNorm
    that the model had (see `kept_norm`).
    """

    name = "fuse-batchnorm"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False

    keep: bool = False

    def run(self, program: Program, context: Context) -> Change:
        change = Change()
        for norm in find(program, aten.batch_norm.default):
            reason = fuse_after(program, norm, self.keep)
            if reason is not None:
                before = _fuse_before(program, norm)
                reason = None if before is None else f"{reason}; {before}"
            if reason is None:
                change.count += 1
            else:
                change.notes.append(f"{layer_name(norm)} not fused: {reason}")
        erase_dead(program)
        return change


def fuse_after(program: Program, norm: fx.Node, keep: bool = False) -> str | None:
    """Fuse into the layer that feeds `norm`. Returns why not, or None when done."""
    layer = norm.args[0]
    if not is_op(layer, *LAYERS):
        return "its input does not come from a conv or linear layer"
    assert isinstance(layer, fx.Node)
    if len(layer.users) > 1:
        return f"the output of {layer_name(layer)} is also read elsewhere"
    if (reason := _not_constant(program, norm) or not_owned(layer)) is not None:
        return reason
    if is_op(layer, aten.linear.default) and norm.meta["val"].ndim != 2:
        return "BatchNorm normalizes another dimension than the linear layer's features"
    if keep and not is_op(layer, *TRANSPOSED):
        keep_norm(program, layer, norm)
    scale, shift = affine(program, norm)
    weight = constant(program, layer.args[1])
    assert weight is not None
    old_bias = constant(program, argument(layer, "bias"))
    bias = shift if old_bias is None else old_bias.double() * scale + shift
    store_weights(program, layer, scale_outputs(layer, weight.double(), scale), bias)
    replace(norm, layer)
    return None


def _fuse_before(program: Program, norm: fx.Node) -> str | None:
    """Fuse into the layer that reads `norm`. Returns why not, or None when done."""
    if len(norm.users) != 1:
        return "its output is read by more than one node"
    layer = next(iter(norm.users))
    if not is_op(layer, *LAYERS) or layer.args[0] is not norm:
        return "its output does not go to a conv or linear layer"
    if (reason := _not_constant(program, norm) or not_owned(layer) or pads(layer)) is not None:
        return reason
    if is_op(layer, aten.linear.default) and norm.meta["val"].ndim != 2:
        return "BatchNorm normalizes another dimension than the linear layer's features"
    if is_op(layer, *TRANSPOSED):
        return "a transposed convolution reads some inputs at fewer places near its border"
    scale, shift = affine(program, norm)
    weight = constant(program, layer.args[1])
    assert weight is not None
    old_bias = constant(program, argument(layer, "bias"))
    groups = 1 if is_op(layer, aten.linear.default) else argument(layer, "groups")
    scaled, added = scale_inputs(weight.double(), scale, shift, groups)
    bias = added if old_bias is None else old_bias.double() + added
    store_weights(program, layer, scaled, bias)
    replace(norm, norm.args[0])  # type: ignore[arg-type]
    return None


def affine(program: Program, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, c) of y = a*x + c in float64, from the norm's statistics and parameters."""
    mean, var = (constant(program, argument(norm, n)) for n in ("running_mean", "running_var"))
    weight, bias = (constant(program, argument(norm, n)) for n in ("weight", "bias"))
    assert mean is not None
    assert var is not None
    scale = (var.double() + argument(norm, "eps")).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.detach().double()


def _not_constant(program: Program, norm: fx.Node) -> str | None:
    if argument(norm, "training") or argument(norm, "running_mean") is None:
        return "it uses the statistics of the batch, not running ones"
    return None


def not_owned(layer: fx.Node) -> str | None:
    """Weights computed in the graph or shared with another layer cannot be rewritten for this one alone."""
    for node in (layer.args[1], argument(layer, "bias")):
        if node is None:
            continue
        if node.op != "get_attr":
            return f"the weights of {layer_name(layer)} are computed in the graph"
        readers = [u for n in node.graph.nodes if n.op == "get_attr" and n.target == node.target for u in n.users]
        if len(readers) > 1:
            return f"the weights of {layer_name(layer)} are shared with another layer"
    return None


def pads(layer: fx.Node) -> str | None:
    """Why a constant that is added to the layer's input cannot move into its bias; None where it can."""
    if is_op(layer, aten.linear.default):
        return None
    padding = argument(layer, "padding")
    padded = padding == "same" if isinstance(padding, str) else any(padding)
    return "the layer after it pads with zeros, which BatchNorm would have shifted" if padded else None


def scale_outputs(layer: fx.Node, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weights with which the layer's output channels come out times `scale` [out]."""
    if not is_op(layer, *TRANSPOSED):
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    # Transposed weights are [in, out / groups, ...]: the outputs of group g are scaled in the rows of group g.
    groups = argument(layer, "groups")
    per_group = weight.reshape(groups, -1, *weight.shape[1:])
    return (per_group * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


def scale_inputs(
    weight: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W', what is added to the bias) for a layer that reads a*x + c. Weights are [out, in / groups, ...]."""
    per_group = weight.reshape(groups, -1, *weight.shape[1:])
    along_inputs = (groups, 1, -1, *[1] * (weight.ndim - 2))
    added = (per_group * shift.reshape(along_inputs)).flatten(2).sum(2).flatten()
    return (per_group * scale.reshape(along_inputs)).reshape(weight.shape), added


def store_weights(program: Program, layer: fx.Node, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give the layer its new weights, under the old names (a new bias is named beside the weight)."""
    old = constant(program, layer.args[1])
    assert old is not None
    update_constant(program, layer.args[1], weight.to(old.dtype))  # type: ignore[arg-type]
    bias_node = argument(layer, "bias")
    if bias_node is not None:
        update_constant(program, bias_node, bias.to(old.dtype))
        return
    owner = str(layer.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    path = f"{owner}.bias" if owner else "bias"
    parameter = torch.nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
    set_argument(layer, "bias", put_constant(program, path, parameter, layer))
