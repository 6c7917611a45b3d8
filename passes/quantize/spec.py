"""The words of quantization: number formats, scales, and what a target's table consists of.

    real = scale * (q - zero_point)

A `Target` is data. Its rows say, op by op, how the target's runtime can compute on integers; `annotate` reads them and
nothing else, so that a new runtime is a new table. The tables live in `backends/targets/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from ...errors import OptionError, QuantizationError, did_you_mean

# layer        weights: quantized inputs, int8 weights, int32 bias, quantized output
# product      of two activations (attention): quantized inputs, for which they are quantized wherever they come from
# arithmetic   all inputs and the output quantized, each with its own scale
# move         moves or selects values: the output has the scale of the input
# rescale      times a positive number: the same integers, with another scale
# fixed        arithmetic whose output range is known beforehand (sigmoid)
# float        not computed on integers here, with the reason
Kind = Literal["layer", "product", "arithmetic", "move", "rescale", "fixed", "float"]
LEADING = ("layer", "product")  # what these read is quantized for their sake
MOVING = ("move", "rescale")  # these leave the integers as they are
Runtime = Literal["onnxruntime", "openvino", None]
# A condition looks at a node and returns why a row does not apply to it, or None when it does.
Condition = Callable[[fx.Node], str | None]

KEPT_REASON = "keep_float names it"
KEPT_FLOAT = "quantize_kept_float"  # in the meta of a node that the user, or a search, leaves in float
USE_INTEGER = "quantize_use_integer"  # in the meta of a node for which optional rows are on
USE_INT16 = "quantize_use_int16"  # in the meta of a node whose activations have 16 bits
TINY = 2.0**-100  # a scale below this makes float32 products of two scales vanish


@dataclass(frozen=True)
class NumberFormat:
    """How quantized numbers are stored: integer dtype, symmetric (zero point 0) or affine, one scale or many.

    `narrow` leaves out the most negative number, so that a symmetric range is [-127, 127]. `bits`, where given, is how
    many bits of the dtype are used: 7 bits of int8 are [-64, 63].
    """

    dtype: torch.dtype
    symmetric: bool = False
    per_channel: bool = False
    narrow: bool = False
    bits: int | None = None

    @property
    def limits(self) -> tuple[int, int]:
        """(smallest, largest) stored integer."""
        info = torch.iinfo(self.dtype)
        unused = info.bits - (self.bits or info.bits)
        return (info.min >> unused) + int(self.narrow), info.max >> unused

    def __str__(self) -> str:
        """For people: "int8 (7 bits) symmetric per channel"."""
        name = str(self.dtype).removeprefix("torch.")
        used = f" ({self.bits} bits)" if self.bits else ""
        many = " per channel" if self.per_channel else ""
        return f"{name}{used} {'symmetric' if self.symmetric else 'affine'}{many}"


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one tensor. `scale` is exactly representable in float32."""

    scale: float
    zero_point: int
    dtype: torch.dtype

    @property
    def low(self) -> float:
        """The smallest real number that can be stored."""
        return self.scale * (torch.iinfo(self.dtype).min - self.zero_point)

    @property
    def high(self) -> float:
        """The largest real number that can be stored."""
        return self.scale * (torch.iinfo(self.dtype).max - self.zero_point)


def choose_params(low: float, high: float, form: NumberFormat) -> QuantParams:
    """Scale and zero point for values in [low, high]; zero is always exactly representable.

    Raises QuantizationError for a range that is not finite, and for a symmetric format without negative numbers.
    """
    if form.symmetric and form.limits[0] == 0:
        raise QuantizationError(f"{form} holds no negative numbers", hint="use a signed type, or an affine format")
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise QuantizationError(
            f"a tensor has the range [{low}, {high}]",
            hint="look for NaN or overflow in the calibration data and in the weights",
        )
    low, high = min(low, 0.0), max(high, 0.0)
    qmin, qmax = form.limits
    if form.symmetric:
        bound = max(-low, high)
        return QuantParams(as_float32(bound / qmax) or 1.0, 0, form.dtype)
    scale = as_float32((high - low) / (qmax - qmin)) or 1.0
    zero_point = round(qmin - low / scale)
    return QuantParams(scale, min(max(zero_point, qmin), qmax), form.dtype)


