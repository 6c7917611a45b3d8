"""Budgets, options, plans on disk, replay, the passes, and what a pruned program can still do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import FxpressError, OptionError, PruningError, VerificationError
from fxpress.frontend.cost import count_macs
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.prune.groups import find_groups, find_pinned
from fxpress.passes.prune.importance.registry import criteria
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.plan import PruningPlan
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.prune.rules.table import analyze


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Small(nn.Module):
    """A residual network: one stream of 32 channels, two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def captured(seed: int = 0) -> fxpress.Program:
    torch.manual_seed(seed)
    model = Small()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)  # small, or every ReLU after it would be dead and nothing could go wrong
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return fxpress.capture(model.eval(), (torch.randn(2, 3, 8, 8),))


@pytest.fixture(scope="module")
def program() -> fxpress.Program:
    return captured()


# -- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [c.name for c in criteria().values() if not c.needs_data])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_budget_is_met_within_one_percent(program: fxpress.Program, budget: str, share: float, importance: str) -> None:
    plan = plan_pruning(program, importance=importance, **{budget: share})  # type: ignore[arg-type]
    pruned = plan.apply(program)
    before, after = {
        "macs": (count_macs(program), count_macs(pruned)),
        "params": (program.parameter_count, pruned.parameter_count),
    }[budget]
    assert after <= share * before
    assert after >= 0.99 * share * before or plan.notes
    assert (count_macs(pruned), pruned.parameter_count) == (plan.macs[1], plan.parameters[1])


def test_fine_granularity_leaves_no_excuse(program: fxpress.Program) -> None:
    plan = plan_pruning(program, macs=0.5)
    assert not plan.notes
    assert 0.495 <= plan.macs[1] / plan.macs[0] <= 0.5


def test_coarse_granularity_is_explained(program: fxpress.Program) -> None:
    plan = plan_pruning(program, macs=0.6, round_to=32)
    assert plan.macs[1] <= 0.6 * plan.macs[0]
    assert plan.macs[1] >= 0.594 * plan.macs[0] or "no group can keep a step more" in plan.notes[0]


def test_ratio_removes_that_share_of_every_group(program: fxpress.Program) -> None:
    plan = plan_pruning(program, ratio=0.25)
    assert [(g.size, g.kept) for g in plan.groups] == [(32, 24)] * 3


def test_impossible_budget_says_what_is_possible(program: fxpress.Program) -> None:
    with pytest.raises(PruningError, match=r"smallest possible is macs=0\.") as caught:
        plan_pruning(program, macs=1e-6)
    least = float(str(caught.value).split("macs=")[2].split("\n")[0])
    assert plan_pruning(program, macs=least * 1.1).macs[1] > 0
    with pytest.raises(PruningError):
        plan_pruning(program, macs=least * 0.9)


def test_importance_decides(program: fxpress.Program) -> None:
    """Channels whose weights are tiny everywhere go first."""
    copy = program.copy()
    state = copy.state_dict()
    state["blocks.0.conv1.weight"][5:20] *= 1e-3
    state["blocks.0.conv2.weight"][:, 5:20] *= 1e-3
    for name in ("l1", "l2"):
        removed = {(r.name, r.dim): r.removed for r in plan_pruning(copy, macs=0.8, importance=name).removals}
        gone = set(removed["blocks.0.conv1.weight", 0])
        assert gone <= set(range(5, 20))  # one or two may be given back to meet the budget closely
        assert len(gone) >= 12


def test_random_importance_follows_the_seed(program: fxpress.Program) -> None:
    plans = [plan_pruning(program, macs=0.5, importance="random", seed=s).removals for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("round_to", "multiple"), [(16, 4), (8, 4), (4, 4), (2, 2)])
def test_round_to_rounds_every_size(program: fxpress.Program, round_to: int, multiple: int) -> None:
    plan = plan_pruning(program, macs=0.4, round_to=round_to)
    sizes = [g.kept for g in plan.groups]
    assert all(s % multiple == 0 for s in sizes)
    assert oracle_error(plan.mask(program), plan.apply(program)) <= 1e-9


def test_wide_groups_round_to_the_full_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 40, 1), nn.ReLU(), nn.Conv2d(40, 4, 1))
    program = fxpress.capture(model.eval(), (torch.randn(2, 3, 4, 4),))
    wide, narrow = (g.kept for g in plan_pruning(program, macs=0.45, round_to=16).groups)
    assert wide % 16 == 0
    assert narrow % 8 == 0


def test_excluded_layers_keep_their_shape(program: fxpress.Program) -> None:
    pruned = plan_pruning(program, macs=0.7, exclude=["blocks.0.conv1", "st*"]).apply(program)
    before, after = program.state_dict(), pruned.state_dict()
    for name in ("blocks.0.conv1.weight", "stem.weight", "blocks.0.bn1.weight", "head.weight"):
        assert after[name].shape == before[name].shape
    assert after["blocks.1.conv1.weight"].shape[0] < 32


