"""Activations and elementwise functions of one float tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir
import torch

from .emit import Emitter, Number, Operand, is_broadcast_one
from .float_layers import undivided
from .table import row

# ATen op -> ONNX op of the same meaning. Integer inputs are promoted to the result's float type first.
_SAME = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "tan": "Tan",
    "tanh": "Tanh",
}
_ROUNDINGS = frozenset({"Ceil", "Floor"})


def _unary(name: str, op: str) -> Callable[[Emitter, Operand], ir.Value]:
    def emit(g: Emitter, x: Operand) -> ir.Value:
        if op in _ROUNDINGS and not x.is_float:
            return x.value
        return g.op(op, g.cast(x, g.result.dtype))

    emit.__doc__ = f"{op}."
    emit.__qualname__ = emit.__name__ = name
    return emit


for _name, _op in _SAME.items():
    row(f"aten.{_name}.default")(_unary(_name, _op))


@row("aten.round.default")
def round_half_even(g: Emitter, x: Operand) -> ir.Value:
    """Round: half to even in both."""
    return g.op("Round", x) if x.is_float else x.value


@row("aten.trunc.default", "aten.fix.default")
def trunc(g: Emitter, x: Operand) -> ir.Value:
    """Towards zero: sign(x) * floor(|x|)."""
    if not x.is_float:
        return x.value
    return g.op("Mul", g.op("Sign", x), g.op("Floor", g.op("Abs", x)))


@row("aten.rsqrt.default")
def rsqrt(g: Emitter, x: Operand) -> ir.Value:
    return g.op("Reciprocal", g.op("Sqrt", g.cast(x, g.result.dtype)))


@row("aten.square.default")
def square(g: Emitter, x: Operand) -> ir.Value:
    return g.op("Mul", x, x)


@row("aten.log2.default", "aten.log10.default")
def log_base(g: Emitter, x: Operand) -> ir.Value:
    base = 2.0 if "log2" in str(g.node.target) else 10.0  # type: ignore[union-attr]
    return g.op("Div", g.op("Log", g.cast(x, g.result.dtype)), g.scalar(math.log(base), g.result.dtype))


@row("aten.log1p.default")
def log1p(g: Emitter, x: Operand) -> ir.Value:
    return g.op("Log", g.op("Add", g.cast(x, g.result.dtype), g.scalar(1.0, g.result.dtype)))


@row("aten.expm1.default")
def expm1(g: Emitter, x: Operand) -> ir.Value:
    return g.op("Sub", g.op("Exp", g.cast(x, g.result.dtype)), g.scalar(1.0, g.result.dtype))


@row("aten.logit.default")
def logit(g: Emitter, x: Operand, eps: float | None) -> ir.Value:
    """log(x / (1 - x)), x kept within [eps, 1 - eps] where eps is given."""
    value = x.value if eps is None else clamp(g, x, eps, 1 - eps)
    return g.op("Log", g.op("Div", value, g.op("Sub", g.scalar(1.0, x.dtype), value)))


@row("aten.erfc.default", "aten.special_erfc.default")
def erfc(g: Emitter, x: Operand) -> ir.Value:
    return g.op("Sub", g.scalar(1.0, x.dtype), g.op("Erf", x))


# -- piecewise linear -----------------------------------------------------------------------------------------------


@row("aten.clamp.default", "aten.clip.default")
def clamp(g: Emitter, x: Operand, min: Number | None, max: Number | None) -> ir.Value:
    """Clip; bounds are promoted as torch promotes them."""
    dtype = g.result.dtype
    low = None if min is None else g.number(min, dtype)
    high = None if max is None else g.number(max, dtype)
    return g.op("Clip", g.cast(x, dtype), low, high)


@row("aten.clamp.Tensor", "aten.clip.Tensor")
def clamp_tensor(g: Emitter, x: Operand, min: Operand | None, max: Operand | None) -> ir.Value:
    dtype = g.result.dtype
    value = g.cast(x, dtype)
    if min is not None:
        value = g.op("Max", value, g.cast(min, dtype))
    return value if max is None else g.op("Min", value, g.cast(max, dtype))


@row("aten.clamp_min.default")
def clamp_min(g: Emitter, x: Operand, min: Number) -> ir.Value:
    return clamp(g, x, min, None)


@row("aten.clamp_max.default")
def clamp_max(g: Emitter, x: Operand, max: Number) -> ir.Value:
    return clamp(g, x, None, max)


@row("aten.hardtanh.default")
def hardtanh(g: Emitter, x: Operand, min_val: Number, max_val: Number) -> ir.Value:
    return clamp(g, x, min_val, max_val)


@row("aten.relu.default")
def relu(g: Emitter, x: Operand) -> ir.Value:
    """Relu; ONNX Runtime has no kernel for most integers, but takes their maximum with 0."""
    return g.op("Relu", x) if x.is_float or x.dtype == torch.int8 else g.op("Max", x, g.scalar(0, x.dtype))


@row("aten.relu6.default")
def relu6(g: Emitter, x: Operand) -> ir.Value:
    return clamp(g, x, 0, 6)


@row("aten.hardsigmoid.default")
def hardsigmoid(g: Emitter, x: Operand) -> ir.Value:
    """clip(x / 6 + 1/2, 0, 1)."""
    return g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@row("aten.hardswish.default")
def hardswish(g: Emitter, x: Operand) -> ir.Value:
    """x * hardsigmoid(x); as two nodes ONNX Runtime can quantize them apart."""
    return g.op("Mul", x, g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))


@row("aten.leaky_relu.default")
def leaky_relu(g: Emitter, x: Operand, negative_slope: float) -> ir.Value:
    return g.op("LeakyRelu", x, alpha=float(negative_slope))


@row("aten.prelu.default")
def prelu(g: Emitter, x: Operand, weight: Operand) -> ir.Value:
    """PRelu; torch's slopes lie along axis 1, ONNX broadcasts from the right."""
    if is_broadcast_one(weight.shape) or x.rank <= 1:
        return g.op("PRelu", x, weight)
    shape = [*weight.shape, *[1] * (x.rank - 2)]
    return g.op("PRelu", x, g.reshape(weight, weight.shape, shape))


