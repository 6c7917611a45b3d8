"""Pooling.

Where the spatial sizes are known, the padding that gives exactly torch's output size is written out, so that no
runtime's reading of `ceil_mode` matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Operand, spread
from .sizes import Size
from .table import row


@row("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default")
def max_pool(
    g: Emitter,
    x: Operand,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Value:
    """MaxPool; 8-bit tensors too."""
    return _max_pool(g, x, g.result.shape, kernel_size, stride, padding, dilation, ceil_mode)


@row("aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default")
def max_pool_with_indices(
    g: Emitter,
    x: Operand,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Value, Value]:
    """The values of MaxPool. The indices are only allowed where nobody reads them."""
    assert g.node is not None
    if any(user.args[1] == 1 for user in g.node.users):
        raise g.reject("the indices of max pooling are not lowered", hint="use return_indices=False")
    value = _max_pool(g, x, g.results[0].shape, kernel_size, stride, padding, dilation, ceil_mode)
    return value, value


def _max_pool(
    g: Emitter,
    x: Operand,
    result_shape: Sequence[Size],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Value:
    n = _spatial(g)
    kernel, steps, dilations = spread(kernel_size, n), spread(stride or kernel_size, n), spread(dilation, n)
    begin = spread(padding, n)
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilations)]
    end = _end_padding(x.shape[-n:], result_shape[-n:], extents, steps, begin) if ceil_mode else begin
    value = _batched(g, x, n)
    if end is not None and any(e >= k for e, k in zip(end, kernel)):
        # ONNX Runtime takes no padding as wide as the (undilated) kernel.
        value, end = _floored(g, value, x.dtype, end), [0] * n
    result = g.op(
        "MaxPool",
        value,
        kernel_shape=kernel,
        strides=steps,
        pads=begin + (begin if end is None else end),
        dilations=dilations,
        ceil_mode=1 if ceil_mode and end is None else None,
    )
    return _unbatched(g, x, n, result)


def _floored(g: Emitter, value: Value, dtype: torch.dtype, end: list[int]) -> Value:
    """Padding at the end by the least value, which no maximum sees."""
    least = -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    return g.op("Pad", value, g.ints([0] * (len(end) + 4) + end), g.scalar(least, dtype))


def _end_padding(
    before: Sequence[Size], after: Sequence[Size], extents: list[int], steps: list[int], begin: list[int]
) -> list[int] | None:
    """How far the last window reaches past the end (at least 0); None where sizes are symbolic."""
    if not all(isinstance(s, int) for s in (*before, *after)):
        return None
    return [max((int(b) - 1) * s + e - int(a) - p, 0) for a, b, e, s, p in zip(before, after, extents, steps, begin)]


@row("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def avg_pool(
    g: Emitter,
    x: Operand,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> Value:
    """AveragePool. torch counts the padding when asked, but never what ceil_mode adds past it."""
    n = _spatial(g)
    kernel, steps, begin = spread(kernel_size, n), spread(stride or kernel_size, n), spread(padding, n)
    end = begin
    if ceil_mode:
        exact = _end_padding(x.shape[-n:], g.result.shape[-n:], kernel, steps, begin)
        if exact is None:
            raise g.reject(
                "average pooling with ceil_mode needs known sizes", hint="capture with fixed height and width"
            )
        end = exact
    value = _batched(g, x, n)
    if divisor_override is None and (count_include_pad or not any(begin)) and end != begin:
        # The padding becomes part of the input and is counted; what lies beyond it is not.
        value, end, begin = _padded(g, value, begin), [max(e - p, 0) for e, p in zip(end, begin)], [0] * n
        count_include_pad = False
    counted = count_include_pad or divisor_override is not None
    result = g.op(
        "AveragePool", value, kernel_shape=kernel, strides=steps, pads=begin + end, count_include_pad=int(counted)
    )
    if divisor_override is not None:
        size = torch.tensor(kernel).prod().item()
        result = g.op("Mul", result, g.scalar(size / divisor_override, x.dtype))
    return _unbatched(g, x, n, result)


def _padded(g: Emitter, value: Value, padding: list[int]) -> Value:
    return g.op("Pad", value, g.ints([0, 0, *padding, 0, 0, *padding])) if any(padding) else value


# -- adaptive -------------------------------------------------------------------------------------------------------


@row("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default")
def adaptive_avg_pool(g: Emitter, x: Operand, output_size: Sequence[int]) -> Value:
    """GlobalAveragePool for size 1, AveragePool where the sizes divide, else a product with averaging matrices."""
    n = _spatial(g)
    after = [int(s) for s in g.result.shape[-n:]]
    if all(s == 1 for s in after):
        return _unbatched(g, x, n, g.op("GlobalAveragePool", _batched(g, x, n)))
    before = _known(g, x, n)
    if before == after:
        return x.value
    if all(a % b == 0 for a, b in zip(before, after)):
        kernel = [a // b for a, b in zip(before, after)]
        return _unbatched(g, x, n, g.op("AveragePool", _batched(g, x, n), kernel_shape=kernel, strides=kernel))
    return _averaged(g, x, before, after)


def _averaged(g: Emitter, x: Operand, before: list[int], after: list[int]) -> Value:
    """The last axis by a matrix, then the axis is rotated to the front of the spatial ones; n times over."""
    n = len(before)
    value = x.value
    leading = list(range(x.rank - n))
    for a, b in zip(reversed(before), reversed(after)):
        if a != b:
            value = g.op("MatMul", value, g.constant(averaging_matrix(a, b).to(x.dtype)))
        if n > 1:
            value = g.op("Transpose", value, perm=[*leading, x.rank - 1, *range(x.rank - n, x.rank - 1)])
    return value


def windows(before: int, after: int) -> list[tuple[int, int]]:
    """The [start, end) that each output of an adaptive pool covers."""
    return [(i * before // after, -(-(i + 1) * before // after)) for i in range(after)]


def averaging_matrix(before: int, after: int) -> torch.Tensor:
    """[before, after]: column i averages window i."""
    matrix = torch.zeros(before, after, dtype=torch.float64)
    for i, (start, end) in enumerate(windows(before, after)):
        matrix[start:end, i] = 1 / (end - start)
    return matrix


@row("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool3d.default")
def adaptive_max_pool(g: Emitter, x: Operand, output_size: Sequence[int]) -> tuple[Value, Value]:
    """GlobalMaxPool, MaxPool where the sizes divide, else maxima of slices. Indices must be unread."""
    assert g.node is not None
    if any(user.args[1] == 1 for user in g.node.users):
        raise g.reject("the indices of max pooling are not lowered", hint="use return_indices=False")
    n = _spatial(g)
    after = [int(s) for s in g.results[0].shape[-n:]]
    before = _known(g, x, n)
    if all(a % b == 0 for a, b in zip(before, after)):
        kernel = [a // b for a, b in zip(before, after)]
        value = _unbatched(g, x, n, g.op("MaxPool", _batched(g, x, n), kernel_shape=kernel, strides=kernel))
    else:
        value = _sliced_maxima(g, x, before, after)
    return value, value


def _sliced_maxima(g: Emitter, x: Operand, before: list[int], after: list[int]) -> Value:
    value = x.value
    for i, (a, b) in enumerate(zip(before, after)):
        axes = g.ints([x.rank - len(before) + i])
        parts = [
            g.op("ReduceMax", g.op("Slice", value, g.ints([start]), g.ints([end]), axes), axes, keepdims=1)
            for start, end in windows(a, b)
        ]
        value = g.op("Concat", *parts, axis=x.rank - len(before) + i)
    return value


# -- inner parts ----------------------------------------------------------------------------------------------------


def _spatial(g: Emitter) -> int:
    """Two for max_pool2d and its like: the digit before the d in the op's name."""
    assert g.node is not None
    name = str(g.node.target).split(".")[1]
    return int(name[name.index("d", name.index("pool")) - 1])


def _known(g: Emitter, x: Operand, n: int) -> list[int]:
    sizes = [s for s in x.shape[-n:] if isinstance(s, int)]
    if len(sizes) < n:
        raise g.reject("adaptive pooling needs known sizes", hint="fix height and width, or pool to size 1")
    return sizes


def _batched(g: Emitter, x: Operand, n: int) -> Value:
    return x.value if x.rank == n + 2 else g.op("Unsqueeze", x, g.ints([0]))


def _unbatched(g: Emitter, x: Operand, n: int, result: Value) -> Value:
    return result if x.rank == n + 2 else g.op("Squeeze", result, g.ints([0]))
