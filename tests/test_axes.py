"""Laws of the axis algebra, checked against a dense model: what is kept, position by position, for random removals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.passes.prune.axes import FIXED, Atoms, Reason, Vector

WHY = Reason("test")


def random_keep(atoms: Atoms, seed: int) -> Vector:
    """A random choice among free literals, as a mask over atoms; pinned ones and FIXED stay."""
    literals = np.arange(atoms.count)
    keep = np.random.default_rng(seed).random(atoms.count) < 0.6
    keep[atoms.pinned(literals)] = True
    return keep


def mask(atoms: Atoms, keep: Vector, vector: Vector) -> Vector:
    return keep[atoms.resolve(vector)].all(axis=0)


def free(atoms: Atoms, *vectors: Vector) -> int:
    """How many free literals the vectors have together."""
    literals = atoms.literals(np.concatenate(vectors))
    return int((~atoms.pinned(literals)).sum())


Law = tuple[str, tuple[Vector, ...]]


class World:
    """Vectors made by random operations, and the laws that each operation promises."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.vectors: list[Vector] = [self.atoms.fresh(12)]
        self.laws: list[Law] = []

    def step(self, kind: str, i: int, j: int, n: int) -> None:
        a, b = self.vectors[i % len(self.vectors)], self.vectors[j % len(self.vectors)]
        getattr(self, kind)(a, b, n)

    def fresh(self, a: Vector, b: Vector, n: int) -> None:
        self.vectors.append(self.atoms.fresh((2, 3, 4, 6, 12)[n % 5]))

    def pin(self, a: Vector, b: Vector, n: int) -> None:
        self.atoms.pin(a[n % len(a) :], WHY)
        self.laws.append(("kept", (a[n % len(a) :],)))

    def cut(self, a: Vector, b: Vector, n: int) -> None:
        if len(a) > 2:
            self.vectors += [a[: len(a) // 2], a[:: 1 + n % 3]]

    def flip(self, a: Vector, b: Vector, n: int) -> None:
        self.vectors.append(np.roll(a[::-1], n))

    def concatenate(self, a: Vector, b: Vector, n: int) -> None:
        if len(a) + len(b) <= 24:
            self.vectors.append(np.concatenate([a, b]))

    def merge(self, a: Vector, b: Vector, n: int) -> None:
        if len(a) * len(b) <= 48:
            merged = self.atoms.merge(a, b)
            self.vectors.append(merged)
            self.laws.append(("product", (merged, a, b)))

    def split(self, a: Vector, b: Vector, n: int) -> None:
        divisors = [d for d in range(1, len(a) + 1) if len(a) % d == 0]
        outer = divisors[n % len(divisors)]
        rows, columns = self.atoms.split(a, outer, len(a) // outer)
        self.vectors += [v for v in (rows, columns) if len(v) > 1]
        self.laws.append(("product", (a, rows, columns)))

    def unify(self, a: Vector, b: Vector, n: int) -> None:
        same = [v for v in self.vectors if len(v) == len(a)]
        other = same[n % len(same)]
        self.atoms.unify(a, other, WHY)
        self.laws.append(("equal", (a, other)))

    def broken(self, keep: Vector) -> list[str]:
        """The laws that this choice breaks."""
        result = []
        for name, vectors in self.laws:
            first, *rest = (mask(self.atoms, keep, v) for v in vectors)
            right = {
                "kept": lambda f, r: f.all(),
                "equal": lambda f, r: np.array_equal(f, r[0]),
                "product": lambda f, r: np.array_equal(f.reshape(len(r[0]), -1), np.outer(*r)),
            }[name](first, rest)
            if not right:
                result.append(name)
        return result


KINDS = ("fresh", "pin", "cut", "flip", "concatenate", "merge", "split", "unify", "unify", "split")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), *[st.integers(0, 30)] * 3), min_size=1, max_size=14)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_every_law_holds_for_every_choice_of_literals(steps: list[tuple[str, int, int, int]], seed: int) -> None:
    """Soundness: whatever was related, in whatever order, any removal of free literals respects all relations."""
    world = World()
    for step in steps:
        world.step(*step)
    for i in range(4):
        assert world.broken(random_keep(world.atoms, seed + i)) == []


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, n=st.integers(0, 30), seed=st.integers(0, 1000))
def test_unify_is_commutative(steps: list[tuple[str, int, int, int]], n: int, seed: int) -> None:
    """unify(a, b) and unify(b, a) leave equally many free literals among all vectors."""
    counts = []
    for turned in (False, True):
        world = World()
        for kind, i, j, k in steps:
            if kind in ("fresh", "cut", "flip", "concatenate"):
                world.step(kind, i, j, k)
        a = world.vectors[seed % len(world.vectors)]
        same = [v for v in world.vectors if len(v) == len(a)]
        b = same[n % len(same)]
        world.atoms.unify(*((b, a) if turned else (a, b)), WHY)
        counts.append(free(world.atoms, *world.vectors))
    assert counts[0] == counts[1]


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_plain_unions_equal_connected_components(pairs: list[tuple[int, int]]) -> None:
    """Without products, unify is exactly union-find: nothing is pinned, nothing is tied too much."""
    atoms = Atoms()
    vector = atoms.fresh(20)
    component = list(range(20))
    if pairs:
        left, right = map(list, zip(*pairs))
        atoms.unify(vector[left], vector[right], WHY)
        for i, j in pairs:
            component = [component[i] if c == component[j] else c for c in component]
    roots = atoms.find(vector)
    assert free(atoms, vector) == len(set(component))
    assert all((roots[i] == roots[j]) == (component[i] == component[j]) for i in range(20) for j in range(20))


