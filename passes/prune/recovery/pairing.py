"""A pruned program beside the program that it was pruned from: which values correspond.

Pruning keeps the names of nodes, so a node of the pruned program is compared with the node of the same name, cut to the
positions that the plan keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import fx

from ....errors import PruningError
from ....frontend.program import Program, get_attribute
from ..analysis import Analysis, shape_of
from ..axes import Axes
from ..plan import PruningPlan
from ..slicing import Cut

Positions = Mapping[int, torch.Tensor]  # dimension -> indices

_HINT = "give the program that the plan was applied to as reference, and plan.apply(reference) as the pruned program"


@dataclass(frozen=True)
class Pair:
    """Both programs and the plan that leads from one to the other. Make it with `pair_programs`."""

    pruned: Program
    reference: Program
    plan: PruningPlan
    cut: Cut

    @property
    def analysis(self) -> Analysis:
        return self.cut.analysis

    @cached_property
    def _reference_nodes(self) -> dict[str, fx.Node]:
        return {n.name: n for n in self.reference.graph.nodes}

    @cached_property
    def _axes(self) -> dict[str, Axes]:
        return {n.name: v for n, v in self.analysis.values.items() if isinstance(v, tuple)}

    def counterpart(self, node: fx.Node) -> fx.Node | None:
        """The node of the reference whose kept positions `node` should give; None where there is none."""
        found, axes = self._reference_nodes.get(node.name), self._axes.get(node.name)
        if found is None or axes is None or found.target != node.target:
            return None
        return found if self.cut.sizes(axes) == shape_of(node) else None

    def kept(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """The part of a value of the reference that the pruned program has too."""
        return select(value, self.positions(node))

    def positions(self, node: fx.Node) -> Positions:
        """Which positions of the reference's value are kept, along each dimension that was cut."""
        axes = enumerate(self._axes[node.name])
        return {d: torch.from_numpy(np.flatnonzero(self.cut.mask(v))) for d, v in axes if self.cut.changed(v)}

    @cached_property
    def affected(self) -> set[fx.Node]:
        """The nodes of the pruned program that may differ from what they were: all that lies behind a loss."""
        losses = self._losses()
        found: set[fx.Node] = set()
        for node in self.pruned.graph.nodes:
            if node.name in losses or self._is_new(node) or any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _losses(self) -> set[str]:
        """Names of nodes at which something is lost: a sum over removed positions, a weight with new zeros."""
        analysis = self.analysis
        changed = {p.node.name for p in analysis.contractions if self.cut.changed(analysis.contracted(p))}
        changed |= {s.node.name for s in analysis.statistics if any(self.cut.changed(s.axes[d]) for d in s.dims)}
        masked = {m.name for m in self.plan.masks}
        return changed | {n.name for n in self.pruned.graph.nodes if n.op == "get_attr" and n.target in masked}

    def _is_new(self, node: fx.Node) -> bool:
        """Not in the reference, or reading something else there."""
        known = self._reference_nodes.get(node.name)
        names = [n.name for n in node.all_input_nodes]
        return known is None or [n.name for n in known.all_input_nodes] != names


def select(value: torch.Tensor, positions: Positions) -> torch.Tensor:
    """The part of a value at these positions."""
    for dim, index in positions.items():
        value = value.index_select(dim, index.to(value.device))
    return value


def pair_programs(pruned: Program, reference: Program, plan: PruningPlan) -> Pair:
    """Check that `pruned` is what `plan` makes of `reference` (weights may differ). Raises PruningError."""
    cut = plan.cut(reference)
    for name, parameter in pruned.named_parameters():
        axes = cut.analysis.tensors.get(name)
        if axes is None:
            raise PruningError(f"the pruned program has a parameter {name} that the reference lacks", hint=_HINT)
        if cut.sizes(axes) != tuple(parameter.shape):
            raise PruningError(
                f"{name} has shape {tuple(parameter.shape)} in the pruned program where the plan leaves "
                f"{cut.sizes(axes)}",
                hint=_HINT,
            )
    if pruned.inputs != reference.inputs:
        raise PruningError("the pruned program and the reference have different inputs", hint=_HINT)
    return Pair(pruned, reference, plan, cut)


def shared_weights(program: Program) -> set[str]:
    """Names of parameters that several nodes read, or that are known under several names."""
    readers: dict[int, int] = {}
    names: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            key = id(get_attribute(program.graph_module, str(node.target)))
            readers[key] = readers.get(key, 0) + len(node.users)
            names.setdefault(key, []).append(str(node.target))
    return {name for key, count in readers.items() if count > 1 for name in names[key]}