@row("aten.threshold.default")
def threshold(g: Emitter, x: Operand, threshold: Number, value: Number) -> ir.Value:
    above = g.op("Greater", x, g.number(threshold, x.dtype))
    return g.op("Where", above, x, g.number(value, x.dtype))


@row("aten.hardshrink.default")
def hardshrink(g: Emitter, x: Operand, lambd: Number) -> ir.Value:
    outside = g.op("Greater", g.op("Abs", x), g.number(lambd, x.dtype))
    return g.op("Where", outside, x, g.scalar(0, x.dtype))


@row("aten.softshrink.default")
def softshrink(g: Emitter, x: Operand, lambd: float) -> ir.Value:
    return g.op("Shrink", x, lambd=float(lambd), bias=float(lambd))


# -- smooth ---------------------------------------------------------------------------------------------------------


@row("aten.silu.default")
def silu(g: Emitter, x: Operand) -> ir.Value:
    """x * sigmoid(x), which ONNX Runtime computes as one kernel."""
    value = undivided(g, x)
    return g.op("Mul", value, g.op("Sigmoid", value))


@row("aten.gelu.default")
def gelu(g: Emitter, x: Operand, approximate: str) -> ir.Value:
    """Gelu, exact or by tanh, as one node."""
    if approximate not in ("none", "tanh"):
        raise g.reject(f"approximate={approximate!r} is not lowered", hint="use 'none' or 'tanh'")
    return g.op("Gelu", x, approximate=approximate)


@row("aten.elu.default")
def elu(g: Emitter, x: Operand, alpha: float, scale: float, input_scale: float) -> ir.Value:
    if scale != 1 or input_scale != 1:
        raise g.reject(f"scale={scale}, input_scale={input_scale} are not lowered", hint="use elu, selu or celu")
    return g.op("Elu", x, alpha=float(alpha))


@row("aten.selu.default")
def selu(g: Emitter, x: Operand) -> ir.Value:
    return g.op("Selu", x, alpha=1.6732632423543772, gamma=1.0507009873554805)


@row("aten.celu.default")
def celu(g: Emitter, x: Operand, alpha: float) -> ir.Value:
    """Celu is defined for float32 only, so: max(x, 0) + min(alpha * (exp(x / alpha) - 1), 0)."""
    a = g.scalar(float(alpha), x.dtype)
    zero = g.scalar(0.0, x.dtype)
    low = g.op("Mul", a, g.op("Sub", g.op("Exp", g.op("Div", x, a)), g.scalar(1.0, x.dtype)))
    return g.op("Add", g.op("Max", x, zero), g.op("Min", low, zero))


@row("aten.mish.default")
def mish(g: Emitter, x: Operand) -> ir.Value:
    """x * tanh(softplus(x))."""
    return g.op("Mul", x, g.op("Tanh", g.op("Softplus", x)))


@row("aten.softplus.default")
def softplus(g: Emitter, x: Operand, beta: float, threshold: float) -> ir.Value:
    """log(1 + exp(beta * x)) / beta, and x itself where beta * x is above the threshold."""
    b = g.scalar(float(beta), x.dtype)
    scaled = x.value if beta == 1 else g.op("Mul", x, b)
    smooth = g.op("Softplus", scaled)
    smooth = smooth if beta == 1 else g.op("Div", smooth, b)
    # Above 20 the two agree to float32's last bit: no comparison is needed then.
    if threshold >= 20 and x.dtype == torch.float32:
        return smooth
    return g.op("Where", g.op("Greater", scaled, g.scalar(float(threshold), x.dtype)), x, smooth)


@row("aten.log_sigmoid.default")
def log_sigmoid(g: Emitter, x: Operand) -> ir.Value:
    """-softplus(-x), which does not overflow."""
    return g.op("Neg", g.op("Softplus", g.op("Neg", x)))


@row("aten.glu.default")
def glu(g: Emitter, x: Operand, dim: int) -> ir.Value:
    """a * sigmoid(b) of the two halves."""
    a, b = g.ops("Split", 2, x, axis=dim, num_outputs=2)
    return g.op("Mul", a, g.op("Sigmoid", b))


@row("aten.softmax.int", "aten.special_softmax.int")
def softmax(g: Emitter, x: Operand, dim: int, dtype: torch.dtype | None) -> ir.Value:
    return g.op("Softmax", g.cast(x, dtype or g.result.dtype), axis=dim)


@row("aten.log_softmax.int", "aten.special_log_softmax.int")
def log_softmax(g: Emitter, x: Operand, dim: int, dtype: torch.dtype | None) -> ir.Value:
    return g.op("LogSoftmax", g.cast(x, dtype or g.result.dtype), axis=dim)


@row("aten._softmax.default")
def inner_softmax(g: Emitter, x: Operand, dim: int, half_to_float: bool) -> ir.Value:
    return g.op("Softmax", g.cast(x, g.result.dtype), axis=dim)


@row(
    "aten.dropout.default",
    "aten.alpha_dropout.default",
    "aten.feature_dropout.default",
    "aten.feature_alpha_dropout.default",
)
def dropout(g: Emitter, x: Operand, p: float, train: bool) -> ir.Value:
    """The identity in evaluation."""
    if train and p:
        raise g.reject("dropout in training mode is random", hint="call program.eval() first")
    return x.value
