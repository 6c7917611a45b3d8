"""Up- and downsampling, and moving pixels between channels and space.

torch computes source positions from the given scale factor where there is one, else from the ratio of sizes. They only
differ when size times factor is no whole number; the row writes scales then, and sizes otherwise. Whole multiples are
written as scales of all dims: ONNX Runtime's layout optimizer breaks a Resize with `axes` on 8-bit tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Operand
from .sizes import Size
from .table import row


def _resize(
    g: Emitter, x: Operand, factors: Sequence[float | None] | None, align_corners: bool = False, **attributes: object
) -> Value:
    n = x.rank - 2
    multiples = [_multiple(a, b) for a, b in zip(x.shape[2:], g.result.shape[2:])]
    if all(multiples):
        return g.op("Resize", x, None, g.constant(torch.tensor([1.0, 1.0, *map(float, multiples)])), **attributes)
    axes = list(range(2, x.rank))
    scales = None
    if factors is not None and not align_corners and not _whole(x.shape[2:], factors):
        known = [f for f in factors if f is not None]
        if len(known) < n:
            raise g.reject("scale factors for some dimensions only are not lowered", hint="give all, or sizes")
        scales = g.constant(torch.tensor(known, dtype=torch.float32))
    sizes = None if scales is not None else g.sizes(g.result.shape[2:])
    return g.op("Resize", x, None, scales, sizes, axes=axes, **attributes)


def _multiple(before: Size, after: Size) -> int:
    """after / before where that is a whole number, else 0."""
    if not isinstance(before, int) or not isinstance(after, int):
        return 0
    return after // before if after % before == 0 else 0


def _whole(shape: Sequence[Size], factors: Sequence[float | None]) -> bool:
    """Does every size times its factor give a whole number?"""
    return all(
        f is None or float(f).is_integer() or (isinstance(s, int) and float(s * f).is_integer())
        for s, f in zip(shape, factors)
    )


def _nearest(g: Emitter, x: Operand, factors: Sequence[float | None] | None) -> Value:
    return _resize(
        g, x, factors, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )  # fmt: skip


def _nearest_exact(g: Emitter, x: Operand, factors: Sequence[float | None] | None) -> Value:
    return _resize(
        g, x, factors, mode="nearest", coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil"
    )


def _interpolate(
    g: Emitter,
    x: Operand,
    factors: Sequence[float | None] | None,
    align_corners: bool,
    mode: str,
) -> Value:
    return _resize(
        g,
        x,
        factors,
        align_corners,
        mode=mode,
        coordinate_transformation_mode="align_corners" if align_corners else "half_pixel",
        cubic_coeff_a=-0.75 if mode == "cubic" else None,
    )


@row("aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest3d.vec")
def upsample_nearest(
    g: Emitter, x: Operand, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None
) -> Value:
    """Resize: nearest, position rounded down."""
    return _nearest(g, x, scale_factors)


@row("aten._upsample_nearest_exact1d.vec", "aten._upsample_nearest_exact2d.vec", "aten._upsample_nearest_exact3d.vec")
def upsample_nearest_exact(
    g: Emitter, x: Operand, output_size: Sequence[int] | None, scale_factors: Sequence[float] | None
) -> Value:
    """Resize: nearest of the pixel centers."""
    return _nearest_exact(g, x, scale_factors)


@row("aten.upsample_nearest2d.default")
def upsample_nearest2d(
    g: Emitter, x: Operand, output_size: Sequence[int], scales_h: float | None, scales_w: float | None
) -> Value:
    return _nearest(g, x, _both(scales_h, scales_w))


@row("aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_trilinear3d.vec")
def upsample_linear(
    g: Emitter,
    x: Operand,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> Value:
    """Resize: linear."""
    return _interpolate(g, x, scale_factors, align_corners, "linear")


@row("aten.upsample_bicubic2d.vec")
def upsample_bicubic(
    g: Emitter,
    x: Operand,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> Value:
    """Resize: cubic with a = -0.75."""
    return _interpolate(g, x, scale_factors, align_corners, "cubic")


@row("aten._upsample_bilinear2d_aa.vec", "aten._upsample_bicubic2d_aa.vec")
def upsample_antialias(
    g: Emitter,
    x: Operand,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> Value:
    """Two products with matrices that torch gives itself (ONNX Runtime's antialiasing has other weights)."""
    sizes = (*x.shape[2:], *g.result.shape[2:])
    if not all(isinstance(s, int) for s in sizes):
        raise g.reject("antialiased resizing needs known sizes", hint="fix height and width")
    height, width, high, wide = (int(s) for s in sizes)
    factors = scale_factors or (None, None)
    columns = _resize_matrix(g, width, wide, align_corners, factors[1])
    rows = _resize_matrix(g, height, high, align_corners, factors[0])
    narrow = g.op("MatMul", x, g.constant(columns.to(x.dtype)))
    return g.op("MatMul", g.constant(rows.t().to(x.dtype)), narrow)


def _resize_matrix(g: Emitter, before: int, after: int, align_corners: bool, factor: float | None) -> torch.Tensor:
    """[before, after]: resizing one axis is linear, so its matrix is what it does to the identity."""
    assert g.node is not None
    impulses = torch.eye(before, dtype=torch.float64).reshape(1, 1, before, before)
    asked = ([before, after], None) if factor is None else (None, [1.0, factor])
    resized = g.node.target(impulses, asked[0], align_corners, asked[1])  # type: ignore[operator]
    return resized.reshape(before, after)


@row("aten.upsample_bilinear2d.default", "aten.upsample_bicubic2d.default")
def upsample_2d(
    g: Emitter,
    x: Operand,
    output_size: Sequence[int],
    align_corners: bool,
    scales_h: float | None,
    scales_w: float | None,
) -> Value:
    assert g.node is not None
    mode = "cubic" if "bicubic" in str(g.node.target) else "linear"
    return _interpolate(g, x, _both(scales_h, scales_w), align_corners, mode)


def _both(height: float | None, width: float | None) -> list[float | None] | None:
    return None if height is None and width is None else [height, width]


@row("aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def grid_sampler(
    g: Emitter, x: Operand, grid: Operand, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Value:
    """GridSample; modes are numbered in ATen."""
    mode, padding = ("linear", "nearest", "cubic"), ("zeros", "border", "reflection")
    return g.op(
        "GridSample",
        x,
        grid,
        mode=mode[interpolation_mode],
        padding_mode=padding[padding_mode],
        align_corners=int(align_corners),
    )


# -- pixels and channels --------------------------------------------------------------------------------------------


@row("aten.pixel_shuffle.default")
def pixel_shuffle(g: Emitter, x: Operand, upscale_factor: int) -> Value:
    """DepthToSpace, channels first."""
    value = g.op("Unsqueeze", x, g.ints([0])) if x.rank == 3 else _four(g, x)
    value = g.op("DepthToSpace", value, blocksize=upscale_factor, mode="CRD")
    return value if x.rank == 4 else g.op("Reshape", value, g.sizes(g.result.shape))


def _four(g: Emitter, x: Operand) -> Value:
    """All leading dimensions as one."""
    return x.value if x.rank == 4 else g.op("Reshape", x, g.sizes([-1, *x.shape[-3:]]))


@row("aten.pixel_unshuffle.default")
def pixel_unshuffle(g: Emitter, x: Operand, downscale_factor: int) -> Value:
    """[.., C, H*r, W*r] -> [.., C*r*r, H, W]; SpaceToDepth orders the channels otherwise."""
    r = downscale_factor
    *_, channels, height, width = g.result.shape
    value = g.op("Reshape", x, g.sizes([-1, x.shape[-3], height, r, width, r]))
    value = g.op("Transpose", value, perm=[0, 1, 3, 5, 2, 4])
    if x.rank == 4:
        return g.op("Reshape", value, g.sizes([-1, channels, height, width]))
    return g.op("Reshape", value, g.sizes(g.result.shape))


@row("aten.channel_shuffle.default")
def channel_shuffle(g: Emitter, x: Operand, groups: int) -> Value:
    """[B, g * c, ...] -> [B, c * g, ...]."""
    channels = int(x.shape[1])
    split = [x.shape[0], groups, channels // groups, *x.shape[2:]]
    value = g.reshape(x, x.shape, split)
    value = g.op("Transpose", value, perm=[0, 2, 1, *range(3, len(split))])
    return g.reshape(value, [split[0], split[2], split[1], *split[3:]], x.shape)