def test_merge_with_fixed_repeats() -> None:
    atoms = Atoms()
    channels = atoms.fresh(3)
    assert np.array_equal(atoms.merge(channels, atoms.fixed(2)), np.repeat(channels, 2))
    assert np.array_equal(atoms.merge(atoms.fixed(2), channels), np.tile(channels, 2))
    assert free(atoms, channels) == 3


def test_split_of_a_free_dimension_gives_free_factors() -> None:
    atoms = Atoms()
    vector = atoms.fresh(12)
    rows, columns = atoms.split(vector, 3, 4)
    assert (free(atoms, rows), free(atoms, columns), free(atoms, vector)) == (3, 4, 7)


def test_split_reads_off_what_merge_made() -> None:
    atoms = Atoms()
    heads, width = atoms.fresh(3), atoms.fresh(4)
    rows, columns = atoms.split(atoms.merge(heads, width), 3, 4)
    assert np.array_equal(atoms.find(rows), heads)
    assert np.array_equal(atoms.find(columns), width)


def test_products_of_crossing_sizes_have_a_common_refinement() -> None:
    """(6, 2) against (2, 6): both are (2, 3, 2), which leaves 2 + 3 + 2 literals."""
    atoms = Atoms()
    first = atoms.merge(atoms.fresh(6), atoms.fresh(2))
    second = atoms.merge(atoms.fresh(2), atoms.fresh(6))
    atoms.unify(first, second, WHY)
    assert free(atoms, first) == free(atoms, second) == 7


def test_a_transposed_product_is_still_a_product() -> None:
    """Channel shuffle: what follows in another order has the same factors."""
    atoms = Atoms()
    groups, rest = atoms.fresh(2), atoms.fresh(5)
    shuffled, channels = atoms.merge(rest, groups), atoms.fresh(10)
    atoms.unify(channels, shuffled, WHY)
    back, front = atoms.split(channels, 5, 2)
    assert np.array_equal(atoms.find(front), groups)
    assert np.array_equal(atoms.find(back), rest)


def test_split_of_a_concatenation_ties_the_parts() -> None:
    """[x, y] read as (2, n): x and y are pruned alike, or both factors stay free."""
    atoms = Atoms()
    x, y = atoms.fresh(4), atoms.fresh(4)
    rows, columns = atoms.split(np.concatenate([x, np.repeat(y[:2], 2)]), 2, 4)
    assert len(rows) == 2
    assert free(atoms, columns) >= 2


def test_pins_keep_their_reason_through_unions_and_products() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(6), atoms.fresh(6)
    atoms.pin(a[:1], Reason("first"))
    atoms.unify(a, b, WHY)
    rows, columns = atoms.split(b, 2, 3)
    found = atoms.reason(int(atoms.find(rows)[0]))
    assert found is not None
    assert found.text == "first"
    assert atoms.pinned(atoms.find(columns)).tolist() == [True, False, False]


def test_unify_with_fixed_pins() -> None:
    atoms = Atoms()
    vector = atoms.fresh(4)
    atoms.unify(vector[1:3], atoms.fixed(2), WHY)
    assert atoms.pinned(atoms.find(vector)).tolist() == [False, True, True, False]


def test_a_dimension_of_size_one_is_fixed() -> None:
    assert Atoms().fresh(1).tolist() == [FIXED]


@pytest.mark.parametrize("size", [100, 10_000])
def test_work_is_linear(size: int) -> None:
    """Chains of unions over long vectors stay fast: many rounds of pairwise merging would not."""
    atoms = Atoms()
    vectors = [atoms.fresh(size) for _ in range(50)]
    for a, b in itertools.pairwise(vectors):
        atoms.unify(a, b, WHY)
    assert free(atoms, *vectors) == size
