"""A BatchNorm that was fused into the layer before it, remembered so that it can be put back for training.

Fusing makes one layer of two, on which ranges are chosen and which is what runs in the end. Training wants the two: the
BatchNorm normalizes by the batch, and its statistics follow the weights. `keep_norm` leaves at the layer what fusing
takes away; `restore_norm` undoes the fusing in place, if the layer is still what fusing made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..frontend.program import Program, set_attribute
from .rewrite import argument, aten, call_after, constant, put_constant, set_argument

KEY = "kept_norm"
_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class KeptNorm:
    """The layer's own weight and bias, the norm's tensors with their names, its other arguments, and its source."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tensors: dict[str, tuple[str, torch.Tensor] | None]
    momentum: float
    eps: float
    meta: dict[str, Any]


def keep_norm(program: Program, layer: fx.Node, norm: fx.Node) -> None:
    """Remember at `layer` the BatchNorm that is about to be fused into it, and the layer's own weights."""
    weight, bias = constant(program, layer.args[1]), constant(program, argument(layer, "bias"))
    assert weight is not None
    layer.meta[KEY] = KeptNorm(
        _copy(weight),
        None if bias is None else _copy(bias),
        {name: _named(program, argument(norm, name)) for name in _TENSORS},
        float(argument(norm, "momentum")),
        float(argument(norm, "eps")),
        {k: v for k, v in norm.meta.items() if k in ("stack_trace", "nn_module_stack")},
    )


def _named(program: Program, node: fx.Node | None) -> tuple[str, torch.Tensor] | None:
    tensor = constant(program, node)
    return None if node is None or tensor is None else (str(node.target), _copy(tensor))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().clone()
    return torch.nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copied


def restore_norm(program: Program, layer: fx.Node) -> fx.Node | None:
    """Undo the fusing into `layer`: its own weights again, and the BatchNorm behind it, whose node is returned.

    None where nothing was kept, or where the layer's weights were changed since.
    """
    kept: KeptNorm | None = layer.meta.pop(KEY, None)
    if kept is None or not _is_as_fused(program, layer, kept):
        return None
    set_attribute(program.graph_module, str(layer.args[1].target), _copy(kept.weight))  # type: ignore[union-attr]
    if kept.bias is None:
        set_argument(layer, "bias", None)
    else:
        set_attribute(program.graph_module, str(argument(layer, "bias").target), _copy(kept.bias))
    readers = list(layer.users)
    operands = [_stored(program, layer, kept.tensors[name]) for name in _TENSORS]
    norm = call_after(layer, aten.batch_norm.default, layer, *operands, False, kept.momentum, kept.eps, True)
    norm.meta = {**norm.meta, **kept.meta}
    for reader in readers:
        reader.replace_input_with(layer, norm)
    return norm


def _stored(program: Program, layer: fx.Node, tensor: tuple[str, torch.Tensor] | None) -> fx.Node | None:
    return None if tensor is None else put_constant(program, tensor[0], _copy(tensor[1]), layer)


def _is_as_fused(program: Program, layer: fx.Node, kept: KeptNorm) -> bool:
    """Are the layer's weights those that fusing gives? (A pass in between may have changed them.)"""
    weight, bias = constant(program, layer.args[1]), constant(program, argument(layer, "bias"))
    scale, shift = _affine(kept)
    expected = kept.weight.detach().double() * scale.reshape(-1, *[1] * (kept.weight.ndim - 1))
    offset = shift if kept.bias is None else kept.bias.detach().double() * scale + shift
    return weight is not None and bias is not None and _close(weight, expected) and _close(bias, offset)


def _affine(kept: KeptNorm) -> tuple[torch.Tensor, torch.Tensor]:
    values = {name: pair[1].detach().double() for name, pair in kept.tensors.items() if pair is not None}
    scale = (values["running_var"] + kept.eps).rsqrt() * values.get("weight", torch.ones(()))
    return scale, values.get("bias", torch.zeros(())) - values["running_mean"] * scale


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((actual.detach().double() - expected).abs() <= 1e-5 * largest + 1e-12).all())
