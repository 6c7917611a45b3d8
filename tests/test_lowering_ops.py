"""Every lowering row against eager PyTorch, at batches 1, 2 and 5, with arguments that are not the defaults.

A case is a function of tensors (or a module) and its example inputs with batch 2. It is captured, lowered, checked by
onnx.checker, and run in ONNX Runtime on new inputs of each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpress.backends.onnx.lower import lower
from fxpress.backends.onnx.table import Row, lowering_rows
from fxpress.frontend.capture import capture
from fxpress.runtime.session import make_session


@dataclass
class Case:
    name: str
    run: Any
    inputs: tuple[torch.Tensor, ...]
    bound: float = 1e-5


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


CASES: list[Case] = []
_generator = torch.Generator().manual_seed(0)


def image(channels: int = 6, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=_generator)


def tokens(length: int = 5, width: int = 8) -> torch.Tensor:
    return torch.randn(2, length, width, generator=_generator)


def matrix(width: int = 8) -> torch.Tensor:
    return torch.randn(2, width, generator=_generator)


def whole(*shape: int, low: int = -7, high: int = 8) -> torch.Tensor:
    return torch.randint(low, high, (2, *shape), generator=_generator)


def case(name: str, run: Any, *inputs: torch.Tensor, bound: float = 1e-5) -> None:
    CASES.append(Case(name, run, inputs, bound))


def redrawn(module: nn.Module) -> nn.Module:
    """Weights and statistics that are neither zero nor one."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=_generator) + 0.3)
    return module


# -- activations and elementwise ------------------------------------------------------------------------------------

for fn in (F.relu, F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.mish, F.selu, F.softsign, F.logsigmoid, F.tanhshrink,
           torch.sigmoid, torch.tanh, torch.erf, torch.exp, torch.sin, torch.cos, torch.tan, torch.atan, torch.sinh,
           torch.cosh, torch.asinh, torch.abs, torch.neg, torch.sign, torch.floor, torch.ceil, torch.trunc, torch.expm1,
           torch.square, torch.reciprocal, torch.special.expit):  # fmt: skip
    case(fn.__name__, lambda x, fn=fn: fn(x * 4), matrix())
for fn in (torch.sqrt, torch.rsqrt, torch.log, torch.log2, torch.log10, torch.log1p):
    case(fn.__name__, lambda x, fn=fn: fn(x.abs() + 0.1), matrix())
for fn in (torch.asin, torch.acos, torch.atanh):
    case(fn.__name__, lambda x, fn=fn: fn(torch.tanh(x)), matrix())
case("acosh", lambda x: torch.acosh(x.abs() + 1.1), matrix())
case("round", lambda x: torch.round(x * 2) / 2 + torch.round(torch.tensor([0.5, 1.5, -2.5, 2.5])), matrix(4))
case("rounding an integer", lambda x: x.floor() + x.ceil() + x.round() + x.trunc(), whole(4))
case("unary of integers", lambda x: torch.exp(x) + torch.sigmoid(x) + torch.sqrt(x.abs()), whole(4))
case("gelu", F.gelu, tokens())
case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), tokens())
case("elu alpha", lambda x: F.elu(x, alpha=0.4), matrix())
case("celu alpha", lambda x: F.celu(x, alpha=0.4), matrix())
case("leaky_relu slope", lambda x: F.leaky_relu(x, 0.3), matrix())
case("softplus", F.softplus, matrix())
case("softplus beta threshold", lambda x: F.softplus(x * 3, beta=1.7, threshold=2.0), matrix())
case("hardtanh bounds", lambda x: F.hardtanh(x, -0.3, 0.7), matrix())
case("threshold", lambda x: F.threshold(x, 0.2, -3.0), matrix())
case("hardshrink", lambda x: F.hardshrink(x, 0.7), matrix())
case("softshrink", lambda x: F.softshrink(x, 0.7), matrix())
case("clamp both", lambda x: x.clamp(-0.2, 0.6), matrix())
case("clamp min", lambda x: x.clamp(min=0.1), matrix())
case("clamp max", lambda x: x.clamp_max(0.1), matrix())
case("clamp tensor", lambda x, a: x.clamp(a, a + 1), matrix(), matrix())
case("clamp of integers by a float", lambda x: x.clamp(min=0.5), whole(4))
case("clamp_min tensor", lambda x, a: torch.clamp_min(x, a) + torch.clamp_max(x, a) * 2, matrix(), matrix())
case("prelu channels", redrawn(nn.PReLU(6)), image())
case("prelu shared", redrawn(nn.PReLU()), tokens())
case("prelu matrix", redrawn(nn.PReLU(8)), matrix())
case("glu", lambda x: F.glu(x, dim=1), image())
case("glu negative", lambda x: F.glu(x, dim=-1), tokens())
case("softmax", lambda x: x.softmax(1), tokens())
case("softmax dtype", lambda x: x.softmax(-1, dtype=torch.float64), tokens())
case("log_softmax", lambda x: x.log_softmax(-2), tokens())
case("dropout", nn.Dropout(0.5), matrix())

