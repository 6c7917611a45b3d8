"""The search for what stays in float under an allowed drop: its order, its steps, its budget, on made-up points."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpress.errors import OptionError
from fxpress.passes.quantize.placement.fallback import (
    Budget,
    Exhausted,
    Search,
    Setting,
    float_path,
    give_back,
    give_back_singly,
    grow,
    refine,
    try_remedies,
)

OPTIONS = "quantize"


@dataclass(frozen=True)
class Spot:
    noise: float
    operations: frozenset[str]


def spots(*rows: tuple[float, str]) -> list[Spot]:
    return [Spot(noise, frozenset(operations)) for noise, operations in rows]


def noise_left(points: list[Spot], kept: frozenset[str]) -> float:
    return sum(p.noise for p in points if not p.operations <= kept)


def searching(points, macs, allowed, **options) -> Search:
    def attempt(setting: Setting) -> tuple[float, int, int]:
        return -noise_left(points, setting.kept), sum(macs.get(o, 0) for o in setting.kept), 0

    return Search(attempt, -allowed, **options)


def found(points, macs, allowed, **options) -> Search:
    search = searching(points, macs, allowed, **options)
    try:
        if not search.meets(search.judge(Setting(OPTIONS))):
            grow(search, Setting(OPTIONS), float_path(points, macs))
            give_back(search, points, macs)
            give_back_singly(search, points, macs)
    except Exhausted:
        pass
    return search


def optimum(points, macs, allowed) -> int:
    """The fewest MACs in float that meet the allowance, by trying every set."""
    sets = itertools.chain.from_iterable(itertools.combinations(macs, n) for n in range(len(macs) + 1))
    fine = [s for s in sets if noise_left(points, frozenset(s)) <= allowed]
    return min(sum(macs[o] for o in s) for s in fine)


# -- what is found -------------------------------------------------------------------------------------------------


def test_one_bad_activation_means_all_operations_around_it():
    points = spots((100.0, "bc"), *[(0.1, o) for o in "abcdefgh"])
    search = found(points, dict.fromkeys("abcdefgh", 10), 1.0)
    assert search.best.setting.kept == frozenset("bc")
    assert len(search.trials) <= 6


def test_a_cheap_bad_layer_is_found_among_dear_ones():
    points = spots((1.0, "a"), (1.0, "b"), (1.0, "c"), (5.0, "d"))
    search = found(points, {"a": 1000, "b": 1000, "c": 1000, "d": 1}, 3.5)
    assert search.best.setting.kept == frozenset("d")


def test_what_growth_took_on_the_way_is_given_back():
    # The cheap ones come first on the path, and do not help enough.
    points = spots((1.0, "a"), (1.0, "b"), (1.0, "c"), (9.0, "d"))
    search = found(points, {"a": 1, "b": 1, "c": 1, "d": 100}, 3.0)
    assert search.best.setting.kept == frozenset("d")


layouts = st.lists(
    st.tuples(st.floats(0.001, 10), st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3)), min_size=1, max_size=9
)


@settings(max_examples=80, deadline=None)
@given(layouts, st.lists(st.integers(1, 100), min_size=6, max_size=6), st.floats(0.01, 0.9))
def test_the_result_meets_the_allowance_and_nothing_more_can_be_given_back(rows, sizes, share):
    points = [Spot(noise, frozenset(operations)) for noise, operations in rows]
    macs = dict(zip("abcdef", sizes))
    allowed = share * noise_left(points, frozenset())
    search = found(points, macs, allowed, budget=Budget(trials=10_000))
    kept = search.best.setting.kept
    assert noise_left(points, kept) <= allowed
    assert all(noise_left(points, kept - {o}) > allowed for o in kept)
    assert search.best.float_macs >= optimum(points, macs, allowed)


def test_close_to_the_optimum_over_many_networks():
    """The order is a heuristic: over random layouts it leaves on average a few percent more in float than needed."""
    import random

    draw, ratios = random.Random(0), []
    for _ in range(60):
        chain = "abcdefgh"
        points = [Spot(draw.expovariate(1) ** 3, frozenset(o)) for o in chain]
        points += [Spot(draw.expovariate(1) ** 3, frozenset(p)) for p in itertools.pairwise(chain)]
        macs = {o: draw.randint(1, 100) for o in chain}
        allowed = draw.uniform(0.05, 0.5) * noise_left(points, frozenset())
        best = optimum(points, macs, allowed)
        ratios.append(found(points, macs, allowed).best.float_macs / best)
    assert sum(ratios) / len(ratios) < 1.15
    assert sum(r == 1 for r in ratios) > len(ratios) / 2


def test_path_grows_from_nothing_to_everything():
    points = spots((3.0, "ab"), (1.0, "c"), (0.0, "d"))
    path = float_path(points, {"a": 5})
    assert path[0] == frozenset()
    assert path[-1] == frozenset("abcd")
    assert all(a < b for a, b in itertools.pairwise(path))


def test_remedies_come_before_float_and_the_best_is_built_on():
    scores = {"plain": 0.1, "better": 0.6, "worse": 0.2}
    search = Search(lambda s: (scores[s.options], 0, 0), 0.9)
    assert try_remedies(search, ["plain", "better", "worse"]) == "better"
    search = Search(lambda s: (scores[s.options], 0, 0), 0.5)
    assert try_remedies(search, ["plain", "better", "worse"]) == "better"
    assert [t.setting.options for t in search.trials] == ["plain", "better"]


def test_an_operation_that_stays_in_float_anyway_is_tried_once():
    points, macs = spots((5.0, "a"), (5.0, "b")), {"a": 10, "b": 20}

    def attempt(setting: Setting) -> tuple[float, int, int]:  # b has no integer form beside a float a
        whole = setting.kept | {"b"} if "a" in setting.kept else setting.kept
        return -noise_left(points, whole), sum(macs[o] for o in whole), 0

    search = Search(attempt, -1.0)
    search.judge(Setting(OPTIONS, frozenset("ab")))
    give_back_singly(search, points, macs)
    assert search.best.float_macs == 30
    assert len(search.trials) == 3


def test_better_options_need_less_in_float():
    points, macs = many()

    def attempt(setting: Setting) -> tuple[float, int, int]:
        share = 0.4 if setting.options == "fitted" else 1.0
        return -share * noise_left(points, setting.kept), sum(macs[o] for o in setting.kept), 0

    search, path = Search(attempt, -20.0), float_path(points, macs)
    search.judge(Setting("fitted"))
    grow(search, Setting("fast"), path)
    before = len(search.trials), search.best.float_macs
    refine(search, Setting("fitted"), path)
    assert search.best.setting.options == "fitted"
    assert noise_left(points, search.best.setting.kept) * 0.4 <= 20.0
    assert search.best.float_macs < 0.6 * before[1]
    assert len(search.trials) - before[0] <= 7


def test_where_float_does_not_help_nothing_stays_in_float():
    search = Search(lambda s: (0.5 + 0.01 * len(s.kept), len(s.kept), 0), 0.9)
    search.judge(Setting(OPTIONS))
    grow(search, Setting(OPTIONS), float_path(spots((1.0, "a"), (1.0, "b")), {"a": 1, "b": 1}))
    assert search.hopeless
    assert search.best.setting.kept == frozenset()


# -- budget and faults ---------------------------------------------------------------------------------------------


def many() -> tuple[list[Spot], dict[str, int]]:
    names = [f"layer{i}" for i in range(60)]
    return [Spot(1.0 + i / 60, frozenset({n})) for i, n in enumerate(names)], dict.fromkeys(names, 10)


@pytest.mark.parametrize("trials", [1, 2, 5, 9])
def test_trials_are_limited_and_the_best_is_kept(trials):
    points, macs = many()
    search = found(points, macs, 40.0, budget=Budget(trials=trials))
    assert len(search.trials) == trials
    assert search.best is not None


def test_seconds_are_limited():
    points, macs = many()
    now = itertools.count(step=4.0)  # every look at the clock is four seconds later
    search = found(points, macs, 40.0, budget=Budget(seconds=100.0), clock=lambda: next(now))
    assert 2 < len(search.trials) < 25
    assert next(now) <= 100 + 8


def test_more_budget_is_never_worse():
    points, macs = many()
    sizes = [found(points, macs, 40.0, budget=Budget(trials=n)).best for n in (8, 12, 20, 80)]
    assert all(t.metric >= -40.0 for t in sizes)
    assert [t.float_macs for t in sizes] == sorted((t.float_macs for t in sizes), reverse=True)


def test_no_setting_is_judged_twice():
    points, macs = many()
    search = found(points, macs, 30.0)
    keys = [t.setting.key for t in search.trials]
    assert len(keys) == len(set(keys))


def test_a_metric_that_is_no_number_loses_and_the_search_goes_on():
    points, macs = spots((100.0, "bc"), (0.1, "a")), dict.fromkeys("abc", 10)
    search = searching(points, macs, 1.0)
    inner = search.attempt
    search.attempt = lambda s: inner(s) if s.kept else (float("nan"), 0, 0)
    assert search.judge(Setting(OPTIONS)).error == "the metric is nan"
    grow(search, Setting(OPTIONS), float_path(points, macs))
    assert search.best.setting.kept == frozenset("bc")


def test_a_metric_that_keeps_failing_ends_the_search():
    points, macs = many()
    points, macs = points * 8, {**macs, **{f"more{i}": 1 for i in range(400)}}
    points += [Spot(1.0, frozenset({o})) for o in macs]

    def fails(setting: Setting) -> tuple[float, int, int]:
        if setting.kept:
            raise OptionError("evaluate fails: ZeroDivisionError")
        return -90.0, 0, 0

    search = Search(fails, -10.0)
    search.judge(Setting(OPTIONS))
    with pytest.raises(Exhausted, match=r"8 times in a row: evaluate fails"):
        grow(search, Setting(OPTIONS), float_path(points, macs))
    assert len(search.trials) == 9
    assert search.best.metric == -90.0


def test_a_budget_must_make_sense():
    for bad in ({"seconds": 0}, {"seconds": float("nan")}, {"trials": -1}):
        with pytest.raises(OptionError):
            Budget(**bad)
