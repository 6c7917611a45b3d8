"""Ops that tables name together: layers by their kind, moves, activation functions."""

from __future__ import annotations

CONVOLUTIONS = (
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv1d.default",
    "aten.conv1d.padding",
    "aten.conv3d.default",
)
CLAMPS = (
    "aten.relu.default",
    "aten.relu6.default",
    "aten.hardtanh.default",
    "aten.clamp.default",
    "aten.clamp_min.default",
)
# Functions of one value that kernels of layers compute on their way out, on runtimes that do so.
CURVES = (
    "aten.leaky_relu.default",
    "aten.sigmoid.default",
    "aten.tanh.default",
    "aten.silu.default",
    "aten.gelu.default",
    "aten.hardswish.default",
    "aten.hardsigmoid.default",
    "aten.elu.default",
)
# The output has the values of the input, and so its scale.
MOVES = (
    "aten.view.default",
    "aten.reshape.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.permute.default",
    "aten.transpose.int",
    "aten.t.default",
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
    "aten.pixel_shuffle.default",
)
POOLS = ("aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default", "aten.mean.dim")
SOFTMAXES = ("aten.softmax.int", "aten._softmax.default")
NORMS = ("aten.layer_norm.default", "aten.instance_norm.default", "aten.group_norm.default")
