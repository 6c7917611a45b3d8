"""Run a quantized program with the arithmetic of the integer kernels that ONNX Runtime makes of it.

In the graph an integer layer is written in real numbers: quantize(conv(dequantize(x), dequantize_channel(w))). Computed
as written, a sum of float32 products is off by its last bits, now and then that flips a rounding, and a network carries
one flipped step on to thousands of others. So where the pattern is one that the runtime has an integer kernel for, its
value is computed as the kernel does (onnxruntime 1.31, found by trying all 65,536 pairs of operands at many scales):

    conv, linear, matmul    acc = sum (x - zx)(w - zw) + b exactly;  y = round(float32(acc) * m) + zy,  m = sx * sw / sy
    the same, float output  float32(acc) * (sx * sw)
    a + b                   round(fma(a, ra, fma(b, rb, zy - fma(ra, za, rb * zb)))),  ra = sa / sy, rb = sb / sy
    a * b                   round(float32((a - za)(b - zb)) * (sa * sb / sy) + zy)
    global average pool     round(float32(sum (x - zx)) * (sx / (sy * n))) + zy

All of it in float32 where not said to be exact, rounding half to even, then saturated. Everything else (tables of 256
values, what moves numbers, what is float) gives the runtime's values as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .operators import declare_operators

aten = torch.ops.aten
_EIGHT_BITS = (torch.uint8, torch.int8)
_EXACT = 2**24  # float32 holds every integer up to here
_SPLIT = 16


@dataclass(frozen=True)
class Real:
    """A tensor of integers with its scale and zero point, as a kernel reads it: node, scale, zero point, dtype.

    `channels`: the node that holds one scale per output channel, instead of `scale`. `pads`: constant_pad_nd's list of
    borders of zero (the zero point) around it.
    """

    integers: fx.Node
    scale: float = 1.0
    zero_point: int = 0
    channels: fx.Node | None = None
    pads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Step:
    """How a quantized result is stored: scale, zero point, dtype. None in its place for a float result."""

    scale: float
    zero_point: int
    dtype: torch.dtype

    def store(self, steps: torch.Tensor) -> torch.Tensor:
        """Rounded steps above the zero point as integers, saturated."""
        info = torch.iinfo(self.dtype)
        return steps.round_().add_(self.zero_point).clamp_(info.min, info.max).to(self.dtype)


@dataclass(frozen=True)
class Kernel:
    """What computes a node instead of its own op: a function of the values of `inputs`."""

    inputs: tuple[fx.Node, ...]
    compute: Callable[..., torch.Tensor]


def has_integers(graph: fx.Graph) -> bool:
    """Does the graph read quantized tensors, so that there may be kernels to follow?"""
    declare_operators()
    return any(n.target is torch.ops.fxpress.dequantize.default for n in graph.nodes)


def kernels_of(graph: fx.Graph) -> dict[fx.Node, Kernel]:
    """The nodes that an integer kernel computes, `quantize` nodes and layers with float output."""
    declare_operators()
    found: dict[fx.Node, Kernel] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is torch.ops.fxpress.quantize.default:
            source, *parameters = _arguments(node, "x", "scale", "zero_point", "dtype")
            step = Step(*parameters)
            readable = isinstance(source, fx.Node) and source.op == "call_function" and step.dtype in _EIGHT_BITS
            rule = _RULES.get(source.target) if readable else None
            kernel = rule(source, step) if rule else None
        else:
            kernel = _FLOAT_OUTPUT[node.target](node, None) if node.target in _FLOAT_OUTPUT else None
        if kernel is not None:
            found[node] = kernel
    return found


class Simulator(fx.Interpreter):
    """Runs a graph with `kernels_of` in the place of what they stand for; what only they would have read is left out.

    The values of `watched` nodes are kept in `values` by name; all others are freed once nothing needs them.
    """

    def __init__(self, module: fx.GraphModule, watched: Iterable[fx.Node] = ()) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kernels = kernels_of(module.graph)
        self.watched = set(watched)
        self.values: dict[str, Any] = {}
        self._freed = self._last_uses()

    def _inputs(self, node: fx.Node) -> Iterable[fx.Node]:
        kernel = self.kernels.get(node)
        return node.all_input_nodes if kernel is None else kernel.inputs

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Node -> the nodes whose values nothing needs after it. Only nodes that are needed at all are keys."""
        freed: dict[fx.Node, list[fx.Node]] = {}
        needed = {n for n in self.module.graph.nodes if n.op == "output"} | self.watched  # type: ignore[union-attr]
        seen: set[fx.Node] = set()
        for node in reversed(list(self.module.graph.nodes)):  # type: ignore[union-attr]
            if node in needed:
                inputs = set(self._inputs(node))
                freed[node] = list(inputs - seen)
                seen |= inputs
                needed |= inputs
        return freed

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._freed and n.op != "placeholder":
            return None
        kernel = self.kernels.get(n)
        value = super().run_node(n) if kernel is None else kernel.compute(*(self.env[i] for i in kernel.inputs))
        if n in self.watched:
            self.values[n.name] = value
        for old in self._freed.get(n, ()):
            self.env.pop(old, None)
        return value


