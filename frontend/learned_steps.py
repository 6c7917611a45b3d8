"""Fake quantization with learned steps: rounding that is trained through (operator `fxpress::fake_quantize`).

    v = x / s        c = clamp(v, qmin - z, qmax - z)        y = round_half_even(c) * s

Gradients (LSQ, Esser et al. 2020, arXiv 1902.08153), with rounding taken as the identity (straight-through estimator,
Bengio et al. 2013):

    dy/dx = 1 inside the range, 0 outside
    dy/ds = round(c) - v inside, c outside
    dy/dz = 0 inside, -s outside

LSQ weighs dL/ds by w = 1 / sqrt(n q), so that a step of training changes a scale by about the same share as the values.
Here what is learned is that share: programs hold the logarithm of the factor by which a scale has changed, so that no
scale becomes negative, and Adam, too, changes small and large scales alike (Jain et al. 2020, arXiv 1903.08066, "TQT").
Its gradient is LSQ's for the share, w dL/ds / s, through tanh, as in TQT, so that no step is large. A zero point is
learned by the share of the range that it moves (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576), in the same way. (tanh is
why a loss that is scaled up for float16 teaches no scales, and why the mean over processes is not that of one process.)

n is the number of values that share the scale, in one example where x is an activation; q is the largest number of
steps from zero. y is what `dequantize(quantize(x))` gives, to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

SCHEMA = "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis=None) -> Tensor"
_ULPS = 2.0**-22  # two units in the last place of float32
_SCALES = (2.0**-100, 2.0**100)  # a step that training drives to zero or to infinity stays a number


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, axis: int | None = None
) -> torch.Tensor:
    """x rounded to multiples of `scale` and clamped to [qmin - z, qmax - z] of them, in the dtype of x.

    `scale` [] or, along `axis`, [channels] (or [1]); `zero_point` [] is rounded to a whole number of
    [qmin, qmax]. At least float32 inside.
    """
    wide, step, low, high = _prepared(x, scale, zero_point, qmin, qmax, axis)
    return wide.div(step).clamp_(low, high).round_().mul_(step).to(x.dtype)


def effective_scale(scale: torch.Tensor) -> torch.Tensor:
    """The scale that is computed with: positive and finite, whatever training made of it."""
    return scale.detach().clamp(*_SCALES)


def effective_zero_point(zero_point: torch.Tensor, qmin: int, qmax: int) -> int:
    """The whole number that is computed with."""
    return min(max(round(float(zero_point.detach())), qmin), qmax)


def _prepared(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """x and scale ready to be divided, and the range in steps from zero."""
    zero = effective_zero_point(zero_point, qmin, qmax)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)] if axis is not None else []
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide, effective_scale(scale).reshape(shape), qmin - zero, qmax - zero


def fake_kernel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int, axis: int | None = None
) -> torch.Tensor:
    """The form of the result."""
    return torch.empty_like(x)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """What `backward` needs."""
    x, scale, zero_point, *ctx.limits = inputs
    ctx.save_for_backward(x, scale, zero_point)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, scale and zero point; those of the last two are such that their shares learn well."""
    x, scale, zero_point = ctx.saved_tensors
    qmin, qmax, axis = ctx.limits
    wide, step, low, high = _prepared(x, scale, zero_point, qmin, qmax, axis)
    steps, grad = wide.div(step), grad.to(wide.dtype)
    passed = _inside(grad, steps, low, high)
    weight = gradient_scale(x, scale, max(abs(low), abs(high)), axis)
    grad_scale = grad_zero = None
    if ctx.needs_input_grad[1]:
        size = effective_scale(scale)
        total = _products(steps.clamp(low, high).round_(), grad, axis) - _products(steps, passed, axis)
        grad_scale = (torch.tanh(total.sum_to_size(scale.shape) * weight / size) / size).to(scale.dtype)
    if ctx.needs_input_grad[2]:
        total = _summed((passed - grad) / step, None)
        grad_zero = (torch.tanh(total * weight / (qmax - qmin)) / (qmax - qmin)).to(zero_point.dtype)
    return passed.to(x.dtype), grad_scale, grad_zero, None, None, None


def gradient_scale(x: torch.Tensor, scale: torch.Tensor, steps: float, axis: int | None) -> float:
    """1 / sqrt(n * q): it balances how fast a scale and the values that it divides are learned."""
    parts = scale.numel() if axis is not None else (x.shape[0] if x.ndim else 1)
    return 1.0 / math.sqrt(max(x.numel() / max(parts, 1), 1.0) * max(steps, 1.0))


def _inside(grad: torch.Tensor, steps: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """`grad` where low <= steps <= high, else 0, in one kernel, which does not count its own limits as inside."""
    below, above = low - _ULPS * max(abs(low), 1.0), high + _ULPS * max(abs(high), 1.0)
    return torch.ops.aten.hardtanh_backward(grad, steps, below, above)


def _products(a: torch.Tensor, b: torch.Tensor, axis: int | None) -> torch.Tensor:
    """sum(a * b) over all dims but `axis`, without an array of products where all are summed."""
    return torch.dot(a.flatten(), b.flatten()) if axis is None else _summed(a * b, axis)


def _summed(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The sum over all dims but `axis`."""
    if axis is None:
        return values.sum()
    others = [i for i in range(values.ndim) if i != axis]
    return values.sum(others) if others else values