# -- arithmetic -----------------------------------------------------------------------------------------------------

case("add alpha", lambda x, y: torch.add(x, y, alpha=0.3), matrix(), matrix())
case("sub alpha", lambda x, y: torch.sub(x, y, alpha=3), matrix(), matrix())
case("rsub", lambda x: torch.rsub(x, 1.5, alpha=0.5), matrix())
case("rsub scalar", lambda x: 1 - x, matrix())
case("add broadcast", lambda x, y: x + y[:, None], tokens(), matrix())
case("mul scalar", lambda x: 2 * x / 3, matrix())
case("int plus float scalar", lambda x: x + 1.5, whole(4))
case("int times float tensor", lambda x, y: x * y, whole(8), matrix())
case("int division", lambda x, y: x / y, whole(6), whole(6, low=1))
case("bool arithmetic", lambda x: (x > 0) * x + (x > 0) * (x < 1) + ((x > 0) + (x < -1)), matrix())
case("half promotion", lambda x, y: x.double() + y, matrix(), matrix())
case("div trunc", lambda x: torch.div(x * 5, 1.5, rounding_mode="trunc"), matrix())
case("div floor", lambda x: torch.div(x * 5, 1.5, rounding_mode="floor"), matrix())
case("div none", lambda x: torch.div(x, 1.5, rounding_mode=None), matrix())
case("int div trunc", lambda x: torch.div(x, 3, rounding_mode="trunc"), whole(9))
case("int div floor", lambda x: torch.div(x, 3, rounding_mode="floor"), whole(9))
case("int div floor negative", lambda x: torch.div(x, -3, rounding_mode="floor"), whole(9))
case("floor_divide exact", lambda x: (x * 0 + 1.0) // 0.1, matrix())
case("floor_divide tensor", lambda x, y: x // y, whole(6), whole(6, low=1))
case("remainder", lambda x: (x * 5) % 1.5 + (x * 5) % -1.5, matrix(), bound=1e-4)
case("remainder int", lambda x: x % 3 + x % -3, whole(9))
case("fmod", lambda x: torch.fmod(x * 5, 1.5), matrix(), bound=1e-4)
case("pow", lambda x: x**2 + x**3 + x.abs() ** 0.5 + x.abs() ** 1.3, matrix())
case("pow scalar base", lambda x: 2.0**x, matrix())
case("pow tensor", lambda x, y: x.abs() ** y, matrix(), matrix())
case("int pow", lambda x: x**2, whole(4))
case("maximum", lambda x, y: torch.maximum(x, y) - torch.minimum(y, x), matrix(), matrix())
case("max.other", lambda x, y: torch.max(x, y) - 2 * torch.min(x, y), matrix(), matrix())
case("lerp", lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, y), matrix(), matrix())
case("addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.5) + torch.addcdiv(x, y, x.abs() + 1, value=2), matrix(), matrix())
case("atan2", lambda x, y: torch.atan2(x, y), matrix(), matrix())

# -- comparisons and logic ------------------------------------------------------------------------------------------

case("compare tensors", lambda x, y: ((x < y), (x <= y), (x > y), (x >= y), (x == x), (x != y)), matrix(), matrix())
case("compare scalars", lambda x: ((x < 0.5), (x <= 1), (x > -1), (x >= 0), (x == 2), (x != 3)), whole(6))
case("compare int with float", lambda x: x > 1.5, whole(6))
case("logic", lambda x, y: (x > 0) & (y > 0) | ~(x > 1) ^ (y < 0), matrix(), matrix())
case("logical", lambda x, y: torch.logical_and(x, y > 0).logical_or(x > 3).logical_xor(y < 0).logical_not(), matrix(), matrix())
case("bitwise", lambda x, y: (x & y) | (x ^ 5) & ~y, whole(6), whole(6))
case("where", lambda x, y: torch.where(x > 0, x, y), matrix(), matrix())
case("where scalars", lambda x: torch.where(x > 0, x, 0.5) + torch.where(x < 0, 2, x) + torch.where(x < 1, 1.0, 0.0), matrix())
case("where bool", lambda x, y: torch.where(x > 0, y > 0, x < -1), matrix(), matrix())
case("where promotes", lambda x, y: torch.where(x > 0, x, y), whole(8), matrix())
case("masked_fill", lambda x: x.masked_fill(x > 0, float("-inf")).softmax(-1), tokens(5, 32))
case("masked_fill tensor", lambda x: x.masked_fill(x > 0, torch.tensor(3.0)), matrix())
case("isnan", lambda x: (x / (x > 0)).isnan() | (1 / (x > 0).float()).isinf(), matrix())

# -- convolutions ---------------------------------------------------------------------------------------------------

case("conv2d", nn.Conv2d(6, 4, 3, stride=2, padding=1), image())
case("conv2d rectangular", nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), bias=False), image())
case("conv2d groups", nn.Conv2d(6, 9, 3, groups=3, padding="valid"), image())
case("conv2d depthwise", nn.Conv2d(6, 6, 5, groups=6, padding=2), image())
case("conv2d same odd", nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)), image())
case("conv2d pad modes", nn.Sequential(nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), image())
case("conv2d pad replicate", nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"), image())
case("conv1d", nn.Conv1d(5, 4, 3, stride=2, padding=2, dilation=2), tokens())
case("conv1d same", nn.Conv1d(5, 4, 4, padding="same"), tokens())
case("conv3d", nn.Conv3d(3, 4, (2, 3, 3), stride=(1, 2, 1), padding=1), torch.randn(2, 3, 4, 6, 5))
case("conv by computed weight", lambda x: F.conv2d(x, x.mean(0)[None, :, :3, :3].sigmoid()), image())
case("conv_transpose2d", nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), image())
case("conv_transpose2d groups", nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), padding=(0, 1), groups=2, dilation=(2, 1), bias=False), image())
case("conv_transpose1d", nn.ConvTranspose1d(5, 4, 3, stride=3, output_padding=2), tokens())
case("conv_transpose3d", nn.ConvTranspose3d(3, 2, 3, stride=2, padding=1), torch.randn(2, 3, 4, 5, 3))

