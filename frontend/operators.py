"""The operators that fxpress adds to ATen, so that quantized programs stay plain FX graphs that run and save.

    quantize(x, scale, zero_point, dtype)    q = saturate(round_half_even(x / scale) + zero_point)
    dequantize(q, scale, zero_point)         x = (q - zero_point) * scale
    dequantize_channel(q, scale, axis)       the same with one scale per index of `axis`, zero point 0
    pixel_blocks(x, block)                   [N, C, H, W] -> [N, block^2 C, H / block, W / block], blocks as channels
    columns_together(x, count)               [N, C, H, W] -> [N, count C, H, W / count], columns_apart(x, count) back
    observe(x, key)                          x; the interpreter of the calibration hands x to observer number `key`
    fake_quantize(x, scale, zero_point, ..)  dequantize(quantize(x)) in float, with gradients (learned_steps.py)
    dynamic_linear, dynamic_lstm             layers whose input is quantized by its own range (dynamic.py)

The arithmetic is that of ONNX QuantizeLinear and DequantizeLinear (float32 division, round half to even, saturation),
written once, here: observers, fake quantization, folding and lowering all mean this.
"""

from __future__ import annotations

import functools

import torch

from . import dynamic, learned_steps

NAMESPACE = "fxpress"


def quantize(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    """`saturate(round_half_even(x / scale) + zero_point)` in the integer `dtype`."""
    info = torch.iinfo(dtype)
    # A float32 tensor for the scale: dividing by a Python float would multiply by a rounded reciprocal in some kernels.
    steps = torch.div(x, torch.tensor(scale, dtype=torch.float32, device=x.device))
    return steps.round_().add_(zero_point).clamp_(info.min, info.max).to(dtype)


def dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """`(q - zero_point) * scale` in float32."""
    factor = torch.tensor(scale, dtype=torch.float32, device=q.device)
    return (q.to(torch.int32) - zero_point).to(torch.float32) * factor


def dequantize_channel(q: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    """`q * scale` with `scale` along `axis`, in float32. Symmetric: the zero point is 0."""
    shape = [1] * q.ndim
    shape[axis] = -1
    return q.to(torch.float32) * scale.reshape(shape)


def pixel_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of pixels becomes channels: [N, C, H, W] -> [N, block^2 C, H / block, W / block], any dtype.

    Channels are ordered by column in the block, row in the block, channel. In this order (not that of SpaceToDepth or
    pixel_unshuffle) a runtime that works on channels last moves whole rows, then whole pixels, then nothing.
    """
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block, block, w // block, block).permute(0, 5, 3, 1, 2, 4)
    return blocks.reshape(n, block * block * c, h // block, w // block)


def columns_together(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` neighbouring columns as one of so many times the channels, which are ordered by column, then channel:
    [N, C, H, W] -> [N, count C, H, W / count], any dtype. With channels last in memory nothing moves."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h, w // count, count).permute(0, 4, 1, 2, 3).reshape(n, count * c, h, w // count)


def columns_apart(x: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse: [N, count C, H, W] -> [N, C, H, count W]."""
    n, c, h, w = x.shape
    return x.reshape(n, count, c // count, h, w).permute(0, 2, 3, 4, 1).reshape(n, c // count, h, w * count)


def _observe(x: torch.Tensor, key: int) -> torch.Tensor:
    return x.clone()


def _fake_quantize(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


def _fake_dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32)


def _fake_dequantize_channel(q: torch.Tensor, scale: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(q, dtype=torch.float32)


_OPERATORS = {
    "quantize(Tensor x, float scale, int zero_point, ScalarType dtype) -> Tensor": (quantize, _fake_quantize),
    "dequantize(Tensor q, float scale, int zero_point) -> Tensor": (dequantize, _fake_dequantize),
    "dequantize_channel(Tensor q, Tensor scale, int axis) -> Tensor": (dequantize_channel, _fake_dequantize_channel),
    "pixel_blocks(Tensor x, int block) -> Tensor": (pixel_blocks, pixel_blocks),
    "columns_together(Tensor x, int count) -> Tensor": (columns_together, columns_together),
    "columns_apart(Tensor x, int count) -> Tensor": (columns_apart, columns_apart),
    "observe(Tensor x, int key) -> Tensor": (_observe, lambda x, key: torch.empty_like(x)),
    learned_steps.SCHEMA: (learned_steps.fake_quantize, learned_steps.fake_kernel),
    **dynamic.OPERATORS,
}


@functools.cache
def declare_operators() -> torch.library.Library:
    """Register the operators with torch, once; afterwards they are `torch.ops.fxpress.quantize` and so on."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema, (implementation, fake) in _OPERATORS.items():
        name = schema.split("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"{NAMESPACE}::fake_quantize",
        learned_steps.backward,
        setup_context=learned_steps.keep_for_backward,
        lib=library,
    )
    return library
