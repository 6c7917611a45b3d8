"""The oracle of pruning: the original program with the removed positions zeroed wherever they are summed over.

A pruned program is right exactly when it agrees with this one. Nothing here is shared with `slicing`: sizes, literals
and weights stay as they are, and each operand that a node contracts is multiplied by a mask of zeros and ones. Norms
are the one exception: their mean and variance are those of the kept positions, where zeros would count as values.
"""

from __future__ import annotations

import torch

from ...errors import VerificationError
from ...frontend.program import Program
from ..rewrite import argument, aten, call_before, put_constant, set_argument
from ..verify import in_double, refresh_values, relative_difference
from .analysis import Contraction
from .neutral import neutralize
from .slicing import Cut


def mask_program(cut: Cut) -> int:
    """Insert the masks into the program of the cut's analysis, in place. Returns how many were needed."""
    analysis = cut.analysis
    masks = [(c, cut.mask(analysis.contracted(c))) for c in analysis.contractions]
    needed = [(place, mask) for place, mask in masks if not mask.all()]
    for place, mask in needed:
        _mask_operand(analysis.program, place, torch.from_numpy(mask))
    count = len(needed) + neutralize(cut)
    analysis.program.graph.lint()
    analysis.program.graph_module.recompile()
    refresh_values(analysis.program, "the oracle of pruning")
    return count


def _mask_operand(program: Program, place: Contraction, mask: torch.Tensor) -> None:
    node, operand = place.node, place.operand
    value = operand.meta["val"]
    shape = [1] * value.ndim
    shape[place.dim] = -1
    constant = put_constant(program, f"{node.name}_keep", mask.to(value.dtype).reshape(shape), node)
    masked = call_before(node, aten.mul.Tensor, operand, constant, value=value)
    given = argument(node, place.argument)
    if place.position is not None:
        given = [masked if i == place.position else item for i, item in enumerate(given)]
    set_argument(node, place.argument, masked if place.position is None else given)


def oracle_error(
    masked: Program, pruned: Program, inputs: tuple[torch.Tensor, ...] | None = None, seed: int = 0
) -> float:
    """The relative difference of both programs' outputs in float64, on normal random inputs of the example's shapes.

    Neither argument is changed. Raises VerificationError when an output of the masked program is constant, which would
    make any agreement empty.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = inputs or tuple(_random_like(x, generator) for x in masked.example_inputs)
    expected, got = (in_double(p).eval().run_flat(leaves) for p in (masked, pruned))
    for tensor in expected:
        if tensor.is_floating_point() and tensor.numel() > 1 and not tensor.std() > 0:
            raise VerificationError(
                "an output of the model is constant, so that pruning cannot be verified on it",
                hint="verify with trained weights",
            )
    return max((relative_difference(a, b) for a, b in zip(got, expected)), default=0.0)


def _random_like(leaf: object, generator: torch.Generator) -> object:
    if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    return leaf
