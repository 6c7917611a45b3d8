"""Rules of ops that work element by element, with broadcasting, and of ops that make new tensors of one value."""

from __future__ import annotations

from torch import fx

from ...rewrite import argument
from ..analysis import Analysis, rows, shape_of, sizes_of
from ..axes import Axes, Vector

_UNARY = """
abs acos acosh alias asin asinh atan atanh bitwise_not ceil celu clone contiguous cos
cosh deg2rad detach dropout elu erf erfc exp exp2 expm1 feature_alpha_dropout alpha_dropout feature_dropout fill floor
frac full_like gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lift_fresh_copy log
log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg negative ones_like positive rad2deg reciprocal relu
relu6 round rsqrt selu sgn sigmoid sign silu sin sinh softplus softshrink softsign special_erf sqrt square tan tanh
tanhshrink threshold to trunc type_as zeros_like _to_copy
"""
_BINARY = """
add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor clamp clamp_max clamp_min clip copy
div divide eq floor_divide fmax fmin fmod ge gt
greater hypot le less lerp logaddexp logical_and logical_or logical_xor lt masked_fill maximum minimum mul multiply ne
pow remainder rsub sub subtract true_divide where xlogy
"""
_CREATION = "full new_full new_ones new_zeros ones zeros"


def elementwise(analysis: Analysis, node: fx.Node) -> Axes:
    """Operands are aligned at the right; a size of 1 is broadcast."""
    operands = [analysis.axes(n) for n in node.all_input_nodes if n in analysis.values]
    return broadcast(analysis, node, operands, shape_of(node))


def broadcast(analysis: Analysis, node: fx.Node, operands: list[Axes], shape: tuple[int, ...]) -> Axes:
    """The common axes of operands that are broadcast to `shape`."""
    result: list[Vector | None] = [None] * len(shape)
    for axes in operands:
        for offset, vector in enumerate(reversed(axes), start=1):
            if len(vector) != shape[-offset]:
                continue
            known = result[-offset]
            if known is None:
                result[-offset] = vector
            else:
                analysis.same(known, vector, node)
    return tuple(analysis.atoms.fixed(n) if v is None else v for v, n in zip(result, shape))


def like_first(analysis: Analysis, node: fx.Node) -> Axes:
    """Element by element over the first argument; other tensor arguments only give a type or one value."""
    axes = analysis.axes(node.args[0])
    return axes if sizes_of(axes) == shape_of(node) else elementwise(analysis, node)


def create(analysis: Analysis, node: fx.Node) -> Axes:
    """A tensor of one value may have any size: its size literals are rewritten where they are numbers."""
    sizes = argument(node, "size")
    return tuple(
        analysis.atoms.fresh(n) if isinstance(literal, int) else analysis.atoms.fixed(n)
        for literal, n in zip(sizes, shape_of(node))
    )


def prelu(analysis: Analysis, node: fx.Node) -> Axes:
    """One slope, or one per channel."""
    axes, slopes = analysis.need(node, "self"), analysis.need(node, "weight")
    if slopes and len(slopes[-1]) > 1:
        analysis.same(axes[1], slopes[-1], node)
    return axes


def glu(analysis: Analysis, node: fx.Node) -> Axes:
    """First half times sigmoid of the second half, along one dimension."""
    axes, dim = list(analysis.need(node, "self")), argument(node, "dim")
    half = len(axes[dim]) // 2
    analysis.same(axes[dim][:half], axes[dim][half:], node)
    axes[dim] = axes[dim][:half]
    return tuple(axes)


ELEMENTWISE_RULES = {
    **rows(_UNARY, like_first),
    **rows(_BINARY, elementwise),
    **rows(_CREATION, create),
    "aten.prelu": prelu,
    "aten._prelu_kernel": elementwise,
    "aten.glu": glu,
}