def as_float32(value: float) -> float:
    """The nearest float32; a value too small to be a scale becomes 0."""
    return float(torch.tensor(value, dtype=torch.float32)) if value > TINY else 0.0


@dataclass(frozen=True)
class Row:
    """One line of a target's table: how nodes that call one of `ops` are computed.

    `when` may decline with a reason; `operands` are the argument names that hold activations; `float_output` says that
    the output may stay float (an integer kernel with float output exists), and with `offers` it is quantized also for
    ops that are no layers; `fixed` is the output's known range.
    `stored`: the op is a line cut off at both ends, whose input, stored with these parameters, is its output with those
    of `fixed`: the same integers.
    `in_pairs`: a move is computed between a dequantize and a quantize of the same scale, not on integers themselves.
    `activation` and `weight` are the formats of this row's tensors where they are not the target's own.
    `joins`: an addend that comes straight from a layer is not quantized, since the layer's kernel does the addition.
    `apart`: where the op stays in float, what it reads is kept apart from the dequantization, which the runtime would
    move through the op and compute something else.
    `reason` (for kind "float") is told to the user, `hint` says what would change it.

    Rows for a choice that depends on shapes and machines carry the name of their `form` ("attention"). An `optional`
    row is off until `quantize{forms=[attention]}` turns the form on, or `use_integer` names the node; its `reason`
    says why it is off. A form that is on is turned off by `forms=[-attention]`.
    """

    ops: tuple[str, ...]
    kind: Kind
    operands: tuple[str, ...] = ("self",)
    when: tuple[Condition, ...] = ()
    float_output: bool = False
    offers: bool = False
    fixed: QuantParams | None = None
    stored: QuantParams | None = None
    in_pairs: bool = False
    activation: NumberFormat | None = None
    weight: NumberFormat | None = None
    joins: bool = False
    apart: bool = False
    reason: str = ""
    hint: str = ""
    form: str = ""
    optional: bool = False

    def is_off(self, node: fx.Node) -> bool:
        """Is this an optional row that nothing has turned on for `node`?"""
        return self.optional and not node.meta.get(USE_INTEGER)

    def declines(self, node: fx.Node) -> str | None:
        """Why this row does not apply to `node`, or None."""
        for condition in self.when:
            if (reason := condition(node)) is not None:
                return reason
        return None


