"""Linear layers and matrix products.

ONNX Runtime has an integer kernel for Gemm on matrices, and none for a three-dimensional MatMul with an Add after it
(runtime-facts.md). So a linear layer on a matrix is Gemm; on more dimensions it is MatMul + Add with float weights, and
Gemm between two reshapes with quantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx_ir import Value

from .emit import Emitter, Number, Operand, is_broadcast_one
from .float_layers import float_input
from .sizes import Size
from .table import row


@row("aten.linear.default")
def linear(g: Emitter, x: Operand, weight: Operand, bias: Operand | None) -> Value:
    """Gemm for matrices, MatMul + Add for more dimensions."""
    if weight.rank == 1:
        product = g.op("MatMul", x, weight)
        return product if bias is None else g.op("Add", product, bias)
    if x.rank == 2:
        return g.op("Gemm", float_input(g, x, weight), weight, bias, transB=1)
    if x.rank > 2 and weight.contents is None:
        return _flat_gemm(g, x, weight, bias)
    product = g.op("MatMul", x, g.transposed(weight))
    return product if bias is None else g.op("Add", product, bias)


def _flat_gemm(g: Emitter, x: Operand, weight: Operand, bias: Operand | None) -> Value:
    """All leading dimensions as rows."""
    rows = g.op("Reshape", x, g.ints([-1, int(x.shape[-1])]))
    product = g.op("Gemm", rows, weight, bias, transB=1)
    if any(not isinstance(s, int) for s in g.result.shape[1:-1]):
        return g.op("Reshape", product, g.sizes(g.result.shape))
    middle = [int(s) for s in g.result.shape[1:]]
    return g.op("Reshape", product, g.ints([-1, *middle]))


@row("aten.addmm.default")
def addmm(g: Emitter, x: Operand, mat1: Operand, mat2: Operand, beta: Number, alpha: Number) -> Value:
    """beta * x + alpha * mat1 @ mat2."""
    if mat1.is_float and isinstance(beta, (int, float)) and isinstance(alpha, (int, float)):
        return g.op("Gemm", float_input(g, mat1, mat2), mat2, x, alpha=float(alpha), beta=float(beta))
    product = g.op("Mul", g.op("MatMul", mat1, mat2), g.number(alpha, mat1.dtype))
    return g.op("Add", g.op("Mul", x, g.number(beta, x.dtype)), product)


@row("aten.baddbmm.default")
def baddbmm(g: Emitter, x: Operand, batch1: Operand, batch2: Operand, beta: Number, alpha: Number) -> Value:
    """beta * x + alpha * batch1 @ batch2; beta 0 ignores x, NaN and all."""
    product = _scaled(g, g.op("MatMul", batch1, batch2), alpha, batch1.dtype)
    if isinstance(beta, (int, float)) and beta == 0:
        return product
    return g.op("Add", _scaled(g, x.value, beta, x.dtype), product)


def _scaled(g: Emitter, value: Value, number: Number, dtype: torch.dtype) -> Value:
    if isinstance(number, (int, float)) and number == 1:
        return value
    return g.op("Mul", value, g.number(number, dtype))


@row("aten.matmul.default", "aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default")
def matmul(g: Emitter, x: Operand, other: Operand | None = None, mat2: Operand | None = None,
           vec: Operand | None = None, tensor: Operand | None = None) -> Value:  # fmt: skip
    """MatMul; the second factor has another name in each schema."""
    (second,) = [o for o in (other, mat2, vec, tensor) if o is not None]
    return g.op("MatMul", x, second)


@row("aten.einsum.default")
def einsum(g: Emitter, equation: str, tensors: Sequence[Operand], path: Sequence[int] | None) -> Value:
    """Einsum. `path` only says in which order to contract."""
    return g.op("Einsum", *tensors, equation=equation.replace(" ", ""))


@row("aten.outer.default")
def outer(g: Emitter, x: Operand, vec2: Operand) -> Value:
    column = g.op("Unsqueeze", g.cast(x, g.result.dtype), g.ints([1]))
    return g.op("Mul", column, g.cast(vec2, g.result.dtype))


@row("aten.embedding.default")
def embedding(
    g: Emitter, weight: Operand, indices: Operand, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
) -> Value:
    """Gather of rows. The last three arguments only concern gradients."""
    return g.op("Gather", weight, indices, axis=0)


@row("aten.bilinear.default")
def bilinear(g: Emitter, input1: Operand, input2: Operand, weight: Operand, bias: Operand | None) -> Value:
    """y[o] = x1 @ W[o] @ x2."""
    product = g.op("Einsum", input1, weight, input2, equation="...i,oij,...j->...o")
    return product if bias is None else g.op("Add", product, bias)


@row("aten.cosine_similarity.default")
def cosine_similarity(g: Emitter, x1: Operand, x2: Operand, dim: int, eps: float) -> Value:
    """x1 . x2 / (max(|x1|, eps) * max(|x2|, eps))."""
    axes = g.ints([dim])
    dot = g.op("ReduceSum", g.op("Mul", x1, x2), axes, keepdims=0)
    floor = g.scalar(eps, x1.dtype)
    norms = [g.op("Max", g.op("ReduceL2", x, axes, keepdims=0), floor) for x in (x1, x2)]
    return g.op("Div", dot, g.op("Mul", *norms))


def broadcast_shapes(*shapes: Sequence[Size]) -> list[Size]:
    """The shape that tensors broadcast to; symbolic sizes win over 1."""
    rank = max(map(len, shapes))
    result: list[Size] = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if not is_broadcast_one([size]):
                result[i] = size
    return result
