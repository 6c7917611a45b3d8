"""`PruningPlan`: what goes from a model, in terms of the original model. Kept as JSON, replayed, merged.

A plan may hold three things: indices of parameter dimensions (`removals`), single weights that become zero (`masks`)
and residual blocks that are left out (`blocks`). The first and the last make a network faster, the second only its file
compressible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ...errors import OutputError, PruningError
from ...frontend.program import Program
from .kinds.blocks import Block, remove_blocks, silence_blocks
from .kinds.sparsify import SparseMask, compose_masks, mask_weights, zero_weights
from .masking import mask_program
from .removals import GroupSummary, Removal, compose_groups, compose_removals, kept_atoms, without_parameters
from .rules.table import analyze
from .slicing import Cut, slice_program

_FORMAT = "fxpress-pruning-plan"
_VERSION = 2
_READABLE = (1, 2)  # version 1 had neither masks nor blocks
_MACS_AGREE = 1e-3  # a later plan counts the MACs that the earlier one leaves, whole numbers per layer


@dataclass(frozen=True)
class PruningPlan:
    """The indices to remove, and the figures of the plan. `macs` and `parameters` are (before, after).

    A plan belongs to a model, not to its weights: `apply` works on any checkpoint of the same architecture.
    """

    removals: tuple[Removal, ...]
    groups: tuple[GroupSummary, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    request: str = ""
    notes: tuple[str, ...] = field(default=())
    masks: tuple[SparseMask, ...] = field(default=())
    blocks: tuple[Block, ...] = field(default=())

    @property
    def zeros(self) -> int:
        """How many single weights become zero (positions that are removed as a whole not counted)."""
        return sum(m.zeros for m in self.masks)

    @property
    def effects(self) -> tuple[str, ...]:
        """What each kind of pruning in the plan does to speed and size, honestly, in sentences."""
        return tuple(s for s in (_channel_effect(self), _block_effect(self), _weight_effect(self)) if s)

    def apply(self, program: Program) -> Program:
        """A new, smaller program. Raises PruningError where the plan does not fit `program`, which is not changed."""
        copy = program.copy()
        before = _names(copy)
        remove_blocks(copy, self.blocks)
        gone = before - _names(copy)
        zero_weights(copy, [m for m in self.masks if m.name not in gone])
        if self.removals:
            slice_program(self._fit(copy, gone))
        return copy

    def mask(self, program: Program) -> Program:
        """What `apply` must equal, a new program of the original sizes: removed positions are zeroed at every consumer,
        single weights where they are read, branches of removed blocks where they are added."""
        copy = program.copy()
        silence_blocks(copy, self.blocks)
        if self.removals:
            mask_program(_transferred(self.cut(program), copy, self.blocks))
        mask_weights(copy, self.masks)
        return copy

    def merge(self, later: PruningPlan) -> PruningPlan:
        """One plan that does the work of both, with indices of the original program.

        `later` was made for `self.apply(program)`, so that `self.merge(later).apply(program)` equals
        `later.apply(self.apply(program))`. Raises PruningError where the two do not follow one another.
        """
        left, found = self.macs[1], later.macs[0]
        if abs(left - found) > _MACS_AGREE * max(left, found):
            raise PruningError(
                f"the plans do not follow one another: the first leaves {left:,} MACs, the second expects {found:,}",
                hint="make the later plan for plan.apply(program)",
            )
        gone = {name for block in later.blocks for name in block.tensors}
        earlier = [r for r in self.removals if r.name not in gone]
        removals = compose_removals(earlier, later.removals)
        masks = [m for m in self.masks if m.name not in gone]
        return replace(
            self,
            removals=removals,
            groups=compose_groups(without_parameters(self.groups, gone), later.groups),
            macs=(self.macs[0], later.macs[1]),
            parameters=(self.parameters[0], later.parameters[1]),
            request="; then ".join(r for r in (self.request, later.request) if r),
            notes=tuple(dict.fromkeys((*self.notes, *later.notes))),
            masks=compose_masks(masks, earlier, later.masks, removals),
            blocks=(*self.blocks, *later.blocks),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Raises OutputError."""
        fields = {**asdict(replace(self, masks=())), "masks": [m.encoded() for m in self.masks]}
        data = {"format": _FORMAT, "version": _VERSION, **fields}
        try:
            Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {error.strerror}", hint="choose a path that you may write to"
            ) from error

    @staticmethod
    def load(path: str | Path) -> PruningPlan:
        """Read what `save` wrote. Raises PruningError for anything else."""
        try:
            return _from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PruningError(
                f"{path} is not a pruning plan: {type(error).__name__}: {error}",
                hint="give a file that PruningPlan.save wrote",
            ) from error

    def __repr__(self) -> str:
        head = f"PruningPlan({self.request}): MACs {_share(self.macs)}, parameters {_share(self.parameters)}"
        rows = [f"  {g.kept:>5} of {g.size:<5} {_shortened(g.places)}" for g in self.groups]
        table = [f"  kept of size   {len(self.groups)} groups", *rows] if rows else []
        notes = [f"  note: {n}" for n in self.notes]
        return "\n".join([head, *(f"  {e}" for e in self.effects), *table, *notes])

    def cut(self, program: Program) -> Cut:
        """Which positions of which tensors stay, by an analysis of a copy of `program` without the removed blocks: the
        sizes of layers around them may be independent then. Raises PruningError where the plan does not fit."""
        copy = program.copy()
        before = _names(copy)
        remove_blocks(copy, self.blocks)
        return self._fit(copy, before - _names(copy))

    def _fit(self, program: Program, gone: set[str]) -> Cut:
        analysis = analyze(program)
        return Cut(analysis, kept_atoms([r for r in self.removals if r.name not in gone], analysis))


