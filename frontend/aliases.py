"""ATen keeps several names for some ops (`multiply` is `mul`). After this, a graph has one name for each.

So every rule, cost and lowering row is written once, for the name that most models use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# fmt: off
NAMES = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh", "arctan": "atan",
    "arctan2": "atan2", "arctanh": "atanh", "clip": "clamp", "concat": "cat", "concatenate": "cat", "divide": "div",
    "fix": "trunc", "ger": "outer", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "linalg_matmul": "matmul", "moveaxis": "movedim", "multiply": "mul", "negative": "neg", "not_equal": "ne",
    "special_erf": "erf", "special_exp2": "exp2", "special_expit": "sigmoid", "special_expm1": "expm1",
    "special_log1p": "log1p", "special_logsumexp": "logsumexp", "subtract": "sub", "true_divide": "div",
}
# fmt: on
_OVERLOADS = {
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.special_log_softmax.default: aten.log_softmax.int,
    aten.special_softmax.default: aten.softmax.int,
}


def use_canonical_names(graph_module: fx.GraphModule) -> None:
    """Replace alias ops, in-place ones too, by the ops that they stand for. Arguments are the same."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            node.target = canonical(node.target)


def canonical(op: Any) -> Any:
    """The overload that `op` is another name for, or `op` itself."""
    namespace, _, name = op._schema.name.partition("::")
    if op in _OVERLOADS:
        return _OVERLOADS[op]
    stem, inplace = (name[:-1], "_") if name.endswith("_") and not name.endswith("__") else (name, "")
    if namespace != "aten" or stem not in NAMES:
        return op
    return getattr(getattr(aten, NAMES[stem] + inplace), op._overloadname, op)
