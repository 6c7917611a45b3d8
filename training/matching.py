"""Which values a pruned or quantized student has in common with the program that it was made from.

Pruning, fusion and quantization keep the names of nodes, and a plan knows which positions it kept, so a student of the
teacher's own kind needs no adapters: its sums of residual branches should be the teacher's, at these positions.
"""

from __future__ import annotations

import torch
from torch import fx

from ..errors import OptionError
from ..frontend.program import Program
from ..passes.prune.plan import PruningPlan
from ..passes.prune.recovery.pairing import Positions, pair_programs
from ..passes.prune.recovery.refine import matched_nodes, sums_or_outputs
from .distill_terms import Matched


def matched_values(student: Program, teacher: Program, plan: PruningPlan | None, weight: float = 1.0) -> Matched:
    """What `student` can match of `teacher`. `plan` leads from the teacher to the student; None for one as wide.

    Raises OptionError where they have no such value in common.
    """
    positions = _unpruned(teacher) if plan is None else _pruned(teacher, plan)
    outputs = {n.name for n in student.output_nodes()}
    nodes = {n.name: n for n in student.graph.nodes if n.name not in outputs}
    theirs = {n.name: n for n in teacher.graph.nodes}
    names = [n for n, kept in positions.items() if n in nodes and _fits(nodes[n], theirs[n], kept)]
    if not names:
        raise OptionError(
            "match has no effect: the program has no layer's value in common with its teacher",
            hint="name modules to match with features=, or learn from the scores with soft=",
        )
    return Matched(tuple((n, n) for n in names), {n: positions[n] for n in names}, weight)


def _pruned(teacher: Program, plan: PruningPlan) -> dict[str, Positions]:
    """Names of the nodes that `plan` lets be matched, and what it keeps there."""
    pair = pair_programs(plan.apply(teacher), teacher, plan)
    return {n.name: pair.positions(n) for n in matched_nodes(pair) if pair.counterpart(n) is not None}


def _unpruned(teacher: Program) -> dict[str, Positions]:
    return {n.name: {} for n in sums_or_outputs(teacher, lambda n: True, lambda n: True)}


def _fits(mine: fx.Node, theirs: fx.Node, kept: Positions) -> bool:
    """Is the student's value as large as the kept part of the teacher's?"""
    a, b = mine.meta.get("val"), theirs.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not a.is_floating_point():
        return False
    sizes = [len(kept[d]) if d in kept else s for d, s in enumerate(b.shape)]
    both = list(zip(a.shape, sizes))
    return a.ndim == b.ndim and all(x == y for x, y in both if isinstance(x, int) and isinstance(y, int))