# -- linear algebra -------------------------------------------------------------------------------------------------

case("linear 2d", nn.Linear(8, 5), matrix())
case("linear no bias", nn.Linear(8, 5, bias=False), matrix())
case("linear 3d", nn.Linear(8, 5), tokens())
case("linear 3d no bias", nn.Linear(8, 5, bias=False), tokens())
case("linear 4d", nn.Linear(7, 5), image())
case("linear 3d computed weight", lambda x: F.linear(x, x.mean((0,))[:3]), tokens())
case("shared linear", nn.Sequential(*[nn.Linear(8, 8)] * 2), tokens())
case("addmm", lambda x: torch.addmm(torch.ones(3), x, torch.ones(8, 3) / 3, beta=0.5, alpha=2), matrix())
case("mm bmm", lambda x: (x @ torch.ones(8, 3)).unsqueeze(1).bmm(torch.ones(1, 3, 2).expand(x.shape[0], -1, -1)), matrix())
case("baddbmm", lambda x: torch.baddbmm(torch.ones(1, 5, 5), x, x.mT, beta=0.5, alpha=2), tokens())
case("matmul broadcast", lambda x: x @ torch.ones(2, 1, 8, 3), tokens())
case("matmul vector", lambda x: x @ torch.arange(8.0), tokens())
case("einsum", lambda x, y: torch.einsum("bic, bjc -> bij", x, y), tokens(), tokens())
case("einsum ellipsis", lambda x: torch.einsum("...ij,jk->...ik", x, torch.ones(8, 3)), tokens())
case("bilinear", redrawn(nn.Bilinear(8, 8, 3)), matrix(), matrix())
case("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, dim=-1), tokens(), tokens())
case("embedding", nn.Embedding(10, 4, padding_idx=2), whole(5, low=0, high=10))
case("outer", lambda x: torch.outer(x[:, 0], torch.arange(3.0)), matrix())

# -- normalization --------------------------------------------------------------------------------------------------

case("batch_norm2d", redrawn(nn.BatchNorm2d(6, eps=1e-2)), image())
case("batch_norm no affine", redrawn(nn.BatchNorm1d(8, affine=False)), matrix())
case("batch_norm 3d tensor", redrawn(nn.BatchNorm1d(5)), tokens())
case("instance_norm", nn.InstanceNorm2d(6, eps=1e-2), image())
case("instance_norm affine", redrawn(nn.InstanceNorm2d(6, affine=True)), image())
case("instance_norm tracked", redrawn(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)), image())
case("group_norm", redrawn(nn.GroupNorm(3, 6, eps=1e-2)), image())
case("group_norm tokens", nn.GroupNorm(1, 5, affine=False), tokens())
case("layer_norm", redrawn(nn.LayerNorm(8, eps=1e-2)), tokens())
case("layer_norm two dims", redrawn(nn.LayerNorm((5, 8), bias=False)), tokens())
case("layer_norm plain", nn.LayerNorm(8, elementwise_affine=False), tokens())
case("rms_norm", redrawn(nn.RMSNorm(8)), tokens())
case("rms_norm eps", nn.RMSNorm(8, eps=1e-2, elementwise_affine=False), tokens())
case("local_response_norm", nn.LocalResponseNorm(3, alpha=0.1), image())
case("normalize", lambda x: F.normalize(x, dim=1, p=2.0) + F.normalize(x, p=1.0), tokens())

