"""The whole way on networks that nobody wrote: blocks are drawn at random and stacked, then everything must hold.

pruned == masked original (float64), ONNX Runtime == PyTorch in float, each quantized layer within a step, and the
quantized network close to the float one.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.quantize.ranges.choose import mean_sqnr
from fxpress.runtime.layers import check_layers
from fxpress.runtime.verify import check_parity

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.Tanh, nn.Identity)


class Conv(nn.Sequential):
    """Convolution, often BatchNorm, any activation."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        outputs = draw.choice([8, 12, 16])
        groups = draw.choice([g for g in (1, 1, 2, channels) if channels % g == 0 and outputs % g == 0] or [1])
        kernel, stride = draw.choice([1, 3, 5]), draw.choice([1, 1, 2])
        layers = [nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups, bias=draw.random() < 0.5)]
        if draw.random() < 0.7:
            layers.append(nn.BatchNorm2d(outputs))
        super().__init__(*layers, draw.choice(ACTIVATIONS)())
        self.outputs = outputs


class Residual(nn.Module):
    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), draw.choice(ACTIVATIONS)())
        self.relu, self.outputs = draw.random() < 0.5, channels

    def forward(self, x):
        y = x + self.body(x)
        return F.relu(y) if self.relu else y


class Gate(nn.Module):
    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.down, self.up, self.outputs = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), channels

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Branches(nn.Module):
    """Split, convolve one half, put together with the other half and the whole."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.conv, self.outputs = nn.Conv2d(self.half, 4, 1), 2 * channels - self.half + 4

    def forward(self, x):
        first, second = x.split([self.half, x.shape[1] - self.half], 1)
        return torch.cat([second, self.conv(first), x], 1)


class Shuffle(nn.Module):
    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.groups, self.outputs = 2 if channels % 2 == 0 else 1, channels

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Resize(nn.Module):
    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.kind, self.outputs = draw.choice(["max", "average", "nearest", "bilinear"]), channels

    def forward(self, x):
        if self.kind == "max":
            return F.max_pool2d(x, 3, 2, 1)
        if self.kind == "average":
            return F.avg_pool2d(x, 3, 1, 1)
        return F.interpolate(x, scale_factor=2, mode=self.kind)


class Widen(nn.Module):
    """Zero channels on both sides, as option-A shortcuts have them, and arithmetic with constants."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.scale, self.outputs = draw.choice([1.0, 0.5]), channels + 4

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 1, 3)) * self.scale


BLOCKS = (Conv, Conv, Conv, Residual, Gate, Branches, Shuffle, Resize, Widen)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    draw, channels = random.Random(seed), 3
    layers: list[nn.Module] = []
    for _ in range(draw.randint(3, 8)):
        layers.append(draw.choice(BLOCKS)(draw, channels))
        channels = layers[-1].outputs
    head = [nn.AdaptiveAvgPool2d(draw.choice([1, 2])), nn.Flatten()]
    module = nn.Sequential(*layers, *head, nn.Linear(channels * head[0].output_size**2, 5)).eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
    return module


def pruned_by_half(program: fxpress.Program) -> fxpress.Program:
    try:
        plan = fxpress.plan_pruning(program, ratio=0.5)
    except fxpress.FxpressError as error:
        assert "nothing in this program can be pruned" in str(error)  # noqa: PT017
        return program
    pruned = plan.apply(program)
    assert oracle_error(plan.mask(program), pruned) < 1e-9
    return pruned


@pytest.mark.parametrize("seed", range(24))
def test_everything_holds_on_a_random_network(seed):
    program = fxpress.capture(network(seed), torch.randn(2, 3, 20, 20))
    pruned = pruned_by_half(run_passes(program, "cleanup,canonicalize"))
    floating = run_passes(pruned, "fuse-batchnorm")
    assert check_parity(floating, lower(floating)).max_relative < 1e-4
    data = [(torch.randn(4, 3, 20, 20),) for _ in range(3)]
    int8 = PassManager("quantize").run(floating, Context(target=load_target("ort-x86"), calibration=data))
    x = torch.randn(4, 3, 20, 20)
    assert check_layers(int8, (x,)).max_steps <= 1
    assert mean_sqnr([floating.run_flat((x,))], [int8.run_flat((x,))]) > 15
