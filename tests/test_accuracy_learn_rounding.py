"""Learned rounding: still the same integer grid, a smaller error, in the budget, block by block."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.errors import OptionError, PipelineError
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.pipeline import parse_pipeline, print_pipeline
from fxpress.passes.quantize.accuracy.blocks import find_blocks
from fxpress.passes.quantize.accuracy.float_twin import FLOAT_TWIN, make_twins
from fxpress.passes.quantize.accuracy.learn_rounding import samples_within
from fxpress.passes.quantize.accuracy.soft_rounding import sharpness, soften
from fxpress.passes.quantize.passes import Quantize
from fxpress.passes.rewrite import constant
from fxpress.recipe import load_recipe
from fxpress.runtime.layers import check_layers

TARGET = load_target("ort-x86")
COARSE = dataclasses.replace(TARGET, weight=dataclasses.replace(TARGET.weight, bits=3))


class Net(nn.Module):
    """A stem of stride 2 (over blocks of pixels after folding), a residual block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.head(x.mean((2, 3)))


class Skips(nn.Module):
    """What the first layers give is read at the very end: no block ends before it."""

    def __init__(self, depth: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(depth))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)  # or the later layers would hardly matter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            found.append(x)
        return torch.cat([found[-1], found[0]], 1)


def data(count: int = 5) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 16, 16, generator=generator),) for _ in range(count)]


def captured(module: nn.Module) -> fxpress.Program:
    torch.manual_seed(0)
    return run_passes(fxpress.capture(module.eval(), data()[0]), "cleanup,canonicalize")


def quantized(program, target=COARSE) -> tuple[fxpress.Program, Context]:
    context = Context(target=target, calibration=data(), wanted=frozenset({FLOAT_TWIN}))
    copy = program.copy()
    Quantize(ranges="minmax").run(copy, context)
    copy.graph_module.recompile()
    return copy, context


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()).detach())


@pytest.fixture(scope="module")
def learned() -> tuple[fxpress.Program, fxpress.Program, fxpress.Program]:
    """(float, rounded to nearest, learned)."""
    torch.manual_seed(0)
    program = captured(Net())
    nearest, context = quantized(program)
    return program, nearest, run_passes(nearest, "learn-rounding{steps=80}", context)


def test_unseen_outputs_come_closer(learned):
    program, nearest, result = learned
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    assert result.log[-1].changes >= 2
    assert sqnr(program(x), result(x)) > sqnr(program(x), nearest(x)) + 1


def test_the_grid_stays_and_each_weight_is_a_neighbour(learned):
    program, nearest, result = learned
    twins = make_twins(result, quantized(program)[1], "test")
    changed = 0
    for layer in twins.layers():
        q, old = constant(result, layer.weight), constant(nearest, layer.weight)
        assert q.dtype is torch.int8
        assert q.abs().max() <= 3
        assert (q - old).abs().max() <= 1
        changed += int((q != old).sum())
    assert changed > 0
    state, before = result.state_dict(), nearest.state_dict()
    assert all(torch.equal(state[k], before[k]) for k in before if k.endswith("_scale"))


def test_it_runs_as_simulated(learned):
    assert check_layers(learned[2], data()[0]).max_steps <= 1


def test_a_block_ends_at_the_sum():
    twins = make_twins(*quantized(captured(Net())), "test")
    blocks = find_blocks(twins)
    assert [len(b.layers) for b in blocks] == [1, 2, 1]
    assert blocks[1].start == blocks[0].ends[0]
    assert blocks[1].ends[0][1].name.startswith("relu")  # in the float program, the sum's activation


def test_without_a_place_to_cut_layers_are_learned_alone():
    program = captured(Skips())
    nearest, context = quantized(program)
    blocks = find_blocks(make_twins(nearest, context, "test"))
    assert [(len(b.layers), b.whole) for b in blocks] == [(1, True), (9, False)]
    result = run_passes(nearest, "learn-rounding{steps=40}", context)
    x = data()[0][0]
    assert result.log[-1].changes > 0
    assert sqnr(program(x), result(x)) > sqnr(program(x), nearest(x))