# -- pooling --------------------------------------------------------------------------------------------------------

case("max_pool2d", lambda x: F.max_pool2d(x, 3, stride=2, padding=1), image())
case("max_pool2d default stride", lambda x: F.max_pool2d(x, (2, 3)), image())
case("max_pool2d ceil", lambda x: F.max_pool2d(x, 2, stride=2, ceil_mode=True), image(6, 9, 7))
case("max_pool2d ceil drops", lambda x: F.max_pool2d(x, 3, stride=3, padding=1, ceil_mode=True), image(6, 8, 11))
case("max_pool2d dilation ceil", lambda x: F.max_pool2d(x, 2, stride=3, dilation=3, ceil_mode=True), image(6, 12, 11))
case("max_pool1d", lambda x: F.max_pool1d(x, 3, stride=2, padding=1), tokens())
case("max_pool3d", lambda x: F.max_pool3d(x, 2, stride=1), torch.randn(2, 3, 4, 6, 5))
case("max_pool2d of bytes", lambda x: F.max_pool2d(x.to(torch.uint8).float(), 2).to(torch.uint8), image().abs() * 50)
case("avg_pool2d", lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), image())
case("avg_pool2d exclude", lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False), image())
case("avg_pool2d ceil", lambda x: F.avg_pool2d(x, 2, stride=2, ceil_mode=True), image(6, 9, 7))
case("avg_pool2d ceil pad", lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True), image(6, 8, 10))
case("avg_pool2d ceil pad exclude", lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), image(6, 8, 10))
case("avg_pool2d divisor", lambda x: F.avg_pool2d(x, 3, padding=1, divisor_override=4), image())
case("avg_pool2d divisor ceil", lambda x: F.avg_pool2d(x, 3, 2, padding=1, divisor_override=4, ceil_mode=True), image(6, 8, 10))
case("avg_pool1d", lambda x: F.avg_pool1d(x, 3, stride=2, padding=1), tokens())
case("avg_pool3d", lambda x: F.avg_pool3d(x, 2), torch.randn(2, 3, 4, 6, 5))
case("adaptive_avg 1", lambda x: F.adaptive_avg_pool2d(x, 1), image())
case("adaptive_avg divides", lambda x: F.adaptive_avg_pool2d(x, (3, 1)), image())
case("adaptive_avg same", lambda x: F.adaptive_avg_pool2d(x, (None, 7)), image())
case("adaptive_avg general", lambda x: F.adaptive_avg_pool2d(x, (4, 5)), image())
case("adaptive_avg larger", lambda x: F.adaptive_avg_pool2d(x, (12, 7)), image())
case("adaptive_avg 1d", lambda x: F.adaptive_avg_pool1d(x, 3), tokens())
case("adaptive_avg 3d", lambda x: F.adaptive_avg_pool3d(x, (2, 4, 3)), torch.randn(2, 3, 4, 6, 5))
case("adaptive_max divides", lambda x: F.adaptive_max_pool2d(x, (3, 7)), image())
case("adaptive_max general", lambda x: F.adaptive_max_pool2d(x, (4, 5)), image())
case("adaptive_max 1d", lambda x: F.adaptive_max_pool1d(x, 1), tokens())
case("lp_pool", lambda x: F.lp_pool2d(x.abs(), 2, 3, stride=2), image())

# -- padding and resizing -------------------------------------------------------------------------------------------