def test_max_ratio_holds_in_every_dimension(program: fxpress.Program) -> None:
    plan = plan_pruning(program, macs=0.5, max_ratio=0.4)
    assert max(len(r.removed) / r.size for r in plan.removals) <= 0.4


def test_max_ratio_holds_for_products() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=8), nn.ReLU(), nn.Conv2d(64, 4, 1)
    )
    program = fxpress.capture(model.eval(), (torch.randn(2, 3, 6, 6),))
    plan = plan_pruning(program, ratio=0.9, max_ratio=0.5)
    assert max(len(r.removed) / r.size for r in plan.removals) <= 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"macs": 0.5, "params": 0.5},
        {"macs": 0},
        {"macs": 1.5},
        {"macs": float("nan")},
        {"macs": "half"},
        {"macs": True},
        {"ratio": 1.0},
        {"macs": 0.5, "importance": "beauty"},
        {"macs": 0.5, "round_to": 0},
        {"macs": 0.5, "max_ratio": 1.0},
        {"macs": 0.5, "exclude": ["nothing.like.this"]},
        {"macs": 0.5, "data": [torch.randn(2, 3, 8, 8)]},
    ],
)
def test_bad_options_are_errors_with_a_hint(program: fxpress.Program, options: dict[str, object]) -> None:
    with pytest.raises(OptionError) as caught:
        plan_pruning(program, **options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_weights_that_are_not_finite_are_refused(program: fxpress.Program) -> None:
    copy = program.copy()
    copy.state_dict()["stem.weight"][0] = float("nan")
    with pytest.raises(PruningError, match=r"stem\.weight holds NaN"):
        plan_pruning(copy, macs=0.5)


def test_nothing_to_prune_is_said() -> None:
    program = fxpress.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    with pytest.raises(PruningError, match="nothing in this program can be pruned"):
        plan_pruning(program, macs=0.5)


def test_a_quantized_program_is_refused() -> None:
    from fxpress.frontend.operators import declare_operators

    declare_operators()

    class Quantized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.fxpress.dequantize(torch.ops.fxpress.quantize(x, 0.1, 0, torch.int8), 0.1, 0)

    with pytest.raises(PruningError, match="quantized"):
        plan_pruning(fxpress.capture(Quantized().eval(), (torch.randn(2, 3),)), macs=0.5)


# -- plans --------------------------------------------------------------------------------------------------------


def test_plan_replays_on_another_checkpoint(program: fxpress.Program, tmp_path: Path) -> None:
    plan = plan_pruning(program, macs=0.5)
    plan.save(tmp_path / "plan.json")
    again, other = PruningPlan.load(tmp_path / "plan.json"), captured(seed=1)
    assert again == plan
    pruned = again.apply(other)
    assert oracle_error(again.mask(other), pruned) <= 1e-9
    for removal in plan.removals:
        kept = [i for i in range(removal.size) if i not in removal.removed]
        before = other.state_dict()[removal.name].index_select(removal.dim, torch.tensor(kept))
        assert pruned.state_dict()[removal.name].shape[removal.dim] == len(kept)
        if sum(r.name == removal.name for r in plan.removals) == 1:
            assert torch.equal(pruned.state_dict()[removal.name], before)


def corrupted(plan: PruningPlan, folder: Path, change: object) -> Path:
    path = folder / "plan.json"
    plan.save(path)
    data = json.loads(path.read_text())
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    return path


def test_plans_that_do_not_fit_are_refused(program: fxpress.Program, tmp_path: Path) -> None:
    plan = plan_pruning(program, macs=0.5)

    def change(key: str, value: object, index: int = 0) -> Path:
        return corrupted(plan, tmp_path, lambda d: d["removals"][index].__setitem__(key, value))

    for key, value in (("name", "nobody.weight"), ("dim", 9), ("size", 77), ("removed", [99]), ("removed", [0])):
        with pytest.raises(PruningError) as caught:
            PruningPlan.load(change(key, value)).apply(program)
        assert caught.value.hint
    smaller = plan.apply(program)
    with pytest.raises(PruningError, match="was made for size"):
        plan.apply(smaller)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": "fxpress-pruning-plan", "version": 99}', '{"format": "other", "version": 1}']
)
def test_files_that_are_no_plan_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PruningError, match="is not a pruning plan"):
        PruningPlan.load(path)
    with pytest.raises(FxpressError):
        PruningPlan.load(tmp_path / "absent.json")


def test_plan_prints_as_a_table(program: fxpress.Program) -> None:
    text = repr(plan_pruning(program, macs=0.5))
    assert "macs=0.5" in text
    assert "of 32" in text
    assert "stem.weight[0]" in text


