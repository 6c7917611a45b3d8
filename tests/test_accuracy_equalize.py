"""Cross-layer equalization: the same function, even ranges, and only where it helps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.errors import DataError
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.quantize.accuracy.equalize import balanced, find_links, least_values
from fxpress.passes.quantize.accuracy.scaling import input_ranges, output_ranges

TARGET = load_target("ort-x86")
PER_TENSOR = dataclasses.replace(TARGET, weight=dataclasses.replace(TARGET.weight, per_channel=False))


class Chain(nn.Module):
    """conv -> relu -> depthwise -> leaky -> pool, pad -> grouped conv -> flatten -> linear -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 6, 2, groups=2)
        self.head = nn.Linear(6 * 16, 10)
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.leaky_relu(self.depthwise(x), 0.1)
        x = nn.functional.pad(nn.functional.max_pool2d(x, 2), (0, 1, 0, 1))
        x = torch.relu(self.grouped(x)).flatten(1)
        return self.last(torch.relu(self.head(x)))


def uneven(module: nn.Module, seed: int = 0, spread: float = 3.0) -> nn.Module:
    """Multiply the output channels of all layers but the last by random factors, which one scale per tensor suffers from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.shape[0] != 4:  # not the last
                factors = torch.exp(torch.randn(len(layer.weight), generator=generator) * spread / 2)
                layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return module.eval()


def data(count: int = 6, size: int = 8) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 8, 8, generator=generator),) for _ in range(count)]


def captured(module: nn.Module) -> fxpress.Program:
    return run_passes(fxpress.capture(module.eval(), data()[0]), "cleanup,canonicalize")


def context(target=PER_TENSOR, calibration=None) -> Context:
    return Context(target=target, calibration=data() if calibration is None else calibration)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_it_finds_every_pair_of_the_chain():
    torch.manual_seed(0)
    links, _ = find_links(captured(Chain()))
    assert [(k.channels, len(k.readers), k.readers[0].repeat) for k in links] == [(8, 1, 1), (8, 1, 1), (6, 1, 16), (10, 1, 1)]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_the_function_stays_and_the_ranges_become_even(seed):
    torch.manual_seed(seed)
    program = captured(uneven(Chain(), seed))
    equal = run_passes(program, "equalize{when=always,absorb=false}")  # the manager compares the outputs
    x = torch.randn(5, 3, 8, 8)
    assert relative(equal(x), program(x)) < 1e-4
    for link in find_links(equal)[0]:
        written = output_ranges(equal, link.producer)
        read = torch.stack([input_ranges(equal, r, link.channels) for r in link.readers]).amax(0)
        assert torch.allclose(written.log(), read.log(), atol=0.05)


def test_it_saves_a_network_that_collapses_per_tensor():
    torch.manual_seed(0)
    program = captured(uneven(Chain(), spread=5.0))
    before, after = (run_passes(program, text, context()) for text in ("quantize", "equalize,quantize"))
    x = data()[0][0]
    assert sqnr(program(x), after(x)) > sqnr(program(x), before(x)) + 5


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def test_it_is_off_where_it_does_not_help():
    torch.manual_seed(0)
    program = captured(Chain())
    links = len(find_links(program)[0])
    results = {target: run_passes(program, "equalize", context(target)) for target in (TARGET, PER_TENSOR)}
    for result in results.values():
        record = result.log[-1]
        left_alone = record.notes[0].startswith("left alone")
        assert record.changes == (0 if left_alone else links)
        assert "dB without" in record.notes[0]
        same = all(torch.equal(a, b) for a, b in zip(result.parameters(), program.parameters()))
        assert same == left_alone


def test_even_weights_stay_as_they_are():
    torch.manual_seed(0)
    program = run_passes(captured(Chain()), "equalize{when=always,absorb=false}")
    again = run_passes(program, "equalize{when=always,absorb=false}")
    for a, b in zip(again.parameters(), program.parameters()):
        assert relative(a, b) < 0.02


class Residual(nn.Module):
    def __init__(self, clamp: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.clamp = clamp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(nn.functional.relu6(y)) if self.clamp else self.b(torch.relu(y)) + y


@pytest.mark.parametrize("clamp", [False, True])
def test_other_readers_and_clamps_are_in_the_way(clamp):
    links, notes = find_links(captured(Residual(clamp)))
    assert links == []
    assert [("clamp" in n) for n in notes] == ([True] if clamp else [])


class Offset(nn.Module):
    """A channel that is always far above zero wastes the range of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        with torch.no_grad():
            self.a.bias[1] = 50.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_high_biases_are_absorbed():
    torch.manual_seed(0)
    program = captured(Offset())
    moved = run_passes(program, "equalize{when=always}", context())
    assert "absorbing 1 biases" in moved.log[-1].notes[0]
    x = data()[2][0]
    assert relative(moved(x), program(x)) < 1e-4
    first = next(n for n in moved.graph.nodes if "conv2d" in str(n.target))
    assert least_values(moved, first, data())[1] == pytest.approx(0, abs=1e-4)


def test_nothing_is_absorbed_before_padding():
    module = Offset()
    module.b = nn.Conv2d(4, 5, 3, padding=1)
    moved = run_passes(captured(module), "equalize{when=always}", context())
    assert "absorbing" not in moved.log[-1].notes[0]


def test_judging_needs_data():
    with pytest.raises(DataError, match="equalize"):
        run_passes(captured(Chain()), "equalize", Context(target=TARGET))
    assert run_passes(captured(Chain()), "equalize{when=always}").log[-1].changes == 4


def test_dead_channels_keep_their_weights():
    assert balanced(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])).tolist() == [2.0, 1.0, 1.0]


def test_what_is_equalized_becomes_the_same_in_onnx():
    torch.manual_seed(0)
    program = captured(uneven(Chain()))
    artifact = fxpress.compile(program, None, calibration=data(), pipeline="cleanup,equalize,quantize")
    assert all(p["kept"] for p in artifact.report["promises"])
