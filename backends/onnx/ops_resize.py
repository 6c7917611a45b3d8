"""Up- and downsampling, and moving pixels between channels and space.

torch computes source positions from the given scale factor where there is one, else from the ratio of sizes. They
differ when size times factor is no whole number, even where the rounded size is a multiple of the old one. Linear modes
leave an axis alone whose size stays, whatever the factor; nearest has more exceptions, and is asked itself.

Where sizes are known, Resize gets scales of all dims: ONNX Runtime's layout optimizer breaks one with `axes` on 8-bit
tensors, and one with `sizes` forgets the factor. Its output has floor(size * scale) elements in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from onnx_ir import Value

from .emit import Emitter, Operand
from .sizes import Size
from .table import row


def _scale(g: Emitter, before: int, after: int, factor: float | None) -> float:
    """`factor`, or the ratio of sizes, as the float32 next to it with which `before` becomes `after` and nothing else.

    It has to in double too, in which other runtimes multiply.
    """
    if factor is not None and int(before * factor) != after:
        raise g.reject(
            f"a scale factor of {factor} does not take {before} to {after}", hint="leave the factor out, or the size"
        )
    scale = np.float32(after / before if factor is None else factor)
    while min(int(scale * np.float32(before)), int(float(scale) * before)) < after:
        scale = np.nextafter(scale, np.float32(np.inf))
    while int(scale * np.float32(before)) > after:
        scale = np.nextafter(scale, np.float32(0))
    return float(scale)


def _known_sizes(g: Emitter, x: Operand) -> list[tuple[int, int]] | None:
    """(before, after) of every axis that is resized, or None where one is known only at run time."""
    pairs = [(a, b) for a, b in zip(x.shape[2:], g.result.shape[2:]) if isinstance(a, int) and isinstance(b, int)]
    return pairs if len(pairs) == x.rank - 2 else None


def _is_copied(sizes: Sequence[tuple[int, int]], scales: Sequence[float]) -> bool:
    """Would ONNX Runtime wrongly copy the input? It does where no size changes, whatever the scales."""
    return all(before == after for before, after in sizes) and any(s != 1 for s in scales)


def _resize_by(g: Emitter, x: Operand, scales: Sequence[float], attributes: Mapping[str, object]) -> Value:
    return g.op("Resize", x, None, g.constant(torch.tensor([1.0, 1.0, *scales], dtype=torch.float32)), **attributes)


def _resize_unknown(g: Emitter, x: Operand, factors: Sequence[float | None], attributes: Mapping[str, object]) -> Value:
    """Scales where some size times its factor may be no whole number, else sizes. (No exceptions for single axes.)"""
    scales = None
    if not _whole(x.shape[2:], factors):
        known = [f for f in factors if f is not None]
        if len(known) < x.rank - 2:
            raise g.reject("scale factors for some dimensions only are not lowered", hint="give all, or sizes")
        scales = g.constant(torch.tensor(known, dtype=torch.float32))
    sizes = None if scales is not None else g.sizes(g.result.shape[2:])
    return g.op("Resize", x, None, scales, sizes, axes=list(range(2, x.rank)), **attributes)


def _whole(shape: Sequence[Size], factors: Sequence[float | None]) -> bool:
    """Does every size times its factor give a whole number?"""
    return all(
        f is None or float(f).is_integer() or (isinstance(s, int) and float(s * f).is_integer())
        for s, f in zip(shape, factors)
    )


def _nearest(g: Emitter, x: Operand, factors: Sequence[float | None] | None, exact: bool = False) -> Value:
    """Resize with scales that have ONNX Runtime take the elements that torch takes; Gather where there are none."""
    attributes = {
        "mode": "nearest",
        "coordinate_transformation_mode": "half_pixel" if exact else "asymmetric",
        "nearest_mode": "round_prefer_ceil" if exact else "floor",
    }
    factors, sizes = factors or [None] * (x.rank - 2), _known_sizes(g, x)
    if sizes is None:
        return _resize_unknown(g, x, factors, attributes)
    taken = _taken_by_torch(g, sizes, factors)
    scales = [_scale_that_takes(g, *axis, exact) for axis in zip(sizes, factors, taken)]
    known = [s for s in scales if s is not None]
    if len(known) == len(sizes) and not _is_copied(sizes, known):
        return _resize_by(g, x, known, attributes)
    value = x.value
    for axis, (indices, (before, _)) in enumerate(zip(taken, sizes), start=2):
        if indices != list(range(before)):
            value = g.op("Gather", value, g.ints(indices), axis=axis)
    return value


def _taken_by_torch(g: Emitter, sizes: Sequence[tuple[int, int]], factors: Sequence[float | None]) -> list[list[int]]:
    """For every axis, which element each element of the output is.

    It depends on more than the axis. For an image, torch leaves an axis alone whose size stays, and repeats elements
    of one whose size doubles, but not if height and width of the output are more than 128 together.
    """
    assert g.node is not None
    positions = torch.meshgrid(*(torch.arange(float(before)) for before, _ in sizes), indexing="ij")
    resize = g.node.target.overloadpacket.default  # type: ignore[union-attr]
    resized = resize(torch.stack(positions)[None], [after for _, after in sizes], *factors)[0]
    return [r.movedim(d, -1).reshape(-1, r.shape[d])[0].int().tolist() for d, r in enumerate(resized)]


def _scale_that_takes(
    g: Emitter, size: tuple[int, int], factor: float | None, taken: list[int], exact: bool
) -> float | None:
    """A scale with which ONNX Runtime takes these elements: torch multiplies by 1 / scale, it divides by the scale.

    None as well where a position is so near to the next element that rounding errors decide.
    """
    before, after = size
    half = np.float32(0.5 if exact else 0)
    for candidate in (None, factor):
        scale = _scale(g, before, after, candidate)
        places = (np.arange(after, dtype=np.float32) + half) / np.float32(scale) - half
        rounded = places.astype(np.float64) + half  # whose floor is the element
        near = np.abs(rounded - np.round(rounded))
        is_sure = ((near == 0) | (near > 4 * np.spacing(np.abs(places) + 1))).all()
        if is_sure and np.floor(rounded).clip(max=before - 1).tolist() == taken:
            return scale
    return None


def _interpolate(
    g: Emitter, x: Operand, factors: Sequence[float | None] | None, align_corners: bool, mode: str
) -> Value:
    attributes = {
        "mode": mode,
        "coordinate_transformation_mode": "align_corners" if align_corners else "half_pixel",
        "cubic_coeff_a": -0.75 if mode == "cubic" else None,
    }
    if align_corners or factors is None:
        factors = [None] * (x.rank - 2)  # positions between the corners follow from sizes alone
    sizes = _known_sizes(g, x)
    if sizes is None:
        return _resize_unknown(g, x, factors, attributes)
    scales = [
        _scale(g, before, after, None if mode == "linear" and before == after else factor)
        for (before, after), factor in zip(sizes, factors)
    ]
    if _is_copied(sizes, scales):  # only cubic, so there are two axes
        return _resize_by_matrices(g, x, align_corners, factors)
    return _resize_by(g, x, scales, attributes)


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
    return _nearest(g, x, scale_factors, exact=True)


@row("aten.upsample_nearest2d.default")
def upsample_nearest2d(
    g: Emitter, x: Operand, output_size: Sequence[int], scales_h: float | None, scales_w: float | None
) -> Value:
    return _nearest(g, x, [scales_h, scales_w])


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
    """Two products with matrices (ONNX Runtime's antialiasing has other weights)."""
    return _resize_by_matrices(g, x, align_corners, scale_factors or (None, None))


def _resize_by_matrices(g: Emitter, x: Operand, align_corners: bool, factors: Sequence[float | None]) -> Value:
    """Two products with matrices that torch gives itself."""
    sizes = _known_sizes(g, x)
    if sizes is None:
        raise g.reject("antialiased resizing needs known sizes", hint="fix height and width")
    rows, columns = (_resize_matrix(g, *size, align_corners, f).to(x.dtype) for size, f in zip(sizes, factors))
    narrow = g.op("MatMul", x, g.constant(columns))
    return g.op("MatMul", g.constant(rows.t()), narrow)


def _resize_matrix(g: Emitter, before: int, after: int, align_corners: bool, factor: float | None) -> torch.Tensor:
    """[before, after]: resizing one axis is linear, so its matrix is what it does to the identity."""
    assert g.node is not None
    impulses = torch.eye(before, dtype=torch.float64).reshape(1, 1, before, before)
    resize = g.node.target.overloadpacket.default  # type: ignore[union-attr]
    return resize(impulses, [before, after], align_corners, None, factor).reshape(before, after)


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
    return _interpolate(g, x, [scales_h, scales_w], align_corners, mode)


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
