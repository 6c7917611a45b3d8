"""Bring different spellings of one operation to one form, so that later passes and tables know one form only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..frontend.program import Program
from .base import INTERFACE, VALUES, Change, Context, Pass, register_pass
from .rewrite import argument, aten, call_before, replace


@register_pass
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Write equal operations in one form.

    1. An average pool whose window is the whole map is the global pool `adaptive_avg_pool2d(x, 1)`.
    2. A mean over both spatial dims of [N, C, H, W] is the global pool too (flattened where dims are dropped).
    3. `relu6(x)` and `clamp(x, low, high)` with both bounds are `hardtanh(x, low, high)`; `clamp_min(x, 0)` is `relu`.
    4. `conv2d(padding="valid")` is `conv2d(padding=0)`, and `pad(mode="constant")` is `constant_pad_nd`.
    """

    name = "canonicalize"
    preserves = frozenset({VALUES, INTERFACE})
    writes_weights = False
    tolerance = 1e-5

    def run(self, program: Program, context: Context) -> Change:
        count = 0
        for node in list(program.graph.nodes):
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            new = rule(node) if rule else None
            if new is not None:
                replace(node, new)
                count += 1
        return Change(count)


def _spatial(node: fx.Node) -> tuple[int, int] | None:
    """(H, W) of the input of a node when it is [N, C, H, W] with known H and W."""
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return None
    height, width = value.shape[2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _global_average(node: fx.Node) -> fx.Node | None:
    kernel = argument(node, "kernel_size")
    kernel = (kernel[0], kernel[-1])
    if _spatial(node) != kernel or any(argument(node, "padding")) or argument(node, "divisor_override"):
        return None
    return call_before(node, aten.adaptive_avg_pool2d.default, node.args[0], [1, 1])


def _mean(node: fx.Node) -> fx.Node | None:
    dims = argument(node, "dim")
    if _spatial(node) is None or argument(node, "dtype") is not None or not dims:
        return None
    if sorted(d % 4 for d in dims) != [2, 3]:
        return None
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    pooled = call_before(
        node, aten.adaptive_avg_pool2d.default, node.args[0], [1, 1], value=source.new_empty((*source.shape[:2], 1, 1))
    )
    return pooled if argument(node, "keepdim") else call_before(node, aten.flatten.using_ints, pooled, 1)


def _relu6(node: fx.Node) -> fx.Node | None:
    return call_before(node, aten.hardtanh.default, node.args[0], 0.0, 6.0)


def _clamp(node: fx.Node) -> fx.Node | None:
    low, high = argument(node, "min"), argument(node, "max")
    if low == 0 and high is None:
        return call_before(node, aten.relu.default, node.args[0])
    if low is None or high is None or not node.meta["val"].is_floating_point():
        return None
    return call_before(node, aten.hardtanh.default, node.args[0], float(low), float(high))


def _clamp_min(node: fx.Node) -> fx.Node | None:
    return call_before(node, aten.relu.default, node.args[0]) if node.args[1] == 0 else None


def _valid_padding(node: fx.Node) -> fx.Node | None:
    if argument(node, "padding") != "valid":
        return None
    names = ("input", "weight", "bias", "stride")
    pads = [0, 0]
    rest = (argument(node, "dilation"), argument(node, "groups"))
    return call_before(node, aten.conv2d.default, *(argument(node, n) for n in names), pads, *rest)


def _constant_pad(node: fx.Node) -> fx.Node | None:
    if argument(node, "mode") != "constant":
        return None
    value = argument(node, "value")
    return call_before(node, aten.constant_pad_nd.default, node.args[0], node.args[1], 0 if value is None else value)


_RULES = {
    aten.pad.default: _constant_pad,
    aten.avg_pool2d.default: _global_average,
    aten.mean.dim: _mean,
    aten.relu6.default: _relu6,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp_min,
    aten.conv2d.padding: _valid_padding,
}