def test_groups_and_pins_print_readably(program: fxpress.Program) -> None:
    analysis = analyze(program)
    stream = str(find_groups(analysis)[0])
    assert "blocks.1.conv2.weight[0]" in stream
    assert "through" in stream
    pinned = {str(p.place): p.reason for p in find_pinned(analysis)}
    assert "input x of the model" in str(pinned["stem.weight[1]"])
    assert "output of the model" in str(pinned["head.weight[0]"])
    assert "slides a window" in str(pinned["stem.weight[2]"])
    assert pinned["stem.weight[2]"].source is not None


# -- what a pruned program can do -----------------------------------------------------------------------------------


def test_pruned_program_is_as_good_as_captured(program: fxpress.Program, tmp_path: Path) -> None:
    """It trains, switches modes, saves, loads, is exported again and runs at other batches."""
    pruned = plan_pruning(program, macs=0.5).apply(program)
    x = torch.randn(5, 3, 8, 8)
    expected = pruned(x)
    for batch in (1, 2, 5):
        assert torch.allclose(pruned(x[:batch]), expected[:batch], atol=1e-5)
    pruned.save(tmp_path / "pruned.pt2")
    assert torch.allclose(fxpress.Program.load(tmp_path / "pruned.pt2")(x), expected, atol=1e-6)

    pruned.train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    before = pruned.state_dict()["blocks.0.bn1.running_mean"].clone()
    pruned(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, pruned.state_dict()["blocks.0.bn1.running_mean"])
    pruned.eval()
    assert torch.equal(pruned(x), pruned(x))
    assert not torch.allclose(pruned(x), expected)


def test_names_order_and_kinds_of_parameters_stay(program: fxpress.Program) -> None:
    copy = program.copy()
    copy.graph_module.get_parameter("stem.weight").requires_grad_(False)
    pruned = plan_pruning(copy, macs=0.5).apply(copy)
    assert list(pruned.state_dict()) == list(copy.state_dict())
    kinds = lambda p: {n: (q.dtype, q.requires_grad) for n, q in p.named_parameters()}  # noqa: E731
    assert kinds(pruned) == kinds(copy)


def test_pruned_twice(program: fxpress.Program) -> None:
    once = plan_pruning(program, macs=0.6).apply(program)
    plan = plan_pruning(once, macs=0.6)
    twice = plan.apply(once)
    assert oracle_error(plan.mask(once), twice) <= 1e-9
    assert count_macs(twice) <= 0.36 * count_macs(program)


def test_after_fusion(program: fxpress.Program) -> None:
    fused = run_passes(program, "fuse-batchnorm")
    plan = plan_pruning(fused, macs=0.5)
    assert oracle_error(plan.mask(fused), plan.apply(fused)) <= 1e-9


# -- passes -------------------------------------------------------------------------------------------------------


def test_prune_pass_in_a_pipeline(program: fxpress.Program) -> None:
    context = Context()
    result = run_passes(program, "prune{macs=0.5,importance=l1},verify-pruning,fuse-batchnorm", context)
    plan = context.results["prune"]
    assert isinstance(plan, PruningPlan)
    assert count_macs(result) == plan.macs[1] <= 0.5 * count_macs(program)
    notes = result.log[0].notes
    assert any("kept 5" in n or "kept 4" in n for n in notes)
    assert any("equal to the masked original" in n for n in notes)
    assert result.outputs == program.outputs


def test_prune_pass_needs_a_budget(program: fxpress.Program) -> None:
    with pytest.raises(OptionError, match="exactly one budget"):
        run_passes(program, "prune")


def test_prune_pass_checks_its_options(program: fxpress.Program) -> None:
    with pytest.raises(OptionError, match="round_to is 0"):
        run_passes(program, "prune{macs=0.5,round_to=0}")


def test_a_program_in_training_mode_is_pruned_and_verified(program: fxpress.Program) -> None:
    training = program.copy().train()
    result = run_passes(training, "prune{macs=0.5}")
    assert result.training
    assert count_macs(result) <= 0.5 * count_macs(program)


def test_verify_pruning_needs_something_to_verify(program: fxpress.Program) -> None:
    with pytest.raises(OptionError, match="nothing to verify"):
        run_passes(program, "verify-pruning")


def test_verify_pruning_finds_a_wrong_program(program: fxpress.Program) -> None:
    context = Context()
    pruned = run_passes(program, "prune{macs=0.5,verify=false}", context)
    with torch.no_grad():
        pruned.state_dict()["blocks.0.conv2.weight"][0, 0] += 0.01
    with pytest.raises(VerificationError, match="differs from its oracle"):
        run_passes(pruned, "verify-pruning", context)


def test_the_target_gives_the_rounding(program: fxpress.Program) -> None:
    from fxpress.backends.targets.ort_x86 import TARGET

    context = Context(target=TARGET)
    run_passes(program, "prune{macs=0.5}", context)
    assert all(g.kept % 4 == 0 for g in context.results["prune"].groups)
