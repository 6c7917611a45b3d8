"""Which values a pruned or quantized student has in common with the program that it was made from.

Pruning, fusion and quantization keep the names of nodes, and a plan knows which positions it kept, so a student of the
teacher's own kind needs no adapters: its sums of residual branches should be the teacher's at these positions, or what
its activation functions give, where it has no such sums. (The value of a layer is no such thing: fusion puts the
BatchNorm behind it into it.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ..frontend.cost import op_name
from ..frontend.program import Program
from ..passes.prune.plan import PruningPlan
from ..passes.prune.recovery.pairing import Pair, Positions, pair_programs
from ..passes.prune.recovery.refine import farthest
from .distill_terms import Matched

_ACTIVATIONS = frozenset(
    f"aten.{name}"
    for name in (
        "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh",
        "hardsigmoid", "sigmoid", "tanh", "softplus", "clamp", "glu",
    )
)  # fmt: skip


def matched_values(student: Program, teacher: Program, plan: PruningPlan | None, weight: float = 1.0) -> Matched:
    """What `student` can match of `teacher`: the scores in any case, and the nodes that both have.

    `plan` leads from the teacher to the student; None for a student as wide as the teacher.
    """
    pair = None if plan is None else pair_programs(plan.apply(teacher), teacher, plan)
    outputs = {n.name for n in student.output_nodes()}
    mine = {n.name: n for n in student.graph.nodes if n.name not in outputs}
    pruned = {} if pair is None else {n.name: n for n in pair.pruned.graph.nodes}
    for nodes in (_sums(teacher), _activations(teacher)):
        kept = {n.name: k for n in nodes if n.name in mine and (k := _positions(n.name, pair, pruned)) is not None}
        common = [n for n in nodes if n.name in kept and _fits(mine[n.name], n, kept[n.name])]
        if common:
            names = [n.name for n in common]
            return Matched(tuple((n, n) for n in names), {n: kept[n] for n in names}, weight)
    return Matched((), {}, weight)


def _sums(program: Program) -> list[fx.Node]:
    """The sums of branches that end in a linear layer, in graph order."""
    sums = {t.node for t in farthest(program, lambda n: True, lambda n: True) if t.joining}
    return [n for n in program.graph.nodes if n in sums]


def _activations(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if op_name(n) in _ACTIVATIONS]


def _positions(name: str, pair: Pair | None, pruned: Mapping[str, fx.Node]) -> Positions | None:
    """What the teacher's node of that name keeps; None where the plan cannot say."""
    if pair is None:
        return {}
    node = pruned.get(name)
    return None if node is None or pair.counterpart(node) is None else pair.positions(node)


def _fits(mine: fx.Node, theirs: fx.Node, kept: Positions) -> bool:
    """Is the student's value as large as the kept part of the teacher's?"""
    a, b = mine.meta.get("val"), theirs.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not a.is_floating_point():
        return False
    sizes = [len(kept[d]) if d in kept else s for d, s in enumerate(b.shape)]
    both = list(zip(a.shape, sizes))
    return a.ndim == b.ndim and all(x == y for x, y in both if isinstance(x, int) and isinstance(y, int))
