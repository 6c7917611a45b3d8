"""The minimum cut against brute force: on every small problem, no placement costs less."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.passes.quantize.placement.minimum_cut import Atom, Problem, Saving, Tensor

_TIMES = st.integers(0, 40).map(lambda n: n * 1e-6)


@st.composite
def problems(draw) -> Problem:
    count = draw(st.integers(1, 7))
    atoms = []
    for i in range(count):
        form = draw(st.sampled_from(["both", "both", "both", "float", "integer"]))
        floating = None if form == "integer" else draw(_TIMES)
        atoms.append(Atom(f"a{i}", floating, None if form == "float" else draw(_TIMES)))
    tensors, savings = [], []
    for producer in range(count - 1):
        readers = draw(st.lists(st.integers(producer + 1, count - 1), unique=True, max_size=3))
        if readers:
            tensors.append(Tensor(producer, tuple(readers), draw(_TIMES), draw(_TIMES)))
            if draw(st.booleans()):
                savings.append(Saving(producer, readers[0], draw(_TIMES)))
    return Problem(tuple(atoms), tuple(tensors), tuple(savings))


def placements(problem: Problem) -> list[frozenset[int]]:
    indices = range(len(problem.atoms))
    return [frozenset(c) for n in range(len(indices) + 1) for c in combinations(indices, n)]


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_placement_is_cheaper(problem):
    least = min(problem.seconds(p) for p in placements(problem))
    assert problem.seconds(problem.solve()) == pytest.approx(least, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_of_equal_placements_the_one_with_fewest_float_atoms(problem):
    least = min(problem.seconds(p) for p in placements(problem))
    best = [p for p in placements(problem) if problem.seconds(p) <= least + 1e-12]
    assert len(problem.solve()) == min(map(len, best))


def test_a_conversion_is_paid_once_however_many_read():
    """One float op read by three integer ones: each saves 2 us on integers, the one conversion costs 5 us."""
    readers = tuple(Atom(f"r{i}", 3e-6, 1e-6) for i in range(3))
    shared = Problem((Atom("x", 0.0), *readers), (Tensor(0, (1, 2, 3), 5e-6, 5e-6),))
    assert shared.solve() == {0}
    alone = Problem((Atom("x", 0.0), *readers), tuple(Tensor(0, (i,), 5e-6, 5e-6) for i in (1, 2, 3)))
    assert alone.solve() == {0, 1, 2, 3}


def test_what_fuses_in_float_is_judged_fused():
    """Convolution and addition: each faster on integers alone, faster in float together."""
    atoms = (Atom("conv", 10e-6, 9e-6), Atom("add", 5e-6, 4e-6))
    tensors = (Tensor(0, (1,), 1e-6, 1e-6),)
    assert Problem(atoms, tensors).solve() == frozenset()
    assert Problem(atoms, tensors, (Saving(0, 1, 4e-6),)).solve() == {0, 1}


def test_dear_conversions_leave_an_island_where_it_is():
    """An op that is slow on integers is not worth two conversions that cost more than it loses."""
    atoms = (Atom("a", 9e-6, 2e-6), Atom("slow", 3e-6, 6e-6), Atom("b", 9e-6, 2e-6))
    chain = (Tensor(0, (1,), 2e-6, 2e-6), Tensor(1, (2,), 2e-6, 2e-6))
    assert Problem(atoms, chain).solve() == frozenset()
    assert Problem(atoms, chain).scaled(conversions=0.5).solve() == {1}
    assert Problem(atoms, chain).scaled(floating=1.5).solve() == frozenset()


def test_an_impossible_form_costs_infinity():
    problem = Problem((Atom("f", 1.0), Atom("i", None, 1.0)))
    assert problem.seconds({0, 1}) == float("inf") == problem.seconds(())
    assert problem.solve() == {0}
    assert Problem((Atom("a", 2.0, 1.0),)).held(floats=[0]).solve() == {0}
    assert Problem((Atom("a", 1.0, 2.0),)).held(integers=[0]).solve() == frozenset()


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_completing_a_placement_decides_the_rest_at_its_best(problem, data):
    decided = data.draw(st.integers(0, len(problem.atoms)))
    chosen = {i for i in range(decided) if problem.atoms[i].integer is None}
    allowed = [p for p in placements(problem) if {i for i in p if i < decided} == chosen]
    least = min(map(problem.seconds, allowed))
    if least < float("inf"):
        assert problem.seconds(problem.completed(chosen, decided)) == pytest.approx(least, abs=1e-12)
