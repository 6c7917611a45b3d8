"""Muon for networks whose weights are not all matrices: layers by Muon, everything else by AdamW.

    B <- mu B + (1 - mu) G,   W <- W - rate * 0.2 sqrt(max(rows, columns)) * orthogonal(G + mu (B - G))

A convolution's weight [out, in, ...] is read as the matrix [out, in * ...]. What is no matrix (norms, biases), reads
one channel at a time (depthwise filters) or is a lookup table has no directions to make orthogonal: AdamW moves it.
Orthogonal steps move all directions of a layer alike, where Adam's follow the few that dominate: a pruned ResNet-20
came as close to its reference in half as many epochs (docs/results.md). Jordan et al. 2024 ("Muon: an optimizer for
hidden layers in neural networks"); the factor is that of Liu et al. 2025 ("Muon is scalable for LLM training", arXiv
2502.16982) and makes a step as long as one of AdamW, so that learning rates carry over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim._muon import muon
from torch.optim.adamw import adamw

from ....frontend.program import Program
from ...rewrite import aten, find

_LEAST_COLUMNS = 2  # of a weight [out, in, ...]: a depthwise filter reads one channel


class Muon(torch.optim.Optimizer):
    """Torch's Muon for weights that are matrices, torch's AdamW for the rest, under one learning rate.

    `parameters`: tensors, or groups as torch.optim takes them; a group with `matrices=False` is left to AdamW whole.
    `weight_decay` is decoupled; a group may have its own.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        learning_rate: float = 5e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": learning_rate, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(_split(parameters), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step with the gradients that the parameters hold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if moving:
                (self._matrices if group["matrices"] else self._others)(moving, group)
        return loss

    def _matrices(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        buffers = [self._kept(w, "momentum_buffer") for w in weights]
        muon(
            [w.view(len(w), -1) for w in weights],
            [w.grad.reshape(len(w), -1) for w in weights],  # type: ignore[union-attr]
            [b.view(len(b), -1) for b in buffers],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=True,
            ns_coefficients=(3.4445, -4.7750, 2.0315),  # torch's own
            ns_steps=5,
            eps=1e-7,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )

    def _others(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        for weight in weights:
            self.state[weight].setdefault("step", torch.tensor(0.0))
        adamw(
            weights,
            [w.grad for w in weights],  # type: ignore[misc]
            [self._kept(w, "exp_avg") for w in weights],
            [self._kept(w, "exp_avg_sq") for w in weights],
            [],
            [self.state[w]["step"] for w in weights],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )

    def _kept(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor of the optimizer's state like `weight`, zeros at first."""
        state = self.state[weight]
        if name not in state:
            state[name] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        return state[name]


def _split(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of matrices and groups of the rest, with the options of the group that they come from."""
    given = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    found = []
    for group in groups:
        may_be = group.get("matrices", True)
        for matrices in (True, False):
            chosen = [w for w in group["params"] if (may_be and is_matrix(w)) is matrices]
            if chosen:
                found.append({**group, "params": chosen, "matrices": matrices})
    return found


def is_matrix(weight: torch.Tensor) -> bool:
    """Is it the weight of a layer that mixes channels, so that Muon can move it?"""
    return weight.ndim >= 2 and weight.shape[1] >= _LEAST_COLUMNS and len(weight) > 1 and weight.is_contiguous()


def lookup_tables(program: Program) -> set[str]:
    """Names of the parameters that embeddings read, one row at a time: no matrices that anything is multiplied by."""
    readers = find(program, aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx)
    return {str(n.args[0].target) for n in readers if getattr(n.args[0], "op", "") == "get_attr"}  # type: ignore[union-attr]