# -- patterns -------------------------------------------------------------------------------------------------------


def _read(value: Any) -> Real | None:
    """The 8-bit integers behind `value`, through a border of zeros."""
    if _is(value, aten.constant_pad_nd.default) and not any(value.args[2:]):
        inner = _read(value.args[0])
        return inner and Real(inner.integers, inner.scale, inner.zero_point, None, (*inner.pads, *value.args[1]))
    if not _is(value, torch.ops.fxpress.dequantize.default) or _dtype(value.args[0]) not in _EIGHT_BITS:
        return None
    return Real(*_arguments(value, "q", "scale", "zero_point"))


def _read_weights(value: Any, dtypes: tuple[torch.dtype, ...] = _EIGHT_BITS) -> Real | None:
    if not _is(value, torch.ops.fxpress.dequantize_channel.default):
        return None
    integers, scales, axis = _arguments(value, "q", "scale", "axis")
    return Real(integers, channels=scales) if axis == 0 and _dtype(integers) in dtypes else None


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    """The arguments of one of our own operators, which a saved graph may pass by name."""
    given = {**dict(zip(names, node.args)), **node.kwargs}
    return [given[n] for n in names]


def _is(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def _dtype(value: Any) -> torch.dtype | None:
    form = value.meta.get("val") if isinstance(value, fx.Node) else None
    return form.dtype if isinstance(form, torch.Tensor) else None


def _layer(node: fx.Node, step: Step | None) -> Kernel | None:
    """conv and linear: integer weights, an int32 bias or none."""
    x, weight = _read(node.args[0]), _read_weights(node.args[1])
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    stored = _read_weights(bias, (torch.int32,)) if bias is not None else None
    if x is None or weight is None or weight.channels is None or (bias is not None and stored is None):
        return None
    options, target, kwargs = node.args[3:], node.target, {k: v for k, v in node.kwargs.items() if k != "bias"}
    axis = -1 if target is aten.linear.default else 1

    def compute(q: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        def product(a: torch.Tensor) -> torch.Tensor:
            padded = aten.constant_pad_nd(a, list(x.pads)) if x.pads else a
            return target(padded, w.to(a.dtype), None, *options, **kwargs)  # type: ignore[operator]

        total = _exact_sum(product, q.float().sub_(x.zero_point), _most(w, 255))
        if b is not None:
            total = _add_bias(total, _along(b, total, axis))
        return _result(total, _along(_float32(x.scale) * scales, total, axis), step)

    inputs = (x.integers, weight.integers, weight.channels, *([stored.integers] if stored else []))
    return Kernel(inputs, compute)


def _product(node: fx.Node, step: Step | None) -> Kernel | None:
    """matmul of two activations."""
    a, b = _read(node.args[0]), _read(node.args[1])
    if a is None or b is None or a.pads or b.pads:
        return None
    target, zero_point = node.target, b.zero_point

    def compute(q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        other = r.float() - zero_point
        total = _exact_sum(
            lambda p: target(p, other.to(p.dtype)),  # type: ignore[operator]
            q.float() - a.zero_point,
            255 * 255 * other.shape[-2],
        )
        return _result(total, _float32(a.scale) * _float32(b.scale), step)

    return Kernel((a.integers, b.integers), compute)


def _add(node: fx.Node, step: Step | None) -> Kernel | None:
    a, b = _read(node.args[0]), _read(node.args[1])
    if a is None or b is None or step is None or node.kwargs.get("alpha", 1) != 1 or a.pads or b.pads:
        return None
    out = _float32(step.scale)
    first, second = (_float32(r.scale) / out for r in (a, b))
    inner = _fma(first, a.zero_point, second * b.zero_point)
    fixed = _float32(float(step.zero_point)) - inner

    def compute(q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        steps = _fma(first, q, _fma(second, r, fixed))
        return Step(step.scale, 0, step.dtype).store(steps)

    return Kernel((a.integers, b.integers), compute)


def _mul(node: fx.Node, step: Step | None) -> Kernel | None:
    a, b = _read(node.args[0]), _read(node.args[1])
    if a is None or b is None or step is None or a.pads or b.pads:
        return None
    factor = _float32(a.scale) * _float32(b.scale) / _float32(step.scale)

    def compute(q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        product = q.float().sub_(a.zero_point) * r.float().sub_(b.zero_point)
        return Step(step.scale, 0, step.dtype).store(product.mul_(factor).add_(step.zero_point))

    return Kernel((a.integers, b.integers), compute)


def _average(node: fx.Node, step: Step | None) -> Kernel | None:
    """adaptive_avg_pool2d to one value."""
    x = _read(node.args[0])
    if x is None or step is None or x.pads or set(node.args[1]) != {1}:  # type: ignore[arg-type]
        return None

    def compute(q: torch.Tensor) -> torch.Tensor:
        count = q.shape[-1] * q.shape[-2]
        total = q.sum((-2, -1), keepdim=True, dtype=torch.int32) - x.zero_point * count
        factor = _float32(x.scale) / (_float32(step.scale) * float(count))
        return step.store(total.float() * factor)

    return Kernel((x.integers,), compute)


# -- arithmetic -----------------------------------------------------------------------------------------------------


def _float32(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32)


def _fma(a: torch.Tensor, b: Any, c: torch.Tensor) -> torch.Tensor:
    """a * b + c with one rounding to float32: the product of 8 and 24 bits is exact in float64."""
    product = torch.as_tensor(b) * a.double()
    fits = torch.broadcast_shapes(product.shape, c.shape) == product.shape
    return (product.add_(c) if fits else product + c.double()).float()


def _along(values: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """One value per index of `axis`, shaped so that it broadcasts over `like`."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _most(weight: torch.Tensor, x: int) -> int:
    """A bound on |sum x w| for factors x up to `x` in size: a rough one where that will do."""
    rough = weight[0].numel() * 128 * x
    return rough if rough < _EXACT else int(weight.flatten(1).abs().sum(1, dtype=torch.int64).max()) * x


def _exact_sum(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, most: int) -> torch.Tensor:
    """float32 of product(x), a linear function that sums products of integers, for sums up to `most`, without error.

    What float32 may not hold is summed in two parts (x = 16 high + low), what those may not hold in float64.
    """
    if most < _EXACT:
        return product(x)
    if most // (_SPLIT - 1) >= _EXACT:
        return product(x.double()).float()
    high = torch.floor(x / _SPLIT)
    return product(high).double().mul_(_SPLIT).add_(product(x - high * _SPLIT)).float()


def _add_bias(total: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """float32(total + bias), rounded once."""
    if int(bias.abs().max()) < _EXACT:
        return total.add_(bias.float())
    return total.double().add_(bias.double()).float()


def _result(total: torch.Tensor, scale: torch.Tensor, step: Step | None) -> torch.Tensor:
    """The sum in steps of the output's scale, stored; or as a real number."""
    return total * scale if step is None else step.store(total * (scale / _float32(step.scale)))


_LAYERS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
           aten.linear.default)  # fmt: skip
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
# The op before a `quantize` node -> its rule; the ops that have an integer kernel with float output.
_RULES: dict[Any, Callable[[fx.Node, Step | None], Kernel | None]] = {
    **dict.fromkeys(_LAYERS, _layer),
    **dict.fromkeys(_PRODUCTS, _product),
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.adaptive_avg_pool2d.default: _average,
}
_FLOAT_OUTPUT = {aten.linear.default: _layer, **dict.fromkeys(_PRODUCTS, _product)}