case("pad constant", lambda x: F.pad(x, (1, 2, 0, 3), value=1.5), image())
case("pad negative", lambda x: F.pad(x, (-1, 2)), image())
case("pad reflect", lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"), image())
case("pad replicate", lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"), image())
case("pad circular", lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"), image())
case("pad batch", lambda x: F.pad(x, (0, 0, 1, 0, 0, 2)), tokens())
case("reflection_pad1d", nn.ReflectionPad1d(2), tokens())
for mode in ("nearest", "nearest-exact", "bilinear", "bicubic"):
    case(f"{mode} scale", lambda x, m=mode: F.interpolate(x, scale_factor=2, mode=m), image(), bound=2e-5)
    case(f"{mode} size", lambda x, m=mode: F.interpolate(x, size=(5, 13), mode=m), image(), bound=2e-5)
    case(f"{mode} uneven scale", lambda x, m=mode: F.interpolate(x, scale_factor=(1.7, 0.6), mode=m), image(), bound=2e-5)
for mode in ("bilinear", "bicubic"):
    case(f"{mode} align", lambda x, m=mode: F.interpolate(x, size=(5, 13), mode=m, align_corners=True), image(), bound=2e-5)
    case(f"{mode} align scale", lambda x, m=mode: F.interpolate(x, scale_factor=1.5, mode=m, align_corners=True), image(), bound=2e-5)
    case(f"{mode} to one", lambda x, m=mode: F.interpolate(x, size=(1, 4), mode=m, align_corners=True), image(), bound=2e-5)
    case(f"{mode} recompute", lambda x, m=mode: F.interpolate(x, scale_factor=1.7, mode=m, recompute_scale_factor=True), image(), bound=2e-5)
    case(f"{mode} antialias", lambda x, m=mode: F.interpolate(x, size=(4, 5), mode=m, antialias=True), image(), bound=2e-5)
case("linear resize", lambda x: F.interpolate(x, scale_factor=2, mode="linear"), tokens())
case("trilinear resize", lambda x: F.interpolate(x, size=(6, 7, 9), mode="trilinear"), torch.randn(2, 3, 4, 6, 5))
case("nearest 1d", lambda x: F.interpolate(x, size=11), tokens())
case("grid_sample", lambda x, y: F.grid_sample(x, y.tanh(), align_corners=False), image(), torch.randn(2, 4, 5, 2))
case("grid_sample border", lambda x, y: F.grid_sample(x, y, mode="nearest", padding_mode="border", align_corners=True), image(), torch.randn(2, 4, 5, 2))
case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), image(8))
case("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), image(3, 8, 6))
case("channel_shuffle", lambda x: F.channel_shuffle(x, 3), image())

# -- shapes ---------------------------------------------------------------------------------------------------------

case("view", lambda x: x.view(x.shape[0], -1), image())
case("view batch products", lambda x: x.view(x.shape[0] * 6, -1).view(-1, 6, 63).reshape(x.shape[0], 2, -1), image())
case("view two symbols", lambda x: x.reshape(x.shape[0], 3, 2, 63).transpose(0, 1).reshape(3, x.shape[0] * 2, 63), image())
case("flatten", lambda x: x.flatten(1, 2) + x.flatten(2).mean(), image(6, 9, 1))
case("flatten all", lambda x: x.flatten(), image())
case("unflatten", lambda x: x.unflatten(1, (3, -1)), image())
case("permute", lambda x: x.permute(0, 2, -1, 1).contiguous(), image())
case("transpose", lambda x: x.transpose(-1, 0).transpose(0, 3).swapaxes(1, 2), image())
case("t", lambda x: x.t() @ x, matrix())
case("movedim", lambda x: x.movedim(1, -1).movedim((0, 1), (1, 0)), image())
case("expand", lambda x: x[:, :1].expand(-1, 4, -1, -1), image())
case("expand new", lambda x: x.mean(0, keepdim=True).expand(3, x.shape[0], -1), matrix())
case("expand_as", lambda x: x[:, :1].expand_as(x), image())
case("repeat", lambda x: x.repeat(2, 1, 3), matrix())
case("tile", lambda x: x.tile(2) + torch.tile(x, (1, 2)), matrix())
case("repeat_interleave", lambda x: x.repeat_interleave(3, dim=1), tokens())
case("repeat_interleave batch", lambda x: x.repeat_interleave(2, dim=0), tokens())
case("squeeze", lambda x: x[:, :1].squeeze(1) + x[:, :, :1].squeeze(-2).mean() + x.squeeze(0).mean(), image())
case("squeeze all", lambda x: x.mean(0, keepdim=True)[:, :, :1].squeeze(), image())
case("unsqueeze", lambda x: x.unsqueeze(-1).unsqueeze(1), matrix())
case("roll", lambda x: torch.roll(x, (2, -3), dims=(2, -1)), image())
case("roll batch", lambda x: torch.roll(x, 1, dims=1) + torch.roll(x, 9, dims=1), tokens())
case("flip", lambda x: x.flip(1, -1), image())
case("casts", lambda x: (x.to(torch.int32).double(), x.bool(), x.long().to(x.dtype), x.to(torch.int8), x.type_as(x.half())), matrix() * 5)
case("channels_last", lambda x: x.to(memory_format=torch.channels_last).contiguous() + 1, image())

# -- cutting and joining --------------------------------------------------------------------------------------------

case("cat", lambda x, y: torch.cat([x, y, x], -1), matrix(), matrix(3))
case("cat promotes", lambda x, y: torch.cat([x, y], 1), matrix(), whole(3))
case("cat batch", lambda x, y: torch.cat([x, y], 0), matrix(), matrix())
case("stack", lambda x, y: torch.stack([x, y], -1), matrix(), matrix())
case("split", lambda x: x.split(3, dim=1), image(7))
case("split sizes", lambda x: torch.split(x, [1, 4, 2], -1), image())
case("chunk", lambda x: x.chunk(3, 1), image(7))
case("tensor_split", lambda x: (*torch.tensor_split(x, 4, 1), *torch.tensor_split(x, (1, 3), -1)), image())
case("unbind", lambda x: torch.unbind(x, 1), image(3))
case("split of batch", lambda x: torch.cat([x, x * 2]).split([x.shape[0], x.shape[0]])[1], matrix())
case("select", lambda x: x[:, -1] * x[:, 0], tokens())
case("slice", lambda x: x[:, 1:-1, ::2] + x[:, :-2, 1:8:2], tokens())
case("slice batch", lambda x: torch.cat([x, x])[x.shape[0] :] * 2 + torch.cat([x, x])[: x.shape[0]], tokens())
case("slice beyond", lambda x: x[:, 2:100], tokens())
case("diff", lambda x: x.diff() + x.diff(dim=1, prepend=x[:, :1])[..., 1:], tokens())
case("narrow", lambda x: x.narrow(1, 1, 3) + x.narrow(1, -4, 3), tokens())
case("diagonal", lambda x: x.diagonal(1, 1, 2), tokens())
case("unfold", lambda x: x.unfold(1, 3, 2), tokens(8))
case("im2col", lambda x: F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)), image())


