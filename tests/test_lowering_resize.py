"""F.interpolate in ONNX Runtime against torch, where rounding the size hides the factor and where it does not.

torch scales positions by the factor that was given, not by the ratio of sizes, and leaves that rule on some axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpress
from fxpress.errors import LoweringError
from fxpress.frontend.operators import declare_operators
from fxpress.runtime.session import make_session

FACTORS = (1.0, 0.5, 0.75, 1.1, 1.2, 1.3, 1.5, 2.0, 2.2, 2.4, 3.0)
RANKS = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}
MODES = (
    *((mode, rank) for mode in ("nearest", "nearest-exact") for rank in (1, 2, 3)),
    *RANKS.items(),
)


class Resizes(nn.Module):
    """Every way of resizing that is asked for, of one input."""

    def __init__(self, ways: Sequence[dict], **options: object) -> None:
        super().__init__()
        self.ways, self.options = ways, options

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.interpolate(x, **way, **self.options) for way in self.ways]


def spatial(first: int, rank: int) -> tuple[int, ...]:
    """Sizes 1 to 9, another for each axis."""
    return tuple((first - 1 + 4 * axis) % 9 + 1 for axis in range(rank))


def ways_to_resize(shape: Sequence[int]) -> list[dict]:
    """The same factor for all axes, another for each, some that only give the size, and sizes."""
    rank = len(shape)
    mixed = [tuple(FACTORS[(i + 4 * axis) % len(FACTORS)] for axis in range(rank)) for i in range(len(FACTORS))]
    factors = [f for f in (*((f,) * rank for f in FACTORS), *mixed) if all(int(s * k) for s, k in zip(shape, f))]
    ways = [{"scale_factor": f, "recompute_scale_factor": True} for f in factors[-3:]]
    return [*({"scale_factor": f} for f in factors), *ways, *({"size": spatial(s, rank)} for s in range(1, 10, 2))]


def model_of(module: nn.Module, shape: Sequence[int]) -> onnx.ModelProto:
    model = fxpress.to_onnx(fxpress.capture(module.eval(), (torch.randn(2, 3, *shape),)))
    onnx.checker.check_model(model, full_check=True)
    return model


def wrong(module: nn.Module, model: onnx.ModelProto, x: torch.Tensor, names: Sequence[object]) -> list[str]:
    """The outputs whose shape or values are not torch's, with how far they are off."""
    found = []
    for name, ours, theirs in zip(names, make_session(model).run(x.numpy()), module(x)):
        if tuple(ours.shape) != tuple(theirs.shape):
            found.append(f"{name}: {tuple(ours.shape)}, torch has {tuple(theirs.shape)}")
        elif (off := float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max())) > 1e-5:
            found.append(f"{name}: off by {off:.1e}")
    return found


# With more axes, fewer first sizes: the others have the rest.
@pytest.mark.parametrize(("mode", "rank", "first"), [(m, r, first) for m, r in MODES for first in range(1, 10, r)])
def test_interpolate_agrees_with_torch(mode: str, rank: int, first: int) -> None:
    shape = spatial(first, rank)
    ways = ways_to_resize(shape)
    module = Resizes(ways, mode=mode)
    assert not wrong(module, model_of(module, shape), torch.randn(3, 3, *shape), ways)


@pytest.mark.parametrize("first", [1, 4, 9])
@pytest.mark.parametrize(
    ("mode", "option"),
    [*((mode, "align_corners") for mode in RANKS), ("bilinear", "antialias"), ("bicubic", "antialias")],
)
def test_corners_and_antialias_agree_with_torch(mode: str, option: str, first: int) -> None:
    shape = spatial(first, RANKS[mode])
    ways = ways_to_resize(shape)
    module = Resizes(ways, mode=mode, **{option: True})
    assert not wrong(module, model_of(module, shape), torch.randn(3, 3, *shape), ways)


class Folded(nn.Module):
    """Resizes an image whose height is a multiple of the batch, so known only at run time."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (F.interpolate(x.transpose(0, 1).reshape(1, 3, -1, 4), **self.options),)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("factor", [2, (2, 0.5), (1.5, 2), (1.5, 1.7), (3, 1.25)], ids=str)
def test_unknown_sizes(mode: str, factor: float | tuple[float, float]) -> None:
    module = Folded(mode=mode, scale_factor=factor)
    model = model_of(module, (5, 4))
    for batch in (1, 3, 4):
        assert not wrong(module, model, torch.randn(batch, 3, 5, 4), [batch])


# torch has another kernel for nearest where height and width of the output are more than 128 together.
LARGE = [(100, 3), (7, 200), (35, 67), (64, 96), (61, 61)]
LARGE_FACTORS = [0.3, 0.7, 1.01, 1.3, 1.9, (2.01, 1.1), (1.001, 2.002), (4.35, 1 / 3), (3, 3), (2, 1)]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_images(mode: str, shape: tuple[int, int]) -> None:
    ways = [{"scale_factor": f} for f in LARGE_FACTORS if min(np.multiply(shape, f)) >= 1]
    module = Resizes(ways, mode=mode)
    ramp = torch.linspace(0, 1, shape[0])[:, None] + torch.linspace(0, 1, shape[1])  # rounded positions differ little
    x = torch.randn(2, 3, *shape) if "nearest" in mode else ramp.expand(2, 3, *shape).contiguous()
    assert not wrong(module, model_of(module, shape), x, ways)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_whole_multiples_are_one_resize_by_scales_of_all_dims(mode: str) -> None:
    model = model_of(Resizes([{"scale_factor": (2, 3)}], mode=mode), (5, 7))
    (node,) = model.graph.node
    (scales,) = (onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name in node.input)
    assert node.op_type == "Resize"
    assert "axes" not in {a.name for a in node.attribute}
    assert scales.tolist() == [1, 1, 2, 3]


class EightBit(nn.Module):
    """A resize of an 8-bit tensor between quantized convolutions, which ONNX Runtime may run channels last."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("weight", torch.randint(-127, 128, (16, 16, 3, 3), dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convolved(torch.ops.fxpress.quantize(x, 0.1, 5, torch.uint8))
        return torch.ops.fxpress.dequantize(self.convolved(F.interpolate(x, scale_factor=self.factor)), 0.1, 5)

    def convolved(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = (torch.ops.fxpress.dequantize(t, s, z) for t, s, z in ((x, 0.1, 5), (self.weight, 1e-3, 0)))
        return torch.ops.fxpress.quantize(F.conv2d(x, weight, padding=1), 0.1, 5, torch.uint8)


@pytest.mark.parametrize("factor", [2.0, 3.0, 1.2, 2.2, 0.75])
def test_nearest_of_8_bit(factor: float) -> None:
    declare_operators()
    module = EightBit(factor)
    program = fxpress.capture(module, torch.randn(2, 16, 5, 9))
    x = torch.randn(3, 16, 5, 9)
    (ours,) = make_session(fxpress.to_onnx(program)).run(x.numpy())
    assert np.abs(ours - program(x).numpy()).max() <= 0.1 * 1.001  # one step


def test_a_factor_that_does_not_give_the_size_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.upsample_bilinear2d(x, [9, 8], False, 2.0, 2.0)

    with pytest.raises(LoweringError, match="4 to 9"):
        fxpress.to_onnx(fxpress.capture(Odd(), torch.randn(2, 3, 4, 4)))
