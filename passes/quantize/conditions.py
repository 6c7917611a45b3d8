"""Conditions that rows of target tables use: each looks at a node and returns why a row does not apply, or None."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..rewrite import argument, is_constant


def _shape(value: Any) -> tuple[Any, ...] | None:
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else None


def constant_weights(node: fx.Node) -> str | None:
    """Weight and bias are parameters, not computed from the input."""
    values = [node.args[1], argument(node, "bias")]
    if all(v is None or is_constant(v) for v in values):
        return None
    return "its weights are computed in the graph"


def two_tensors(node: fx.Node) -> str | None:
    """Both operands are activations, not scalars or parameters."""
    operands = node.args[:2]
    if len(operands) == 2 and all(isinstance(a, fx.Node) and not is_constant(a) for a in operands):
        return None
    return "one operand is a constant, for which there is no integer kernel"


def plain_add(node: fx.Node) -> str | None:
    """`alpha` is 1."""
    return None if argument(node, "alpha") == 1 else "add with alpha is not an addition of two quantized tensors"


def floating(node: fx.Node) -> str | None:
    """The result is float32."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
        return None
    return "it does not compute on float32"


LARGE_WINDOW = 49  # values of a channel


def small_depthwise(node: fx.Node) -> str | None:
    """A convolution that is not depthwise over height and width, or whose window is smaller than 7x7."""
    weight = _shape(node.args[1])
    if argument(node, "groups") == 1 or weight is None or len(weight) != 4 or weight[1] != 1:
        return None
    return None if math.prod(weight[2:]) < LARGE_WINDOW else "it is depthwise with a large window"


def depthwise(node: fx.Node) -> str | None:
    """A convolution over height and width whose channels each give one, by themselves."""
    weight = _shape(node.args[1])
    alone = weight is not None and len(weight) == 4 and weight[1] == 1 and weight[0] == argument(node, "groups")
    return None if alone else "it is not depthwise"


def wide_groups(node: fx.Node) -> str | None:
    """A convolution without groups of 2 to 4 channels."""
    weight = _shape(node.args[1])
    if argument(node, "groups") == 1 or weight is None or len(weight) != 4 or not 1 < weight[1] <= 4:
        return None
    return "its groups have few channels"


def two_dimensional(node: fx.Node) -> str | None:
    """The input is a matrix [rows, features]."""
    shape = _shape(node.args[0])
    return None if shape is not None and len(shape) == 2 else "its input has more than two dims"


def four_dimensional(node: fx.Node) -> str | None:
    """The input is [N, C, H, W]."""
    shape = _shape(node.args[0])
    return None if shape is not None and len(shape) == 4 else "its input is not [N, C, H, W]"


def global_pool(node: fx.Node) -> str | None:
    """An adaptive pool to one value, or a mean over both spatial dims of [N, C, H, W]."""
    shape = _shape(node.args[0])
    if shape is None or len(shape) != 4:
        return "its input is not [N, C, H, W]"
    if "mean" in str(node.target):
        dims = node.args[1] if len(node.args) > 1 else None
        spatial = isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]
        return None if spatial else "it averages over other dims than height and width"
    out = _shape(node)
    return None if out is not None and out[2:] == (1, 1) else "it pools to more than one value"


def pads_with_zero(node: fx.Node) -> str | None:
    """constant_pad_nd with the value 0, which is exact in every quantization."""
    return None if argument(node, "value") == 0 else "it pads with another value than 0"


def whole_multiple(node: fx.Node) -> str | None:
    """A resize to whole multiples of height and width."""
    before, after = _shape(node.args[0]), _shape(node)
    if before is None or after is None or not all(isinstance(s, int) for s in (*before[2:], *after[2:])):
        return "its sizes are not known"
    whole = all(b % a == 0 for a, b in zip(before[2:], after[2:]))
    return None if whole else "it does not resize to a whole multiple"


def by_positive_number(node: fx.Node) -> str | None:
    """A product with, or a quotient by, a positive number."""
    number = node.args[1] if len(node.args) > 1 else None
    plain = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < float("inf")
    return None if plain else "it does not multiply with a positive number"


def rescaling(node: fx.Node) -> float:
    """The positive number that a node multiplies with."""
    number = float(node.args[1])  # type: ignore[arg-type]
    return 1.0 / number if "div" in str(node.target) else number