def _names(program: Program) -> set[str]:
    """Every parameter and buffer that the graph reads."""
    return {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}


def _transferred(cut: Cut, program: Program, blocks: Iterable[Block]) -> Cut:
    """The same cut for `program`, which has all nodes of the analysed one, by name, and the blocks that it left out: a
    sum has the axes of its identity."""
    nodes = {n.name: n for n in program.graph.nodes}
    old = cut.analysis
    values = {nodes[n.name]: v for n, v in old.values.items()}
    identities = {b.node: b.identity for b in blocks}
    for node in program.graph.nodes:
        identity = node.args[identities[node.name]] if node.name in identities else None
        if identity in values:
            values[node] = values[identity]  # type: ignore[index]
    analysis = replace(
        old,
        program=program,
        values=values,
        contractions=[replace(c, node=nodes[c.node.name]) for c in old.contractions],
        statistics=[replace(s, node=nodes[s.node.name]) for s in old.statistics],
        work=[replace(w, node=nodes[w.node.name]) for w in old.work],
        maps={nodes[n.name]: m for n, m in old.maps.items()},
        factors={nodes[n.name]: v for n, v in old.factors.items()},
    )
    return Cut(analysis, cut.keep)


# -- text and JSON ------------------------------------------------------------------------------------------------


def _channel_effect(plan: PruningPlan) -> str:
    if not plan.removals:
        return ""
    return (
        f"channels: {len(plan.removals)} parameter dimensions are shorter; their MACs go, but a runtime only gets "
        "faster by as much where the new sizes suit its kernels (round_to, latency)"
    )


def _block_effect(plan: PruningPlan) -> str:
    if not plan.blocks:
        return ""
    names = _shortened(tuple(b.name for b in plan.blocks), 6)
    return f"blocks: {len(plan.blocks)} residual blocks are left out ({names}); their MACs and time go"


def _weight_effect(plan: PruningPlan) -> str:
    if not plan.masks:
        return ""
    count = sum(prod(m.shape) for m in plan.masks)
    return (
        f"weights: {plan.zeros:,} of {count:,} in {len(plan.masks)} parameters become zero; ONNX Runtime multiplies "
        "zeros like any other weight, so this makes nothing faster, only the file compress better"
    )


def _share(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} -> {pair[1]:,} ({pair[1] / max(pair[0], 1):.1%})"


def _shortened(names: tuple[str, ...], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f", and {len(names) - count} more" if len(names) > count else "")


def _from_json(data: dict[str, Any]) -> PruningPlan:
    if data["format"] != _FORMAT or data["version"] not in _READABLE:
        raise ValueError(f"format {data['format']!r} version {data['version']!r}; readable is {_FORMAT!r} {_READABLE}")
    return PruningPlan(
        removals=tuple(_removal(r) for r in data["removals"]),
        groups=tuple(GroupSummary(g["size"], g["kept"], tuple(g["places"])) for g in data["groups"]),
        macs=tuple(data["macs"]),
        parameters=tuple(data["parameters"]),
        request=str(data["request"]),
        notes=tuple(data["notes"]),
        masks=tuple(SparseMask.decoded(m["name"], m["shape"], m["kept"]) for m in data.get("masks", ())),
        blocks=tuple(_block(b) for b in data.get("blocks", ())),
    )


def _removal(data: dict[str, Any]) -> Removal:
    name, dim, size, removed = data["name"], data["dim"], data["size"], data["removed"]
    if not isinstance(name, str) or not all(isinstance(n, int) for n in (dim, size, *removed)):
        raise ValueError(f"a removal is malformed: {str(data)[:80]}")
    return Removal(name, dim, size, tuple(removed))


def _block(data: dict[str, Any]) -> Block:
    name, node, identity, tensors = data["name"], data["node"], data["identity"], data["tensors"]
    if not all(isinstance(n, str) for n in (name, node, *tensors)) or identity not in (0, 1):
        raise ValueError(f"a block is malformed: {str(data)[:80]}")
    return Block(name, node, identity, tuple(tensors))
