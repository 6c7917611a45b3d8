"""`Emitter`: what lowering rows write ONNX with.

It keeps the nodes written so far, the initializers (shared by content), and which fx node is being lowered, so that
every ONNX node leads back to it: its name is the layer's, its metadata hold the fx node and the source line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx

from ...errors import LoweringError
from ...frontend.program import layer_name, source_of
from ...passes.rewrite import WORK
from .part import NODE, SHARE
from .sizes import Size, emit_expression, emit_float, is_one, same_shape, same_size

DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.int16: ir.DataType.INT16,
    torch.uint16: ir.DataType.UINT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Operand:
    """A tensor argument of a row: its ONNX value, its form, and its contents where they are known now."""

    value: ir.Value
    form: torch.Tensor
    contents: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.form.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(self.form.shape)

    @property
    def rank(self) -> int:
        return self.form.ndim

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point


Input = Operand | ir.Value | None
# A Python number, or one that is known only at run time.
Number: TypeAlias = int | float | bool | torch.SymInt | torch.SymFloat


class Emitter:
    """Writes ONNX nodes for one program. Rows get it as their first argument `g`."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.initializers: dict[ir.Value, None] = {}
        self.size_cache: dict[str, ir.Value] = {}
        self.symbols: dict[str, tuple[ir.Value, int]] = {}
        self.node: fx.Node | None = None
        self._names: set[str] = set()
        self._node_names: set[str] = set()
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._transposed: dict[ir.Value, ir.Value] = {}
        self._metadata: dict[str, str] = {}
        self._layer = ""

    # -- the fx node being lowered ------------------------------------------------------------------------------

    def begin(self, node: fx.Node) -> None:
        """From now on, what is written belongs to `node`."""
        self.node = node
        self._layer = layer_name(node)
        source = source_of(node)
        self._metadata = {NODE: node.name} | ({"fxpress.source": source} if source else {})
        if share := (node.meta.get("custom") or {}).get(WORK):
            self._metadata[SHARE] = repr(share)

    @property
    def result(self) -> torch.Tensor:
        """The form of the fx node's tensor result."""
        assert self.node is not None
        return self.node.meta["val"]

    @property
    def results(self) -> list[torch.Tensor]:
        """The forms of the fx node's several tensor results."""
        assert self.node is not None
        return list(self.node.meta["val"])

    def reject(self, reason: str, hint: str = "change this line of the model, or teach the row") -> LoweringError:
        """The error that a row raises for what it does not handle."""
        assert self.node is not None
        return LoweringError(f"{self.node.target}: {reason}", where=source_of(self.node), hint=hint)

    def unique(self, name: str) -> str:
        """A value name: `name`, or `name_1`, ... if it is taken."""
        return _take(name, self._names)

    # -- nodes --------------------------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: Input, **attributes: Any) -> ir.Value:
        """Write a node with one output."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(
        self, op_type: str, outputs: int, *inputs: Input, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Write a node with several outputs. Attributes that are None are left out; an empty `domain` is ONNX's."""
        stem = self.node.name if self.node is not None else op_type.lower()
        values = [ir.Value(name=self.unique(f"{stem}.{op_type}")) for _ in range(outputs)]
        operands = [i.value if isinstance(i, Operand) else i for i in inputs]
        while operands and operands[-1] is None:
            operands.pop()
        for name, value in attributes.items():
            if any(isinstance(v, torch.SymInt) for v in (value if isinstance(value, (list, tuple)) else [value])):
                raise self.reject(
                    f"{name} of {op_type} depends on the size of an input, and ONNX has it as a constant",
                    hint="capture with dynamic_batch=False, which fixes the sizes",
                )
        self.nodes.append(
            ir.Node(
                domain,
                op_type,
                operands,
                [_attribute(k, v) for k, v in attributes.items() if v is not None],
                outputs=values,
                name=_take(self._layer or op_type, self._node_names),
                metadata_props=dict(self._metadata),
            )
        )
        return values

    # -- constants ----------------------------------------------------------------------------------------------

    def initializer(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A named initializer over the tensor's own memory."""
        name = self.unique(name)
        onnx_type(tensor.dtype)  # raises for a dtype without lowering
        value = ir.Value(name=name, const_value=_wrap(tensor, name))
        self.initializers[value] = None
        return value

    def constant(self, tensor: torch.Tensor) -> ir.Value:
        """An initializer for a small tensor, shared between equal ones."""
        key = (tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer("constant", tensor)
        return self._constants[key]

    def scalar(self, number: int | float | bool, dtype: torch.dtype) -> ir.Value:
        """A constant of shape []."""
        return self.constant(torch.tensor(number, dtype=dtype))

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """A one-dimensional int64 constant."""
        return self.constant(torch.tensor(list(numbers), dtype=torch.int64))

    def transposed(self, x: Operand) -> ir.Value:
        """A matrix with its axes swapped, done now when its contents are known."""
        if x.contents is None:
            return self.op("Transpose", x, perm=[1, 0])
        if x.value not in self._transposed:
            self._transposed[x.value] = self.initializer(f"{x.value.name}.T", x.contents.t())
        return self._transposed[x.value]

    # -- sizes and shapes ---------------------------------------------------------------------------------------

    def symbol(self, name: str) -> ir.Value:
        """The size that a symbol stands for, read from the input that has it."""
        if name not in self.symbols:
            raise self.reject(
                f"the size {name} depends on data", hint="such sizes cannot be lowered; give the tensor a fixed size"
            )
        value, axis = self.symbols[name]
        return self.op("Shape", value, start=axis, end=axis + 1)

    def size(self, size: Size) -> ir.Value:
        """A size as an int64 tensor of shape [1]."""
        return self.ints([size]) if isinstance(size, int) else emit_expression(self, size.node.expr)

    def sizes(self, shape: Sequence[Size]) -> ir.Value:
        """Sizes as a one-dimensional int64 tensor."""
        if all(isinstance(s, int) for s in shape):
            return self.ints([int(s) for s in shape])
        parts = [self.size(s) for s in shape]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, value: Input, before: Sequence[Size], after: Sequence[Size]) -> ir.Value:
        """Reshape, with 0 and -1 where they say a symbolic size, so that no Shape node is needed."""
        if same_shape(tuple(before), tuple(after)):
            return self.value(value)
        if any(isinstance(s, int) and s == 0 for s in after):
            return self.op("Reshape", value, self.sizes(after), allowzero=1)
        kept = [not isinstance(s, int) and i < len(before) and same_size(s, before[i]) for i, s in enumerate(after)]
        inferred = [i for i, s in enumerate(after) if not isinstance(s, int) and not kept[i]]
        if len(inferred) > 1:
            return self.op("Reshape", value, self.sizes(after))
        literal = [0 if keep else s if isinstance(s, int) else -1 for s, keep in zip(after, kept)]
        return self.op("Reshape", value, self.ints(literal))

    def expand(self, value: Input, before: Sequence[Size], after: Sequence[Size]) -> ir.Value:
        """Expand; a size that stays is written as 1, which keeps it."""
        padded = [1] * (len(after) - len(before)) + list(before)
        if same_shape(tuple(before), tuple(after)):
            return self.value(value)
        target: list[Size] = [1 if same_size(a, b) else b for a, b in zip(padded, after)]
        return self.op("Expand", value, self.sizes(target))

    def squeeze_last(self, value: ir.Value) -> ir.Value:
        """A tensor of shape [1] as a scalar."""
        return self.op("Squeeze", value, self.ints([0]))

    # -- operands -----------------------------------------------------------------------------------------------

    def value(self, x: Input) -> ir.Value:
        """The ONNX value behind an operand."""
        value = x.value if isinstance(x, Operand) else x
        assert value is not None
        return value

    def number(self, number: Number, dtype: torch.dtype) -> ir.Value:
        """A number as a scalar tensor of `dtype`, also when it is known only at run time."""
        if isinstance(number, torch.SymInt):
            scalar = self.squeeze_last(self.size(number))
            return scalar if dtype == torch.int64 else self.cast_value(scalar, dtype)
        if isinstance(number, torch.SymFloat):
            return self.cast_value(self.squeeze_last(emit_float(self, number.node.expr)), dtype)
        return self.scalar(number, dtype)

    def cast_value(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        return self.op("Cast", value, to=onnx_type(dtype).value)

    def cast(self, x: Operand, dtype: torch.dtype) -> ir.Value:
        """The operand in `dtype`; no node when it has it already."""
        return x.value if x.dtype == dtype else self.cast_value(x.value, dtype)

    def typed(self, x: Operand | Number, dtype: torch.dtype) -> ir.Value:
        """An operand or a number as a tensor of `dtype`."""
        return self.cast(x, dtype) if isinstance(x, Operand) else self.number(x, dtype)

    def filled(self, number: Number, dtype: torch.dtype, shape: Sequence[Size]) -> ir.Value:
        """A tensor of one repeated number."""
        return self.op("Expand", self.number(number, dtype), self.sizes(shape)) if shape else self.number(number, dtype)


def _attribute(name: str, value: Any) -> ir.Attr:
    """An ONNX attribute from a Python value. (onnx-ir's own conversion tries every protocol it knows: far slower.)"""
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, int):
        return ir.AttrInt64(name, int(value))
    return ir.AttrStrings(name, value) if isinstance(value[0], str) else ir.AttrInt64s(name, value)


def _take(name: str, taken: set[str]) -> str:
    """`name`, or `name_1`, ... : the first that is not taken; it is taken then."""
    candidate, i = name, 0
    while candidate in taken:
        i += 1
        candidate = f"{name}_{i}"
    taken.add(candidate)
    return candidate


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of a torch dtype. Raises `LoweringError` where there is none."""
    if dtype not in DTYPES:
        raise LoweringError(f"dtype {dtype} has no lowering", hint=f"use one of {', '.join(map(str, DTYPES))}")
    return DTYPES[dtype]


def spread(numbers: int | Sequence[int], count: int) -> list[int]:
    """A per-dimension argument that may be given once for all dimensions."""
    if isinstance(numbers, int):
        return [numbers] * count
    return list(numbers) * count if len(numbers) == 1 else list(numbers)


def positive(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis % max(rank, 1)


def is_broadcast_one(shape: Sequence[Size]) -> bool:
    """Is every size 1, so that the tensor broadcasts as a scalar would?"""
    return all(is_one(s) for s in shape)


def _wrap(tensor: torch.Tensor, name: str) -> ir.TensorProtocol:
    """An onnx-ir tensor over torch's memory. numpy has no bfloat16, so that goes through the adapter."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor_adapters.TorchTensor(tensor.contiguous(), name=name)
    return ir.Tensor(tensor.cpu().numpy(), name=name)