@dataclass(frozen=True)
class Target:
    """A runtime on a kind of processor, as a table.

    `absorbs` are activation functions that vanish into the quantization of their input when their lower bound is
    the smallest stored number; `fuses` are those that its layers compute before they quantize, whatever the zero point.
    `expand` names ops that are written as others first (silu as sigmoid and mul).
    `isolate` names ops that the runtime would compute with a slow integer kernel if quantized tensors touched them on
    both sides; they are kept apart.
    `stem_blocks`: convolutions with stride 2 on few channels are written over 2x2 blocks of pixels (see `stem`).
    `stem_columns`: those with stride 1 on few channels are computed for so many columns at once (see `columns`).
    `depthwise_multiple`: depthwise convolutions get channels of zeros up to a multiple (see `wide_depthwise`).
    `products_of_tokens`: linear layers on tokens are written as matmul and add (see `written`).
    `shields_masks`: the runtime is slow with denormal numbers, which masks of attention make (see `masks`).
    `activation16` are the 16-bit activations that any op of the table can have instead of the target's own (`use_int16`
    names those that do); None where the runtime has no such kernels.
    `bias` None: biases stay float. `round_to` is the channel count multiple that its kernels like (pruning halves it
    for narrow layers).
    `processor` is the family that it is for. `runtime` is what models are verified in beside ONNX Runtime: in OpenVINO,
    or (None) in nothing, so that only the form of the file is checked. `run` says for people where models were run;
    `session` are entries of ONNX Runtime's session options with which it rewrites graphs here as it does there.
    """

    name: str
    summary: str
    activation: NumberFormat
    weight: NumberFormat
    rows: tuple[Row, ...]
    absorbs: tuple[str, ...] = ()
    fuses: tuple[str, ...] = ()
    expand: tuple[str, ...] = ()
    isolate: tuple[str, ...] = ()
    activation16: NumberFormat | None = None
    bias: NumberFormat | None = field(default=NumberFormat(torch.int32, symmetric=True, per_channel=True))
    stem_blocks: bool = False
    stem_columns: int = 1
    depthwise_multiple: int = 1
    products_of_tokens: bool = False
    shields_masks: bool = False
    round_to: int = 1
    processor: Literal["x86", "arm"] = "x86"
    runtime: Runtime = "onnxruntime"
    run: str = "ONNX Runtime, here"
    session: tuple[tuple[str, str], ...] = ()

    @property
    def may_saturate(self) -> bool:
        """Can the sum of two products be too large for int16, in which x86 without VNNI adds them up?"""
        low, high = self.weight.limits
        return 2 * _LARGEST_BYTE * max(-low, high) > _LARGEST_INT16

    def absorbing(self, op: str) -> bool:
        """Does an activation function vanish into the integer op before it, or into the quantization after that?

        Where zero is in the middle of the stored numbers no quantization does the work of a Relu.
        """
        return op in self.fuses or (op in self.absorbs and not self.activation.symmetric)

    @property
    def activation_formats(self) -> list[NumberFormat]:
        """The target's own format, and those of rows that have another."""
        others = (*(r.activation for r in self.rows), self.activation16)
        return [self.activation, *(f for f in others if f is not None)]

    def row_for(self, node: fx.Node) -> Row | None:
        """The first row whose ops include the node's, that is not off, and that does not decline it; with activations
        of 16 bits where the node is to have them."""
        rows = (r for r in self.rows_about(node) if not r.is_off(node) and r.declines(node) is None)
        row = next(rows, None)
        return replace(row, activation=self.activation16) if row and self.widens(node, row) else row

    def widens(self, node: fx.Node, row: Row) -> bool:
        """Does the node get other activations than its row's by being one of those with 16 bits?"""
        given = row.kind in ("layer", "product", "arithmetic") and row.activation is None
        return given and self.activation16 is not None and bool(node.meta.get(USE_INT16))

    def rows_about(self, node: fx.Node) -> list[Row]:
        """All rows that name the node's op."""
        name = str(node.target)
        return [r for r in self.rows if name in r.ops]

    def why_float(self, node: fx.Node) -> str:
        """Why the node is computed in float here, for people."""
        return self.explain_float(node)[0]

    def explain_float(self, node: fx.Node) -> tuple[str, str]:
        """(why the node is computed in float here, what would change it), for people."""
        rows = [(r, r.declines(node)) for r in self.rows_about(node)]
        for row in (r for r, declined in rows if declined is None and r.is_off(node)):
            hint = row.hint or f"quantize{{forms=[{row.form}]}}, or use_integer with its name"
            return row.reason or "its form is turned off", hint
        for row in (r for r, declined in rows if declined is None and r.kind == "float"):
            return row.reason, row.hint or _OTHER_TARGET
        declined = [d for _, d in rows if d]
        return (declined[0] if declined else f"target {self.name} has no row for {node.target}"), _OTHER_TARGET

    @property
    def forms(self) -> dict[str, bool]:
        """The named forms, and whether each is on."""
        return {r.form: not r.optional for r in self.rows if r.form}

    def with_forms(self, names: Iterable[str]) -> Target:
        """The target with forms turned on ("attention") or off ("-attention").

        Raises OptionError for a name that is no form, and for one that changes nothing.
        """
        target = self
        for text in names:
            name, on = text.removeprefix("-"), not text.startswith("-")
            if target.forms.get(name) is None:
                hint = did_you_mean(name, self.forms, "forms")
                raise OptionError(f"forms: {name!r} is no form of {self.name}", hint=hint)
            if target.forms[name] == on:
                state = "on" if on else "off"
                raise OptionError(f"forms: {name!r} is {state} already", hint=f"leave {text!r} out")
            rows = tuple(replace(r, optional=not on) if r.form == name else r for r in target.rows)
            target = replace(target, rows=rows)
        return target


_LARGEST_BYTE, _LARGEST_INT16 = 255, 32767
_OTHER_TARGET = "a target whose table has a row for it"
