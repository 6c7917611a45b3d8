"""`PruningPlan.merge`: successive plans become one of the original model, for channels, single weights and blocks."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.errors import PruningError
from fxpress.frontend.cost import count_macs
from fxpress.passes.prune.kinds.blocks import Block, find_blocks
from fxpress.passes.prune.kinds.sparsify import SparseMask
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.plan import PruningPlan
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.prune.removals import Removal, compose_removals


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """A stream of 24 channels, three blocks, a grouped convolution and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.Sequential(Residual(24), Residual(24), Residual(24))
        self.grouped = nn.Conv2d(24, 24, 3, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.grouped(self.blocks(F.relu(self.stem(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Transformer(nn.Module):
    """One block with four heads of eight features, whose dimensions are products, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 20, 1), nn.Conv2d(32, 16, 3)
        self.d = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)[:, ::1]))
        return self.d(x.roll(3, 1)).mean((2, 3))


class Bottlenecks(nn.Module):
    """Sums that convolutions read directly, as in MobileNetV2, one of them tied to another's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)
        self.up = nn.ModuleList(nn.Conv2d(12, 20, 1) for _ in range(3))
        self.down = nn.ModuleList(nn.Conv2d(20, 12, 3, padding=1) for _ in range(3))
        self.down[2].weight = self.down[1].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down):
            x = x + down(F.relu6(up(x)))
        return self.head(x).mean((2, 3))


INPUTS = {ResNet: (2, 3, 8, 8), Transformer: (2, 6, 32), Concatenation: (2, 3, 8, 8), Bottlenecks: (2, 3, 8, 8)}


def captured(kind: type[nn.Module], seed: int = 0) -> fxpress.Program:
    torch.manual_seed(seed)
    model = kind()
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("running_mean"):
            tensor.data.uniform_(-0.2, 0.2)
        elif name.endswith("running_var") or tensor.ndim == 1:
            tensor.data.uniform_(0.5, 1.5)
    return fxpress.capture(model.eval(), (torch.randn(INPUTS[kind]),))


def same(first: fxpress.Program, second: fxpress.Program) -> None:
    """Equal weights bit for bit, and equal outputs (a mean that was rescaled twice may round in the last place)."""
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert oracle_error(first, second) < 1e-13


def check(program: fxpress.Program, plan: PruningPlan, later: PruningPlan) -> PruningPlan:
    """The law of merging, and the oracle of the merged plan."""
    merged, pruned = plan.merge(later), later.apply(plan.apply(program))
    same(merged.apply(program), pruned)
    assert oracle_error(merged.mask(program), pruned) <= 1e-9
    assert merged.macs == (count_macs(program), count_macs(pruned))
    assert merged.parameters == (program.parameter_count, pruned.parameter_count)
    return merged


def hand_made(program: fxpress.Program, masks: dict[str, float] | None = None, blocks: tuple[Block, ...] = ()) -> PruningPlan:
    """A plan with masks that keep these shares of parameters, drawn at random, and with blocks."""
    draw, state = np.random.default_rng(0), program.state_dict()
    made = tuple(SparseMask.of(n, draw.random(tuple(state[n].shape)) < share) for n, share in (masks or {}).items())
    pair = (count_macs(program), program.parameter_count)
    plan = PruningPlan((), (), (pair[0], pair[0]), (pair[1], pair[1]), masks=made, blocks=blocks)
    after = plan.apply(program)
    return replace(plan, macs=(pair[0], count_macs(after)), parameters=(pair[1], after.parameter_count))


# -- channels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize("kind", INPUTS)
def test_two_plans_are_one(kind: type[nn.Module], importance: str) -> None:
    program = captured(kind)
    plan = plan_pruning(program, macs=0.7, importance=importance, seed=1)
    later = plan_pruning(plan.apply(program), macs=0.7, importance=importance, seed=2)
    merged = check(program, plan, later)
    sizes = program.state_dict()
    assert all(r.size == sizes[r.name].shape[r.dim] for r in merged.removals)
    assert sum(g.kept for g in merged.groups) < sum(g.kept for g in plan.groups)
    assert {g.size for g in merged.groups} == {g.size for g in plan.groups}
    assert plan.request in merged.request
    assert later.request in merged.request


def test_merging_is_associative_and_survives_files(tmp_path: Path) -> None:
    program = captured(ResNet)
    plans, current = [], program
    for seed in range(3):
        plans.append(plan_pruning(current, macs=0.8, importance="random", seed=seed))
        current = plans[-1].apply(current)
        plans[-1].save(tmp_path / f"{seed}.json")
    a, b, c = (PruningPlan.load(tmp_path / f"{seed}.json") for seed in range(3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert set(left.removals) == set(right.removals)
    same(left.apply(program), current)
    same(right.apply(program), current)
    left.save(tmp_path / "merged.json")
    assert PruningPlan.load(tmp_path / "merged.json") == left
    other = captured(ResNet, seed=7)
    same(left.apply(other), c.apply(b.apply(a.apply(other))))


@given(st.integers(2, 30).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 2)))), st.data())
def test_indices_compose_as_arrays_do(first: tuple[int, set[int]], data: st.DataObject) -> None:
    size, removed = first
    left = size - len(removed)
    again = data.draw(st.sets(st.integers(0, left - 1)))
    (merged,) = compose_removals(
        [Removal("w", 0, size, tuple(sorted(removed)))], [Removal("w", 0, left, tuple(sorted(again)))]
    )
    values = np.arange(size)
    after_first = np.delete(values, sorted(removed))
    assert np.array_equal(values[merged.mask], np.delete(after_first, sorted(again)))
    assert merged.size == size


# -- single weights and blocks ------------------------------------------------------------------------------------


def test_masks_of_a_smaller_model_get_the_original_shape() -> None:
    program = captured(ResNet)
    plan = plan_pruning(program, macs=0.6)
    pruned = plan.apply(program)
    later = hand_made(pruned, {"blocks.0.conv1.weight": 0.5, "grouped.weight": 0.3, "head.weight": 0.7})
    merged = check(program, plan, later)
    assert merged.zeros == later.zeros
    assert {m.shape for m in merged.masks} == {(24, 24, 3, 3), (24, 6, 3, 3), (10, 24)}


def test_masks_first_then_channels() -> None:
    program = captured(ResNet)
    plan = hand_made(program, {"blocks.0.conv1.weight": 0.5, "stem.weight": 0.5})
    later = plan_pruning(plan.apply(program), macs=0.6)
    merged = check(program, plan, later)
    pruned = merged.apply(program).state_dict()
    assert merged.zeros == sum(int((pruned[m.name] == 0).sum()) for m in merged.masks) < plan.zeros


def test_masks_twice() -> None:
    program = captured(ResNet)
    plan = hand_made(program, {"stem.weight": 0.5})
    merged = check(program, plan, hand_made(plan.apply(program), {"stem.weight": 0.9, "head.weight": 0.5}))
    assert merged.zeros > plan.zeros


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", [ResNet, Bottlenecks])
def test_blocks_then_channels_and_channels_then_blocks(kind: type[nn.Module], which: int) -> None:
    program = captured(kind)
    block = find_blocks(program)[which]
    cut = hand_made(program, blocks=(block,))
    check(program, cut, plan_pruning(cut.apply(program), macs=0.6))
    channels = plan_pruning(program, macs=0.6)
    merged = check(program, channels, hand_made(channels.apply(program), blocks=(block,)))
    assert block.tensors
    assert not any(r.name in block.tensors for r in merged.removals)
    assert not any(p.rpartition("[")[0] in block.tensors for g in merged.groups for p in g.places)


def test_everything_in_one_plan(tmp_path: Path) -> None:
    """Masks, channels, a block, channels again: one plan, through a file, for another checkpoint."""
    program = captured(ResNet)
    steps: list[PruningPlan] = [hand_made(program, {"blocks.1.conv1.weight": 0.5, "blocks.2.conv2.weight": 0.5})]
    current = steps[0].apply(program)
    for step in ("channels", "block", "channels"):
        made = plan_pruning(current, macs=0.8) if step == "channels" else hand_made(current, blocks=(find_blocks(current)[1],))
        steps.append(made)
        current = made.apply(current)
    merged = steps[0]
    for later in steps[1:]:
        merged = merged.merge(later)
    assert not any(m.name.startswith("blocks.1") for m in merged.masks)
    assert oracle_error(merged.mask(program), current) <= 1e-9
    merged.save(tmp_path / "plan.json")
    again, other = PruningPlan.load(tmp_path / "plan.json"), captured(ResNet, seed=3)
    assert again == merged
    expected = other
    for step_plan in steps:
        expected = step_plan.apply(expected)
    same(again.apply(other), expected)


STEPS: list[dict[str, object]] = [
    {"ratio": 0.3},
    {"macs": 0.8, "importance": "random"},
    {"kind": "unstructured", "ratio": 0.4},
    {"kind": "unstructured", "ratio": 0.3, "scope": "layer", "importance": "lamp"},
    {"kind": "n:m", "pattern": "2:4"},
    {"kind": "neurons", "ratio": 0.3},
    {"kind": "blocks", "ratio": 0.34},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", INPUTS)
def test_random_sequences_of_kinds(kind: type[nn.Module], seed: int) -> None:
    """Four steps of any kind: those that apply to a network become one plan."""
    program, draw = captured(kind), random.Random(seed)
    current, merged = program, None
    for step in draw.sample(STEPS, 4):
        try:
            plan = plan_pruning(current, **step, seed=seed)  # type: ignore[arg-type]
        except PruningError:  # this network has no blocks, say
            continue
        current = plan.apply(current)
        merged = plan if merged is None else merged.merge(plan)
    assert merged is not None
    same(merged.apply(program), current)
    assert oracle_error(merged.mask(program), current) <= 1e-9
    assert merged.macs == (count_macs(program), count_macs(current))
    assert merged.zeros == sum(int((current.state_dict()[m.name] == 0).sum()) for m in merged.masks)


# -- contradictions and files -------------------------------------------------------------------------------------


def test_plans_that_do_not_follow_one_another() -> None:
    program = captured(ResNet)
    plan = plan_pruning(program, macs=0.6)
    for_original = plan_pruning(program, macs=0.7)
    with pytest.raises(PruningError, match="do not follow one another") as caught:
        plan.merge(for_original)
    assert "plan.apply" in str(caught.value)
    disguised = replace(for_original, macs=(plan.macs[1], for_original.macs[1]))
    with pytest.raises(PruningError, match=r"leaves \d+ of 24 indices"):
        plan.merge(disguised)
    masks = replace(hand_made(program, {"blocks.0.conv1.weight": 0.5}), macs=(plan.macs[1], plan.macs[1]))
    with pytest.raises(PruningError, match="do not follow one another"):
        plan.merge(masks)
    sparse = hand_made(program, {"stem.weight": 0.5})
    other = replace(sparse, masks=(SparseMask.of("stem.weight", np.ones((8, 3, 3, 3), bool)),))
    with pytest.raises(PruningError, match="do not follow one another"):
        sparse.merge(other)


def test_indices_outside_are_refused() -> None:
    later = Removal("w", 0, 4, (9,))
    with pytest.raises(PruningError, match="outside its size 4"):
        compose_removals([Removal("w", 0, 6, (0, 1))], [later])


def test_version_1_files_are_read(tmp_path: Path) -> None:
    """As fxpress wrote them before there were masks and blocks."""
    program = captured(ResNet)
    plan = plan_pruning(program, macs=0.6)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 2
    del data["masks"], data["blocks"]
    (tmp_path / "old.json").write_text(json.dumps({**data, "version": 1}))
    assert PruningPlan.load(tmp_path / "old.json") == plan
