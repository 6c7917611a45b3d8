"""Single weights that become zero: a bit mask for each parameter, its use on a program, and its choice by magnitude.

    unstructured   |w| below a threshold goes (Han et al. 2015, "Learning both Weights and Connections")
    n:m            of every m weights along the input dimension the n largest stay (Mishra et al. 2021, "Accelerating
                   Sparse Deep Neural Networks")

Shapes stay. ONNX Runtime computes zeros like any other weight, so this makes files compressible, not networks faster.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ....errors import PruningError
from ....frontend.program import Program, get_attribute
from ...rewrite import aten, call_after, put_constant
from ..axes import Vector
from ..removals import Removal


@dataclass(frozen=True)
class SparseMask:
    """Which values of the parameter `name` of the original `shape` are kept: one bit each, row-major, packed."""

    name: str
    shape: tuple[int, ...]
    bits: bytes

    @staticmethod
    def of(name: str, kept: Vector) -> SparseMask:
        """From an array of bools of the parameter's shape."""
        return SparseMask(name, tuple(kept.shape), np.packbits(kept).tobytes())

    @property
    def kept(self) -> Vector:
        """An array of bools of the parameter's shape."""
        size = prod(self.shape)
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=size).astype(bool).reshape(self.shape)

    @property
    def zeros(self) -> int:
        """How many values become zero."""
        return int((~self.kept).sum())

    def encoded(self) -> dict[str, object]:
        """As JSON values; the bits as base64 of their zlib compression."""
        text = base64.b64encode(zlib.compress(self.bits, 9)).decode("ascii")
        return {"name": self.name, "shape": list(self.shape), "kept": text}

    @staticmethod
    def decoded(name: str, shape: list[int], kept: str) -> SparseMask:
        """From what `encoded` gave. Raises ValueError for anything else."""
        if not isinstance(name, str) or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"a sparse mask is malformed: {str(name)[:40]} {str(shape)[:40]}")
        expected = -(-prod(shape) // 8)
        reader = zlib.decompressobj()  # bounded: a file must not unpack to more than its shape says
        try:
            bits = reader.decompress(base64.b64decode(kept, validate=True), expected)
        except zlib.error as error:
            raise ValueError(f"the mask of {name} is damaged: {error}") from error
        if len(bits) != expected or reader.unconsumed_tail:
            raise ValueError(f"the mask of {name} does not have the size of its shape {shape}")
        return SparseMask(name, tuple(shape), bits)


# -- on a program -------------------------------------------------------------------------------------------------


def zero_weights(program: Program, masks: Iterable[SparseMask]) -> None:
    """Set what the masks do not keep to zero, in place. Raises PruningError where a mask does not fit."""
    for mask in masks:
        tensor = _fitting(program, mask)
        with torch.no_grad():
            tensor.masked_fill_(torch.from_numpy(~mask.kept).to(tensor.device), 0.0)


def mask_weights(program: Program, masks: Iterable[SparseMask]) -> None:
    """The oracle: leave the weights alone and multiply each by its mask where the graph reads it, in place."""
    for mask in masks:
        tensor = _fitting(program, mask)
        aliases = [
            n for n in program.graph.nodes if n.op == "get_attr" and _tensor_of(program, str(n.target)) is tensor
        ]
        for node in aliases:
            readers = list(node.users)
            factor = put_constant(program, f"{node.name}_kept", torch.from_numpy(mask.kept).to(tensor), node.next)
            product = call_after(factor, aten.mul.Tensor, node, factor, value=node.meta["val"])
            for reader in readers:
                reader.replace_input_with(node, product)
    program.graph.lint()
    program.graph_module.recompile()


def _tensor_of(program: Program, name: str) -> torch.Tensor | None:
    try:
        found = get_attribute(program.graph_module, name)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _fitting(program: Program, mask: SparseMask) -> torch.Tensor:
    tensor = _tensor_of(program, mask.name)
    if tensor is None or tuple(tensor.shape) != mask.shape or not tensor.is_floating_point():
        has = "has no such tensor" if tensor is None else f"has {tensor.dtype} of shape {tuple(tensor.shape)}"
        raise PruningError(
            f"the plan makes weights of {mask.name} (float, shape {mask.shape}) zero; this model {has}",
            hint="plans only fit the architecture (and the stage of the pipeline) that they were made for",
        )
    return tensor


# -- one after the other ------------------------------------------------------------------------------------------


def compose_masks(
    first: Iterable[SparseMask], removed: Iterable[Removal], later: Iterable[SparseMask], all_removed: Iterable[Removal]
) -> tuple[SparseMask, ...]:
    """Masks of the original shapes: those of `first` and those of `later`, which have the shapes that `removed` leaves.

    Values in positions that go as a whole (`all_removed`) count as kept. Raises PruningError where shapes do not fit.
    """
    result = {m.name: m.kept for m in first}
    dims = _by_name(removed)
    for mask in later:
        full = _expanded(mask, dims.get(mask.name, {}))
        known = result.get(mask.name, full)
        if known.shape != full.shape:
            raise PruningError(
                f"the plans do not follow one another: masks of shape {known.shape} and {full.shape} for {mask.name}",
                hint="make the later plan for plan.apply(program)",
            )
        result[mask.name] = known & full
    for name, gone in _by_name(all_removed).items():
        if name in result:
            result[name] = result[name] | ~_block(gone, result[name].shape)
    return tuple(SparseMask.of(name, kept) for name, kept in result.items() if not kept.all())


def _by_name(removals: Iterable[Removal]) -> dict[str, dict[int, Removal]]:
    result: dict[str, dict[int, Removal]] = {}
    for removal in removals:
        result.setdefault(removal.name, {})[removal.dim] = removal
    return result


def _expanded(mask: SparseMask, dims: dict[int, Removal]) -> Vector:
    """A mask of the smaller shape as one of the original shape, kept where positions are missing."""
    shape = tuple(dims[d].size if d in dims else n for d, n in enumerate(mask.shape))
    inside = _block(dims, shape)
    if inside.sum() != prod(mask.shape):
        raise PruningError(
            f"the plans do not follow one another: the mask of {mask.name} has shape {mask.shape}, which is not what "
            f"the first plan leaves of {shape}",
            hint="make the later plan for plan.apply(program)",
        )
    full = np.ones(shape, dtype=bool)
    full[inside] = mask.kept.ravel()
    return full


def _block(dims: dict[int, Removal], shape: tuple[int, ...]) -> Vector:
    """Which values of a tensor remain when these dimensions lose their positions."""
    remain = np.ones(shape, dtype=bool)
    for dim, removal in dims.items():
        remain &= removal.mask.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return remain
