"""Normalizations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Operand
from .sizes import Size
from .table import row


@row("aten.batch_norm.default")
def batch_norm(
    g: Emitter,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    running_mean: Operand | None,
    running_var: Operand | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    """BatchNormalization with running statistics. Momentum only matters in training."""
    if training or running_mean is None or running_var is None:
        raise g.reject(
            "BatchNorm by the statistics of the batch is not lowered",
            hint="use running statistics and program.eval()",
        )
    channels = int(running_mean.shape[0])
    return g.op(
        "BatchNormalization",
        x,
        _vector(g, weight, 1.0, channels, x.dtype),
        _vector(g, bias, 0.0, channels, x.dtype),
        running_mean,
        running_var,
        epsilon=float(eps),
    )


def _vector(g: Emitter, given: Operand | None, number: float, count: int, dtype: torch.dtype) -> Value:
    """The given parameter, or a constant vector in its place."""
    return given.value if given is not None else g.constant(torch.full((count,), number, dtype=dtype))


@row("aten.instance_norm.default")
def instance_norm(
    g: Emitter,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    running_mean: Operand | None,
    running_var: Operand | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    """InstanceNormalization, or BatchNormalization where running statistics are used."""
    if not use_input_stats:
        return batch_norm(g, x, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
    channels = int(x.shape[1])
    scale, shift = _vector(g, weight, 1.0, channels, x.dtype), _vector(g, bias, 0.0, channels, x.dtype)
    return g.op("InstanceNormalization", x, scale, shift, epsilon=float(eps))


@row("aten.group_norm.default")
def group_norm(
    g: Emitter,
    x: Operand,
    num_groups: int,
    weight: Operand | None,
    bias: Operand | None,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    """InstanceNormalization with the groups as channels, then weight and bias per channel."""
    shape: list[Size] = [x.shape[0], num_groups, -1]
    ones, zeros = (_vector(g, None, n, num_groups, x.dtype) for n in (1.0, 0.0))
    grouped = g.op("Reshape", x, g.ints([0, num_groups, -1]))
    normal = g.op("InstanceNormalization", grouped, ones, zeros, epsilon=float(eps))
    value = g.reshape(normal, shape, x.shape)
    along_channels = [int(x.shape[1]), *[1] * (x.rank - 2)]
    if weight is not None:
        value = g.op("Mul", value, g.reshape(weight, weight.shape, along_channels))
    return value if bias is None else g.op("Add", value, g.reshape(bias, bias.shape, along_channels))


@row("aten.layer_norm.default")
def layer_norm(
    g: Emitter,
    x: Operand,
    normalized_shape: Sequence[int],
    weight: Operand | None,
    bias: Operand | None,
    eps: float,
    cudnn_enable: bool,
) -> Value:
    """LayerNormalization over the last dimensions."""
    shape = [int(s) for s in normalized_shape]
    scale = weight.value if weight is not None else g.constant(torch.ones(shape, dtype=x.dtype))
    return g.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=float(eps))


@row("aten.rms_norm.default")
def rms_norm(
    g: Emitter, x: Operand, normalized_shape: Sequence[int], weight: Operand | None, eps: float | None
) -> Value:
    """x / sqrt(mean(x^2) + eps) * weight; torch's default eps is that of the type."""
    epsilon = torch.finfo(x.dtype).eps if eps is None else float(eps)
    axes = g.ints(range(-len(normalized_shape), 0))
    mean = g.op("ReduceMean", g.op("Mul", x, x), axes, keepdims=1)
    value = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, g.scalar(epsilon, x.dtype))))
    return value if weight is None else g.op("Mul", value, weight)