def write_slice(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1:3] = 0
    y[:, :, ::2] = 5
    y[:, -1] = x[:, 0]
    return y


case("writes", write_slice, tokens())
case("scatter functions", lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 2, 4) + torch.select_scatter(x, x[:, 0], 1, -1), tokens())

# -- indexing -------------------------------------------------------------------------------------------------------

case("index list", lambda x: x[:, [2, 0, -1]], tokens())
case("index tensor", lambda x, i: x[:, i[0] % 5], tokens(), whole(4, low=0))
case("index two", lambda x: x[:, torch.tensor([1, 2]), torch.tensor([3, 0])], tokens())
case("index two apart", lambda x: x[:, torch.tensor([1, 2]), :, torch.tensor([3, 0])], image())
case("index batch", lambda x, i: x[torch.arange(x.shape[0]), i[:, 0]], matrix(), whole(2, low=0, high=8))
case("index table", lambda x: x[:, torch.tensor([[1, 2], [0, 3]])], tokens())
case("index constant mask", lambda x: x[:, torch.tensor([True, False, True, True, False])], tokens())
case("index_select", lambda x: x.index_select(-1, torch.tensor([3, 1])), tokens())
case("gather", lambda x, i: x.gather(1, i), matrix(), whole(3, low=0, high=8))
case("scatter", lambda x, i: torch.zeros_like(x).scatter(1, i, 1.0) + x.scatter(1, i * 0 + 1, x[:, :3] * 0 + 2), matrix(), whole(1, low=0, high=8))
case("scatter_add", lambda x, i: x.scatter_add(1, i, torch.ones_like(x)), matrix(), whole(3, low=0, high=8))
case("index_put", lambda x: x.index_put((torch.tensor([0]),), torch.tensor(7.0)), matrix())
case("index_put accumulate", lambda x: x.index_put((torch.tensor([0, 0]),), torch.ones(8), accumulate=True), matrix())
case("one_hot", lambda x: F.one_hot(x, 9), whole(4, low=0, high=9))
case("tril", lambda x: x.tril(1) + x.triu(-1) * 2, tokens())
case("tril of bool", lambda x: (x > 0).tril(), tokens())

# -- reductions -----------------------------------------------------------------------------------------------------