def test_a_budget_of_no_time_changes_nothing_or_little_and_says_so():
    nearest, context = quantized(captured(Net()))
    start = time.monotonic()
    result = run_passes(nearest, "learn-rounding{seconds=0.2,steps=100000}", context)
    assert time.monotonic() - start < 10
    assert any("fewer than 100000 steps" in n for n in result.log[-1].notes)


def test_the_relaxation():
    weight = torch.randn(4, 5, 3, 3)
    scales = weight.abs().amax((1, 2, 3)) / 7
    soft = soften(weight, scales, 0, (-7, 7))
    assert torch.allclose(soft.value(), weight, atol=1e-3)  # it starts as the float weights
    assert torch.equal(soft.integers(), torch.round(weight / scales.reshape(-1, 1, 1, 1)).clamp(-7, 7))
    assert soft.undecided(2.0) > 0
    soft.v.data = torch.where(soft.v > 0, 20.0, -20.0)
    assert float(soft.undecided(2.0).detach()) == pytest.approx(0, abs=1e-4)
    assert [sharpness(d, 0.2) for d in (0.0, 0.2, 1.0)] == pytest.approx([20, 20, 2])


def test_memory_bounds_the_samples():
    twins = make_twins(*quantized(captured(Net())), "test")
    blocks = find_blocks(twins)
    largest = 2 * (16 * 8 * 8 * 4) * 2  # both ends of the residual block, in both programs
    assert samples_within(blocks, 10 * largest) == 10
    assert samples_within(blocks, 1) == 1


def test_wrong_use():
    program = captured(Net())
    with pytest.raises(PipelineError, match="float program"):
        run_passes(program, "learn-rounding", Context(target=TARGET, calibration=data()))
    with pytest.raises(OptionError, match="above 0"):
        run_passes(program, "learn-rounding{steps=0}", Context(target=TARGET, calibration=data()))


class Transformer(nn.Module):
    """Two blocks on tokens: the sums between them are what the rest needs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)])
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm1, qkv, out, norm2, up, down in self.blocks:
            x = x + out(nn.functional.scaled_dot_product_attention(*qkv(norm1(x)).chunk(3, -1)))
            x = x + down(nn.functional.gelu(up(norm2(x))))
        return x


def test_transformers_are_learned_by_their_residual_blocks():
    generator = torch.Generator().manual_seed(2)
    tokens = [(torch.randn(16, 6, 16, generator=generator),) for _ in range(4)]
    torch.manual_seed(0)
    program = run_passes(fxpress.capture(Transformer().eval(), tokens[0]), "cleanup,canonicalize")
    context = Context(target=COARSE, calibration=tokens)
    result = run_passes(program, "quantize{ranges=minmax},learn-rounding{steps=40}", context)
    plain = run_passes(program, "quantize{ranges=minmax}", context)
    assert result.log[-1].changes > 4
    assert sqnr(program(tokens[1][0]), result(tokens[1][0])) > sqnr(program(tokens[1][0]), plain(tokens[1][0])) + 1
    blocks = find_blocks(make_twins(result, context, "test"))
    assert [len(b.layers) for b in blocks] == [2, 2, 2, 2]


def test_the_recipe_chains_all_and_compiles():
    text = load_recipe("int8-accurate").pipeline
    assert print_pipeline(parse_pipeline(text)) == text
    short = text.replace("learn-rounding", "learn-rounding{steps=10}")
    artifact = fxpress.compile(Net().eval(), data()[0], calibration=data(), pipeline=short)
    assert all(p["kept"] for p in artifact.report["promises"])
    stages = {s["pass"]: s["notes"] for s in artifact.report["stages"]}
    assert all("SQNR" in stages[name][0] for name in ("equalize", "learn-rounding", "correct-bias"))
