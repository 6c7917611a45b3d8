"""Models of our own for benchmarks and tests: CIFAR ResNets with option-A shortcuts (He et al. 2015)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images and 10 classes; its names fit the published checkpoints."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 32, 32] -> [n, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.size(3)).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def cifar_resnet20() -> CifarResNet:
    """ResNet-20, untrained."""
    return CifarResNet(3)


def cifar_resnet32() -> CifarResNet:
    """ResNet-32, untrained."""
    return CifarResNet(5)


def load_checkpoint(model: nn.Module, path: str | Path) -> nn.Module:
    """Strictly load a checkpoint dict whose `state_dict` carries `module.` prefixes."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()}, strict=True)
    return model.eval()


# -- a detector's backbone and neck ---------------------------------------------------------------------------------


class _Silu(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class _SplitBlock(nn.Module):
    """Cross-stage partial: half of the channels pass through residual pairs, all that came up is concatenated."""

    def __init__(self, inputs: int, outputs: int, count: int, add: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.add = _Silu(inputs, outputs), add
        self.pairs = nn.ModuleList(nn.Sequential(_Silu(half, half, 3), _Silu(half, half, 3)) for _ in range(count))
        self.last = _Silu(half * (2 + count), outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, inputs, h, w] -> [n, outputs, h, w]."""
        parts = list(self.first(x).chunk(2, 1))
        for pair in self.pairs:
            new = pair(parts[-1])
            parts.append(parts[-1] + new if self.add else new)
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """A one-stage detector in the manner of YOLO (Redmon et al. 2016; this layout: SiLU, split blocks, spatial pooling,
    a neck that goes up and down), with one 1x1 head at each of three scales."""

    def __init__(self, width: int = 16, outputs: int = 24) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_Silu(3, w, 3, 2), _Silu(w, 2 * w, 3, 2), _SplitBlock(2 * w, 2 * w, 1, True))
        self.third = nn.Sequential(_Silu(2 * w, 4 * w, 3, 2), _SplitBlock(4 * w, 4 * w, 2, True))
        self.fourth = nn.Sequential(_Silu(4 * w, 8 * w, 3, 2), _SplitBlock(8 * w, 8 * w, 2, True))
        self.fifth = nn.Sequential(_Silu(8 * w, 16 * w, 3, 2), _SplitBlock(16 * w, 16 * w, 1, True))
        self.reduce, self.spread = _Silu(16 * w, 8 * w), _Silu(32 * w, 16 * w)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.up4, self.up3 = _SplitBlock(24 * w, 8 * w, 1, False), _SplitBlock(12 * w, 4 * w, 1, False)
        self.down3, self.down4 = _Silu(4 * w, 4 * w, 3, 2), _Silu(8 * w, 8 * w, 3, 2)
        self.mix4, self.mix5 = _SplitBlock(12 * w, 8 * w, 1, False), _SplitBlock(24 * w, 16 * w, 1, False)
        self.heads = nn.ModuleList(nn.Conv2d(c * w, outputs, 1) for c in (4, 8, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[n, 3, h, w], both multiples of 32, to three maps [n, outputs, h / s, w / s] with s = 8, 16, 32."""
        c3 = self.third(self.stem(x))
        c4 = self.fourth(c3)
        pooled = [self.reduce(self.fifth(c4))]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        c5 = self.spread(torch.cat(pooled, 1))
        p4 = self.up4(torch.cat([F.interpolate(c5, scale_factor=2.0), c4], 1))
        p3 = self.up3(torch.cat([F.interpolate(p4, scale_factor=2.0), c3], 1))
        n4 = self.mix4(torch.cat([self.down3(p3), p4], 1))
        n5 = self.mix5(torch.cat([self.down4(n4), c5], 1))
        return tuple(head(p) for head, p in zip(self.heads, (p3, n4, n5)))