case("mean spatial", lambda x: x.mean((2, 3)), image())
case("mean spatial keep", lambda x: x.mean((-1, -2), keepdim=True), image())
case("mean others", lambda x: x.mean((1,)) + x.mean(1, keepdim=True)[:, 0] + x.mean(), image())
case("mean dtype", lambda x: x.mean(1, dtype=torch.float32), whole(5))
case("sum", lambda x: x.sum(-1) + x.sum((1, 2), keepdim=True)[..., 0] + x.sum(), tokens())
case("sum of bools", lambda x: (x > 0).sum(1), tokens())
case("prod", lambda x: x.prod(1), tokens())
case("logsumexp", lambda x: x.logsumexp((1, 2)), tokens())
case("var", lambda x: x.var(1) + x.var((1,), correction=0) + x.std(1, unbiased=False), tokens())
case("var keep", lambda x: x.var((1, 2), keepdim=True), tokens())
case("var_mean", lambda x: (*torch.var_mean(x, 1), *torch.std_mean(x), *torch.std_mean(x, (1, 2), correction=0)), tokens())
case("var over batch", lambda x: (x * 0 + torch.arange(8.0)).var((0, 1)), tokens())
case("norms", lambda x: (x.norm(dim=1), x.norm(p=1, dim=1), x.norm(p=float("inf"), dim=1), x.norm(p=3, dim=(1,), keepdim=True), torch.linalg.vector_norm(x)), tokens())
case("amax", lambda x: x.amax((1, 2)) - x.amin(-1, keepdim=True)[:, 0, 0] + x.max() - x.min(), tokens())
case("max dim", lambda x: (*x.max(1), *x.min(-1, keepdim=True)), tokens())
case("argmax", lambda x: (x.argmax(), x.argmax(1), x.argmin(-1, keepdim=True)), tokens())
case("any all", lambda x: ((x > 0).any(1), (x > -1).all(), (x > 0).any(), (x > 0).all(-1, keepdim=True)), tokens())
case("topk", lambda x: (*x.topk(3, dim=1), *x.topk(2, largest=False)), tokens())
case("sort", lambda x: (*x.sort(1, descending=True), x.argsort(-1)), tokens())
case("cumsum", lambda x: x.cumsum(1) + (x > 0).cumsum(-1), tokens())

# -- creation -------------------------------------------------------------------------------------------------------

case("arange batch", lambda x: torch.arange(x.shape[0])[:, None] + torch.arange(1, x.shape[0] + 1)[:, None] + x, matrix())
case("arange falling", lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)] + torch.arange(8.0, 0, -1.0)[torch.arange(7, -x.shape[0] + x.shape[0] - 1, -1)], matrix())
case("like", lambda x: torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 3.5) + torch.ones_like(x, dtype=torch.int64), matrix())
case("new", lambda x: x.new_zeros(x.shape[0], 2) + x.new_ones(1) + x.new_full((x.shape[0], 2), 3), matrix())
case("sized", lambda x: torch.zeros(x.shape[0], 3) + torch.ones(x.shape[0], 1) + torch.full((3,), 2.0) + x[:, :3], matrix())
case("batch arithmetic", lambda x: x * (x.shape[0] * 2 + 1) / (x.shape[0] // 2 + 1) + x.shape[0] / 3 + (x.shape[0] % 2), matrix())

case("logit erfc", lambda x: torch.logit(x.sigmoid()) + torch.erfc(x) + torch.logit(x, eps=0.1), matrix(), bound=1e-4)
case("isfinite nan_to_num", lambda x: (torch.isfinite(x / (x > 0)), torch.nan_to_num(x / (x > 0), 0.5, 7.0, -7.0), torch.nan_to_num(x / (x > 1) * 0)), matrix())
case("count_nonzero hstack", lambda x: (torch.count_nonzero(x, 1), torch.hstack([x, x]), F.relu(x)), whole(6))
case("col2im", lambda x: F.fold(x, (4, 5), (2, 3), stride=(1, 2), padding=(1, 0)), torch.randn(2, 12, 10))

# -- overloads that only decomposed or foreign programs have ---------------------------------------------------------

aten = torch.ops.aten
case("aten convolution", lambda x: aten.convolution(x, torch.ones(4, 6, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1), image())
case("aten convolution transposed", lambda x: aten.convolution(x, torch.ones(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1), image())
case("aten upsample", lambda x: aten.upsample_nearest2d(x, [18, 14]) + aten.upsample_bilinear2d(x, [18, 14], False, 2.0, 2.0) + aten.upsample_bicubic2d(x, [18, 14], True), image(), bound=2e-5)
case("aten copies", lambda x: aten.copy(x, x[:1] * 2) + aten.fill.Scalar(x, 2) + aten.zero(x) + aten.detach(x), matrix())
case("aten views", lambda x: aten._unsafe_view(x, [x.shape[0], 40]) + aten.view_as(x, x.flatten(1)), tokens())
case("aten bitwise", lambda x, y: aten.bitwise_and(aten.bitwise_or(x, y), aten.bitwise_xor(x, 3)), whole(5), whole(5))
case("aten clip", lambda x: aten.clip(x, -0.5, 0.5) + aten.scalar_tensor(2.5) + aten._softmax(x, 1, False), matrix())
case("aten max_pool with indices", lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0], image())
case("aten std_mean", lambda x: aten.std_mean(x, [1], correction=0), tokens())
case("aten pad", lambda x: aten.constant_pad_nd(x, [1, 2], 0.5) + aten.replication_pad1d(x, [2, 1]) + aten.reflection_pad1d(x, [2, 1]), tokens())
case("aten norm", lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]) + aten.norm.Scalar(x, 1), tokens())
case("aten like", lambda x: aten.expand_as(x[:, :1], x) + aten.new_full(x, [x.shape[0], 1], 2.0) + aten.numpy_T(x).sum() + x.mT.sum(), matrix())

# -- attention and recurrence ---------------------------------------------------------------------------------------


def heads(x: torch.Tensor, count: int = 2) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


case("attention", lambda x: F.scaled_dot_product_attention(heads(x), heads(x * 2), heads(x)), tokens())
case("attention causal scale", lambda x: F.scaled_dot_product_attention(heads(x), heads(x * 2), heads(x), is_causal=True, scale=0.7), tokens())
case("attention bool mask", lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=(x[:, :, :1] > -0.5).mT[:, None]), tokens())
case("attention float mask", lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=torch.linspace(-1, 1, 25).view(5, 5)), tokens())
case("attention hidden rows", lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=(torch.eye(5) * torch.arange(5) > 0)), tokens())
case("attention groups", lambda x: F.scaled_dot_product_attention(heads(x, 4), heads(x[..., :4], 2), heads(x[..., 4:], 2), enable_gqa=True), tokens())
case("multihead", nn.MultiheadAttention(8, 2, batch_first=True).eval(), tokens(), tokens(4), tokens(4))
case("transformer layer", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), tokens())
for kind in (nn.LSTM, nn.GRU, nn.RNN):
    case(f"{kind.__name__}", kind(8, 6, batch_first=True), tokens())
    case(f"{kind.__name__} deep", kind(8, 6, num_layers=2, bidirectional=True, bias=False, batch_first=True), tokens())
    case(f"{kind.__name__} both", kind(8, 6, bidirectional=True, batch_first=True), tokens())
