"""Changes of layout between kernels, as part of a placement's costs.

Float convolutions and pools of ONNX Runtime work on blocks of channels, integer ones on channels last. What is between
them elementwise works in either layout: a float HardSwish between two integer convolutions needs no change of layout,
between an integer and a float one it needs one. So such an atom has a second decision beside its own, which layout it
works in, and a tensor between two atoms pays where the layouts differ. Ops that split or merge dimensions want the
plain layout, and always pay to leave the other two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from ..frontend.cost import op_name
from ..passes.prune.budgets.units import RENAMING
from ..passes.quantize.placement.minimum_cut import Atom, Tensor
from .conversions import Conversions

_BOUND = ("conv", "pool", "upsample_nearest")  # kernels with a layout of their own
_PLAIN = (*RENAMING, "aten.permute", "aten.transpose", "aten.t", "aten.pixel_shuffle")
_ALWAYS = float("inf")


def image(node: fx.Node) -> tuple[int, ...] | None:
    """The shape [N, C, H, W] of a value that has a layout, or None."""
    shape = tuple(getattr(node.meta.get("val"), "shape", ()))
    return shape if len(shape) == 4 and math.prod(shape[2:]) > 1 and node.op == "call_function" else None


def is_bound(node: fx.Node) -> bool:
    """Does the layout of a node follow from whether it is on integers?"""
    return any(part in op_name(node) for part in _BOUND)


def is_plain(node: fx.Node) -> bool:
    """Does a node want the plain layout, [N, C, H, W] as it is?"""
    name = op_name(node)
    return any(name == f"{p}" or name == f"aten.{p}" for p in _PLAIN)


@dataclass
class Layouts:
    """Adds to a problem, whose atoms are numbered from 0, the layout decisions of its free atoms."""

    atoms: list[Atom]
    conversions: Callable[[tuple[int, ...]], Conversions]
    tensors: list[Tensor] = field(default_factory=list)
    _free: dict[int, int] = field(default_factory=dict)

    def pass_on(self, node: fx.Node, producer: int, readers: Iterable[tuple[fx.Node, int]]) -> None:
        """A value goes from the atom `producer` to those of `readers`."""
        shape = image(node)
        if shape is None:
            return
        times = self.conversions(shape)
        ends = [(n, i) for n, i in readers if n.op == "call_function"]
        if is_plain(node):
            for reader, atom in ends:
                self._leave(atom, times.block if is_bound(reader) else 0.0)
            return
        if any(is_plain(reader) for reader, _ in ends):
            self._leave(producer, times.unblock)
        targets = {self._layout(reader, atom) for reader, atom in ends if not is_plain(reader)}
        source = self._layout(node, producer)
        if targets - {source}:
            self.tensors.append(
                Tensor(source, tuple(sorted(targets - {source})), times.from_blocks, times.to_blocks)
            )

    def _layout(self, node: fx.Node, atom: int) -> int:
        """The decision that says in which layout a node works."""
        if is_bound(node):
            return atom
        if atom not in self._free:
            self._free[atom] = len(self.atoms)
            name = f"{self.atoms[atom].name} layout"
            self.atoms.append(Atom(name, 0.0, 0.0))
            # What is on integers keeps channels last, too.
            self.tensors.append(Tensor(atom, (self._free[atom],), 0.0, _ALWAYS))
        return self._free[atom]

    def _leave(self, index: int, seconds: float) -> None:
        """A float atom next to a plain one pays whatever is decided; of an integer one it is timed with its part."""
        atom = self.atoms[index]
        floating = None if atom.floating is None else atom.floating + seconds
        self.atoms[index] = Atom(atom.name, floating, atom.integer)
