"""Float or integer for every op, so that the sum of their times and of the conversions between them is least.

The law. Each atom (ops that take one decision together) is in float or on integers; what is minimized is

      sum over atoms of its time in the form that was chosen
    + sum over tensors of `quantize`, where a float atom gives it and any of its readers is on integers
    + sum over tensors of `dequantize`, where an integer atom gives it and any of its readers is in float
    - sum over pairs of `saving`, where both of two neighbours are in float (the runtime computes them as one kernel)

A conversion is paid once for a tensor, however many read it. With two labels and no term that rewards disagreement
this is a minimum s-t cut (Kolmogorov and Zabih, "What energy functions can be minimized via graph cuts?", PAMI 2004),
so the placement that is returned is exactly the best *of these figures*: no search, no local optimum. Among placements
of equal cost the one with the fewest float atoms is taken.

What is approximate are the figures themselves: kernels are timed one by one, outside of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_PICO = 1e12  # capacities are whole picoseconds: with fractions a flow need not be exact
_SOURCE, _SINK = "integer", "float"


@dataclass(frozen=True)
class Atom:
    """Ops that take one decision. Seconds in either form; None for a form that it does not have."""

    name: str
    floating: float | None = 0.0
    integer: float | None = None


@dataclass(frozen=True)
class Tensor:
    """A value that passes between atoms (by index), and the seconds of its conversions."""

    producer: int
    readers: tuple[int, ...]
    quantize: float
    dequantize: float


@dataclass(frozen=True)
class Saving:
    """Two atoms (by index) that take `seconds` less than their sum when both are in float."""

    first: int
    second: int
    seconds: float


@dataclass(frozen=True)
class Problem:
    """Atoms, and what their decisions have to do with each other."""

    atoms: tuple[Atom, ...]
    tensors: tuple[Tensor, ...] = ()
    savings: tuple[Saving, ...] = ()

    def seconds(self, floats: Iterable[int]) -> float:
        """The time of a placement, given the indices of its float atoms; infinite for one that is not possible."""
        chosen = set(floats)
        total = 0.0
        for i, atom in enumerate(self.atoms):
            own = atom.floating if i in chosen else atom.integer
            total += float("inf") if own is None else own
        total += sum(_conversions(t, chosen) for t in self.tensors)
        return total - sum(s.seconds for s in self.savings if {s.first, s.second} <= chosen)

    def solve(self) -> frozenset[int]:
        """The float atoms of the placement that takes the least time. Exact."""
        import networkx

        _, (_, floats) = networkx.minimum_cut(_network(self), _SOURCE, _SINK)
        return frozenset(n for n in floats if isinstance(n, int))

    def scaled(self, conversions: float = 1.0, floating: float = 1.0) -> Problem:
        """The same with other weights: how the placement answers to errors in the figures."""
        atoms = tuple(
            Atom(a.name, None if a.floating is None else a.floating * floating, a.integer) for a in self.atoms
        )
        tensors = tuple(
            Tensor(t.producer, t.readers, t.quantize * conversions, t.dequantize * conversions) for t in self.tensors
        )
        savings = tuple(Saving(s.first, s.second, s.seconds * floating) for s in self.savings)
        return Problem(atoms, tensors, savings)

    def held(self, floats: Iterable[int] = (), integers: Iterable[int] = ()) -> Problem:
        """The same, with some atoms held in float and some on integers."""
        down, up = set(floats), set(integers)
        atoms = tuple(
            Atom(a.name, None if i in up else a.floating, None if i in down else a.integer)
            for i, a in enumerate(self.atoms)
        )
        return Problem(atoms, self.tensors, self.savings)

    def completed(self, floats: Iterable[int], decided: int) -> frozenset[int]:
        """The best placement in which, of the first `decided` atoms, just `floats` are in float."""
        chosen = set(floats)
        return self.held(chosen, set(range(decided)) - chosen).solve()


def _conversions(tensor: Tensor, floats: set[int]) -> float:
    if tensor.producer in floats:
        return 0.0 if floats.issuperset(tensor.readers) else tensor.quantize
    return 0.0 if floats.isdisjoint(tensor.readers) else tensor.dequantize


def _network(problem: Problem) -> Any:
    """Atoms on the side of the source are on integers. An edge u -> v is paid where u is on integers and v is not."""
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from([_SOURCE, _SINK])
    for i, atom in enumerate(problem.atoms):
        _pay(graph, i, _SINK, atom.integer)
        _pay(graph, _SOURCE, i, atom.floating)
    for saving in problem.savings:
        # s * (1 - [both in float]) = s * [first on integers] + s * [first in float, second on integers]
        _pay(graph, saving.first, _SINK, saving.seconds)
        _pay(graph, saving.second, saving.first, saving.seconds)
    for number, tensor in enumerate(problem.tensors):
        _pay_once(graph, f"quantize {number}", f"dequantize {number}", tensor)
    return graph


def _pay_once(graph: Any, quantized: str, floating: str, tensor: Tensor) -> None:
    """Auxiliary nodes: `quantized` is on integers if any reader is; `floating` is in float if any reader is."""
    _pay(graph, quantized, tensor.producer, tensor.quantize)
    _pay(graph, tensor.producer, floating, tensor.dequantize)
    for reader in tensor.readers:
        _pay(graph, reader, quantized, None)
        _pay(graph, floating, reader, None)


def _pay(graph: Any, start: int | str, end: int | str, seconds: float | None) -> None:
    """Add to the capacity of an edge; None is infinite (which networkx says by giving no capacity)."""
    if seconds is None or seconds == float("inf"):
        graph.add_edge(start, end)
        graph.edges[start, end].pop("capacity", None)
        return
    known = graph.get_edge_data(start, end)
    if known is None or "capacity" in known:
        before = known["capacity"] if known else 0
        graph.add_edge(start, end, capacity=before + round(seconds * _PICO))
