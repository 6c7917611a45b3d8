"""Laws of budgets: they are met, by whole networks and by every layer, and limits hold in every dimension."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import OptionError, PruningError
from fxpress.frontend.cost import cost_table, count_macs, parameter_bytes
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.pipeline import parse_pipeline, print_pipeline
from fxpress.passes.prune.budgets.choices import Limits, allowed_counts, granule, make_choices, match_ratios
from fxpress.passes.prune.groups import find_groups
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.prune.rules.table import analyze
from fxpress.recipe import prune_pass


class Network(nn.Module):
    """A residual stream of 48, a concatenation, a grouped and a depthwise convolution, attention with heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.left, self.right = nn.Conv2d(48, 24, 1), nn.Conv2d(48, 40, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.bn = nn.BatchNorm2d(64)
        self.narrow = nn.Conv2d(64, 48, 1)
        self.grouped, self.back = nn.Conv2d(48, 64, 3, padding=1, groups=4), nn.Conv2d(64, 48, 1)
        self.qkv, self.proj = nn.Linear(48, 3 * 64), nn.Linear(64, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = x + self.narrow(F.relu(self.bn(self.depthwise(y))))
        x = x + self.back(F.relu(self.grouped(x)))
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(-1, 36, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 36, 64)
        return self.head((tokens + self.proj(mixed)).mean(1))


@pytest.fixture(scope="module")
def program() -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(Network().eval(), (torch.randn(2, 3, 6, 6),))


COSTS = {"macs": count_macs, "params": lambda p: p.parameter_count, "size": parameter_bytes}
shares = st.floats(0.25, 1.0)


# -- globally -----------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(share=shares, budget=st.sampled_from(sorted(COSTS)), seed=st.integers(0, 9), round_to=st.sampled_from([1, 8]))
def test_a_budget_is_met_within_a_percent_or_says_why_not(
    program: fxpress.Program, share: float, budget: str, seed: int, round_to: int
) -> None:
    plan = plan_pruning(program, importance="random", seed=seed, round_to=round_to, **{budget: share})  # type: ignore[arg-type]
    pruned = plan.apply(program)
    reached = COSTS[budget](pruned) / COSTS[budget](program)
    assert reached <= share * (1 + 1e-9)
    assert reached >= 0.99 * share or any(f"{budget} ended at" in n for n in plan.notes)
    assert oracle_error(plan.mask(program), pruned) <= 1e-9


def test_size_counts_the_bytes_of_every_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1)).double().eval()
    program = fxpress.capture(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    pruned = plan_pruning(program, size=0.6).apply(program)
    values = sum(t.numel() for t in pruned.state_dict().values() if t.is_floating_point())
    assert parameter_bytes(pruned) == 8 * values
    assert 0.55 <= parameter_bytes(pruned) / parameter_bytes(program) <= 0.6


def test_a_global_ratio_counts_channels(program: fxpress.Program) -> None:
    plan = plan_pruning(program, ratio=0.3, scope="global")
    kept, all_of_them = sum(g.kept for g in plan.groups), sum(g.size for g in plan.groups)
    assert 0.69 <= kept / all_of_them <= 0.7
    shares = {g.kept / g.size for g in plan.groups}
    assert len(shares) > 1  # unlike a ratio by layer, which takes the same from each


def test_a_ratio_is_meant_of_dimensions(program: fxpress.Program) -> None:
    """Heads and their features share what their product loses."""
    after = plan_pruning(program, ratio=0.5).apply(program).state_dict()
    assert after["stem.weight"].shape[0] == 24
    assert after["proj.weight"].shape[1] == 3 * 11  # of 4 heads of 16 features: the root of a half of each


def test_a_ratio_that_steps_do_not_allow_is_explained(program: fxpress.Program) -> None:
    assert not plan_pruning(program, ratio=0.5).notes
    assert "groups shrink in steps" in plan_pruning(program, ratio=0.3, round_to=32).notes[0]


# -- layer by layer -----------------------------------------------------------------------------------------------


def layer_shares(before: fxpress.Program, after: fxpress.Program) -> dict[str, float]:
    """Kept share of the MACs of each layer, by cost tables that know nothing of pruning."""
    full = {c.name: c.macs for c in cost_table(before) if c.macs}
    left = {c.name: c.macs for c in cost_table(after) if c.macs}
    assert full.keys() == left.keys()
    return {name: left[name] / full[name] for name in full}


@settings(max_examples=6, deadline=None)
@given(share=st.floats(0.3, 0.95), seed=st.integers(0, 9))
def test_by_layer_every_layer_meets_the_share_by_itself(program: fxpress.Program, share: float, seed: int) -> None:
    plan = plan_pruning(program, macs=share, scope="layer", importance="random", seed=seed)
    pruned = plan.apply(program)
    kept = layer_shares(program, pruned)
    missed = [name for name, value in kept.items() if value > share * (1 + 1e-9)]
    assert not missed or any(f"{len(missed)} layers cannot come down" in n for n in plan.notes), (missed, plan.notes)
    assert count_macs(pruned) >= 0.99 * share * count_macs(program) or any("in total" in n for n in plan.notes)
    assert oracle_error(plan.mask(program), pruned) <= 1e-9


def test_by_layer_nothing_is_removed_without_need() -> None:
    """In a chain the middle layer has two sides to give: the outer layers decide, and it takes back the rest."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 100, 1), nn.ReLU(), nn.Conv2d(100, 4, 1)).eval()
    program = fxpress.capture(model, (torch.randn(2, 3, 4, 4),))
    plan = plan_pruning(program, macs=0.5, scope="layer")
    assert [g.kept for g in plan.groups] == [32, 50]
    plan = plan_pruning(program, macs=0.5, scope="layer", exclude=["4"])  # the last keeps its input whole
    assert [g.kept for g in plan.groups] == [32]
    assert any("1 layers cannot come down to macs=0.5 by themselves: 4" in n for n in plan.notes)


@pytest.mark.parametrize("budget", ["params", "size"])
def test_by_layer_for_parameters(program: fxpress.Program, budget: str) -> None:
    plan = plan_pruning(program, scope="layer", **{budget: 0.6})  # type: ignore[arg-type]
    after = {n: p.numel() for n, p in plan.apply(program).named_parameters()}
    for name in ("stem", "left", "right", "narrow", "depthwise"):
        before = sum(p.numel() for n, p in program.named_parameters() if n.startswith(f"{name}."))
        assert sum(v for n, v in after.items() if n.startswith(f"{name}.")) <= 0.6 * before


# -- ratios for some layers ---------------------------------------------------------------------------------------


def test_ratios_say_what_some_layers_lose(program: fxpress.Program) -> None:
    plan = plan_pruning(program, ratios={"left": 0.5, "right": 0.25})
    state = plan.apply(program).state_dict()
    assert state["left.weight"].shape[0] == 12
    assert state["right.weight"].shape[0] == 30
    assert state["stem.weight"].shape[0] == 48


def test_the_other_layers_compete_for_the_budget(program: fxpress.Program) -> None:
    plan = plan_pruning(program, macs=0.6, ratios={"stem": 0.0, "left": 0.75})
    pruned = plan.apply(program)
    assert pruned.state_dict()["stem.weight"].shape[0] == 48
    assert pruned.state_dict()["left.weight"].shape[0] == 6
    assert 0.594 <= count_macs(pruned) / count_macs(program) <= 0.6


def test_of_several_globs_the_last_counts(program: fxpress.Program) -> None:
    groups = find_groups(analyze(program))
    ratios = match_ratios(groups, [("*", 0.1), ("left", 0.7)])
    named = {str(g.places[0]): r for g, r in zip(groups, ratios)}
    assert set(named.values()) == {0.1, 0.7}
    assert named["left.weight[0]"] == 0.7


def test_a_glob_that_matches_nothing_is_an_error(program: fxpress.Program) -> None:
    with pytest.raises(OptionError, match=r"'lefft\*' of ratios matches no layer") as caught:
        plan_pruning(program, ratios={"lefft*": 0.5})
    assert "stem" in str(caught.value.hint)


# -- limits -------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    ratio=st.floats(0.3, 0.99),
    max_ratio=st.none() | st.floats(0.1, 0.9),
    min_channels=st.none() | st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_limits_hold_in_every_dimension_of_every_parameter(
    program: fxpress.Program, ratio: float, max_ratio: float | None, min_channels: int | None, seed: int
) -> None:
    limits = {"max_ratio": max_ratio, "min_channels": min_channels}
    plan = plan_pruning(program, ratio=ratio, importance="random", seed=seed, **limits)  # type: ignore[arg-type]
    after = plan.apply(program).state_dict()
    for name, before in program.state_dict().items():
        for old, new in zip(before.shape, after[name].shape):
            assert new >= min(old, min_channels or 1), name
            assert new >= (1 - (max_ratio or 1)) * old - 1e-9, name


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2048), round_to=st.sampled_from([1, 2, 4, 8, 16, 32]), minimum=st.integers(1, 64))
def test_allowed_counts_are_multiples_of_the_granule(size: int, round_to: int, minimum: int) -> None:
    step = granule(size, round_to)
    counts = allowed_counts(size, minimum, step)
    assert counts[-1] == size
    assert all(c % step == 0 and c >= minimum for c in counts[:-1])
    assert round_to % step == 0
    assert step == round_to or size < 4 * round_to


def test_the_granule_of_sixteen() -> None:
    assert [granule(n, 16) for n in (256, 64, 63, 32, 24, 16, 12, 4)] == [16, 16, 8, 8, 8, 8, 4, 4]


def test_choices_keep_what_limits_say(program: fxpress.Program) -> None:
    analysis = analyze(program)
    groups = find_groups(analysis)
    scores = torch.rand(analysis.atoms.count).numpy()
    free = make_choices(analysis, groups, scores, Limits())
    tight = make_choices(analysis, groups, scores, Limits(min_channels=10_000))
    assert any(c.allowed[0] < len(c.order) for c in free)
    assert all(list(c.allowed) == [len(c.order)] for c in tight)


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"size": 1.2},
        {"macs": 0.5, "size": 0.5},
        {"latency": 0.6},  # nothing here can measure
        {"macs": 0.5, "scope": "everywhere"},
        {"scope": "layer"},
        {"macs": 0.5, "min_channels": 0},
        {"macs": 0.5, "min_channels": 2.5},
        {"macs": 0.5, "min_channels": True},
        {"macs": 0.5, "round_to": True},
        {"macs": 0.5, "max_ratio": "half"},
        {"macs": 0.5, "ratios": {"left": 1.0}},
        {"macs": 0.5, "ratios": {"left": -0.1}},
        {"macs": 0.5, "ratios": {"left": "much"}},
        {"macs": 0.5, "ratios": ["left=0.5"]},
        {"macs": 0.5, "ratios": ["left:"]},
        {"macs": 0.5, "ratios": {"": 0.5}},
        {"macs": 0.5, "ratios": {"left": 0.5}, "max_ratio": 0.4},
    ],
)
def test_wrong_options_are_errors_with_a_hint(program: fxpress.Program, options: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        plan_pruning(program, **options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_measurements_that_nothing_asks_for_are_refused(program: fxpress.Program) -> None:
    with pytest.raises(OptionError, match="no effect on macs"):
        plan_pruning(program, macs=0.5, latencies=object())  # type: ignore[arg-type]


def test_limits_that_make_a_budget_impossible_are_named(program: fxpress.Program) -> None:
    with pytest.raises(PruningError, match="smallest possible") as caught:
        plan_pruning(program, macs=0.3, max_ratio=0.2)
    assert "max_ratio" in str(caught.value.hint)


# -- text ---------------------------------------------------------------------------------------------------------

TEXT = 'prune{size=0.5,scope=layer,ratios=["layer1.*:0.3",head:0.0],exclude=[stem],min_channels=8}'


def test_the_text_form_round_trips() -> None:
    (item,) = parse_pipeline(TEXT)
    assert item.ratios == ("layer1.*:0.3", "head:0.0")  # type: ignore[attr-defined]
    text = print_pipeline([item])
    assert parse_pipeline(text) == [item]
    assert parse_pipeline(f"prune{{{text[6:-1]}}}") == [item]


@settings(max_examples=30, deadline=None)
@given(
    ratios=st.dictionaries(
        st.text(st.sampled_from("abz019.*?[]-_:"), min_size=1, max_size=8), st.floats(0, 0.99), max_size=3
    ),
    budget=st.sampled_from(["macs", "params", "size", "latency"]),
    share=st.floats(0.01, 1),
    scope=st.sampled_from(["global", "layer", None]),
)
def test_options_of_python_have_a_text_form(
    ratios: dict[str, float], budget: str, share: float, scope: str | None
) -> None:
    item = prune_pass({budget: share, "ratios": ratios, "scope": scope})
    assert parse_pipeline(print_pipeline([item])) == [item]


def test_the_pass_takes_every_option(program: fxpress.Program) -> None:
    context = Context()
    text = "prune{params=0.7,scope=layer,min_channels=8,max_ratio=0.6,ratios=[left:0.5]}"
    result = run_passes(program, text, context)
    plan = context.results["prune"]
    assert plan.request.startswith("params=0.7, scope=layer, ratios=[left:0.5]")
    assert result.state_dict()["left.weight"].shape[0] == 12
    assert min(min(t.shape, default=9) for n, t in result.state_dict().items() if "weight" in n and t.ndim < 4) >= 8


def test_latency_in_a_bare_pipeline_says_who_measures(program: fxpress.Program) -> None:
    with pytest.raises(OptionError, match="needs measurements") as caught:
        run_passes(program, "prune{latency=0.6}")
    assert "fxpress.compile" in str(caught.value.hint)