case("RNN relu", nn.RNN(8, 6, nonlinearity="relu", batch_first=True), tokens())


def with_batch(x: torch.Tensor, batch: int) -> torch.Tensor:
    """New values of the same kind with another batch."""
    if x.is_floating_point():
        return torch.randn(batch, *x.shape[1:]) * x.std()
    return torch.randint(int(x.min()), int(x.max()) + 1, (batch, *x.shape[1:]), dtype=x.dtype)


def difference(ours: np.ndarray, theirs: torch.Tensor) -> float:
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    expected = theirs.detach().numpy()
    if expected.dtype.kind != "f":
        return float((ours != expected).mean()) if expected.size else 0.0
    assert np.array_equal(np.isnan(ours), np.isnan(expected))
    assert np.array_equal(np.isinf(ours), np.isinf(expected))
    ours, expected = (np.nan_to_num(a.astype(np.float64), posinf=0, neginf=0) for a in (ours, expected))
    return float(np.abs(ours - expected).max() / max(np.abs(expected).max(), 1e-30)) if expected.size else 0.0


@pytest.fixture(scope="module")
def reached() -> set[str]:
    """The ops that the cases of this file had in their graphs."""
    return set()


@pytest.mark.parametrize("item", CASES, ids=lambda c: c.name)
def test_row_agrees_with_eager(item: Case, reached: set[str]) -> None:
    module = item.run if isinstance(item.run, nn.Module) else Call(item.run)
    program = capture(module.eval(), item.inputs)
    reached |= {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    model = lower(program)
    onnx.checker.check_model(model, full_check=True)
    session = make_session(model)
    torch.manual_seed(1)
    for batch in (1, 2, 5):
        inputs = tuple(with_batch(x, batch) for x in item.inputs)
        expected = program.run_flat(inputs)
        outputs = session.run(*[x.numpy() for x in inputs])
        assert len(outputs) == len(expected)
        for ours, theirs in zip(outputs, expected):
            assert difference(ours, theirs) <= item.bound


def test_every_row_function_is_reached(reached: set[str]) -> None:
    """A row function that no case reaches is one that nobody tested (quantized ones have their own file)."""
    if len(reached) < 100:
        pytest.skip("needs the whole file's tests to have run")
    rows = lowering_rows()
    tested = {_function(row) for op, row in rows.items() if op in reached}
    # Rows that other tests registered are not the project's; quantized ones have their own files.
    elsewhere = ("ops_quantize", "ops_dynamic")
    ours = [op for op, row in rows.items() if row.family.startswith("ops_") and row.family not in elsewhere]
    missed = [op for op in ours if _function(rows[op]) not in tested]
    assert not missed


def _function(row: Row) -> str:
    return f"{row.family}.{row.function.__qualname__}"
