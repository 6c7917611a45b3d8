"""Parts of a network that hang together."""

from __future__ import annotations

from collections.abc import Collection

from .atoms import Atoms


def regions(atoms: Atoms, chosen: Collection[int]) -> list[frozenset[int]]:
    """`chosen` atoms by connection: two belong together if one reads the other, directly or through atoms that have no
    integer form."""
    wanted = set(chosen)
    passable = wanted | (set(range(len(atoms.members))) - atoms.movable)
    neighbours = _neighbours(atoms, passable)
    found: list[frozenset[int]] = []
    while wanted:
        region = _reached(next(iter(sorted(wanted))), neighbours)
        found.append(frozenset(region & wanted))
        wanted -= region
    return found


def _neighbours(atoms: Atoms, allowed: set[int]) -> dict[int, set[int]]:
    index = atoms.atom_of
    result: dict[int, set[int]] = {i: set() for i in allowed}
    for name, readers in atoms.values:
        producer = index[name]
        for reader in readers:
            if producer in allowed and reader in allowed:
                result[producer].add(reader)
                result[reader].add(producer)
    return result


def _reached(start: int, neighbours: dict[int, set[int]]) -> set[int]:
    seen, stack = {start}, [start]
    while stack:
        for node in neighbours[stack.pop()] - seen:
            seen.add(node)
            stack.append(node)
    return seen
