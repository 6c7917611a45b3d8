"""Calibration: what runs is the program itself, all data count, and the faults that others have had stay away."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxpress
from fxpress.backends.targets import load_target
from fxpress.errors import OptionError, QuantizationError
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.quantize import running
from fxpress.passes.quantize.observe import sites_of
from fxpress.passes.quantize.ranges.rules import RULES
from fxpress.passes.quantize.ranges.states import state_of
from fxpress.passes.quantize.running import Runner, in_parts
from fxpress.runtime.session import make_session

TARGET = load_target("ort-x86")
PREPARE = "cleanup,canonicalize,fuse-batchnorm"


class Tangled(nn.Module):
    """Everything that sums in place and fused activations could break: values with several readers, x + x, shapes that
    broadcast, a layer whose output is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.same = nn.Conv2d(8, 8, (1, 3), padding="same")
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        kept = torch.relu(x) + x  # the convolution has two readers
        y = self.twice(kept) + kept
        z = torch.relu(self.depthwise(y) + y)
        w = self.same(z)
        w = w + w + self.gate(w.mean((2, 3), keepdim=True))
        raw = self.gate(w)
        return self.head(torch.relu(raw + y).mean((2, 3))), raw


def observed(module: nn.Module, data: list[torch.Tensor], ranges: str = "mse") -> fxpress.Program:
    torch.manual_seed(0)
    program = run_passes(fxpress.capture(module.eval(), data[0][:2].repeat(2, 1, 1, 1)[:2]), PREPARE)
    context = Context(target=TARGET, calibration=[(d,) for d in data])
    return PassManager(f"annotate,observe{{ranges={ranges}}},calibrate").run(program, context)


def parameters(program: fxpress.Program) -> list[tuple[float, int]]:
    sites = sites_of(program).by_key.values()
    found = [s.observer.params(TARGET.activation) for s in sites if s.observer is not None]
    return [(p.scale, p.zero_point) for p in found]


# -- what runs is the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [True, False])
def test_the_runner_computes_the_program_and_shows_its_values(monkeypatch, prepared):
    monkeypatch.setattr(running, "can_prepare", lambda: prepared)
    x = torch.randn(3, 3, 16, 16)
    program = observed(Tangled(), [x])
    names = {int(n.args[1]): n for n in program.graph.nodes if n.target is torch.ops.fxpress.observe.default}

    class Plain(torch.fx.Interpreter):
        seen: dict = {}

        def run_node(self, n):
            value = super().run_node(n)
            if n in names.values():
                self.seen[int(n.args[1])] = value.clone()
            return value

    with torch.no_grad():
        plain = Plain(program.graph_module)
        want = pytree.tree_leaves(plain.run(x, enable_io_processing=False))
    shown: dict[int, torch.Tensor] = {}

    def keep(key, value):
        shown[key] = value.clone()  # what is returned may be written into
        return value

    runner = Runner(program)
    assert any(isinstance(n.target, running.PreparedConvolution) for n in runner.graph.nodes) == prepared
    got = pytree.tree_leaves(runner.run_batch((x,), keep))
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert shown.keys() == plain.seen.keys()
    for key, value in plain.seen.items():
        torch.testing.assert_close(shown[key], value, rtol=1e-4, atol=1e-5)
    again = runner.run_batch((x,), lambda key, value: value)
    torch.testing.assert_close(pytree.tree_leaves(again), got)
    runner.close()


def test_a_trial_may_replace_the_weights_of_any_layer():
    x = torch.randn(2, 3, 16, 16)
    program = observed(Tangled(), [x])
    (plain, _), (doubled, _) = (
        Runner(program, weights).run_batch((x,), lambda key, value: value)
        for weights in (None, lambda node, weight: weight * 2 if weight.shape == (4, 8) else weight)
    )
    bias = program.state_dict()["head.bias"]
    torch.testing.assert_close(doubled - bias, 2 * (plain - bias))


def test_parts_of_a_batch_are_the_batch():
    program = observed(Tangled(), [torch.randn(2, 3, 16, 16)])
    x = torch.randn(7, 3, 16, 16)
    parts = list(in_parts(program, (x,)))
    assert torch.equal(torch.cat([p for (p,) in parts]), x)
    large = fxpress.capture(nn.Conv2d(3, 64, 1), torch.randn(2, 3, 256, 256))
    assert [len(p) for (p,) in in_parts(large, (torch.zeros(2, 3, 256, 256),))] == [1, 1]
    fixed = fxpress.capture(nn.Conv2d(3, 64, 1), torch.randn(2, 3, 256, 256), dynamic_batch=False)
    assert [len(p) for (p,) in in_parts(fixed, (torch.zeros(2, 3, 256, 256),))] == [2]


# -- the faults of others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "entropy"])
def test_no_data_are_dropped(ranges):
    """One tool forgot the batches before the last few: (1, 10) became (1, 2)."""
    data = [torch.full((1, 3, 8, 8), v).add_(torch.rand(1, 3, 8, 8)) for v in (9.0, *([1.0] * 30))]
    program = observed(nn.Sequential(nn.Conv2d(3, 4, 1)), data, ranges)
    extremes = next(iter(sites_of(program).by_key.values())).observer.statistics.extremes
    assert extremes.count == 31
    assert extremes.high == float(data[0].max())
    scale, _ = parameters(program)[0]
    assert scale * 255 > 9


@pytest.mark.parametrize("ranges", RULES)
def test_an_uneven_last_batch_counts_like_any_other(ranges):
    """Histograms of others fail on it, or average over batches of different sizes."""
    data = torch.randn(11, 3, 16, 16)
    module = Tangled()
    found = [parameters(observed(module, list(data.split(size)), ranges)) for size in (4, 11, 1)]
    for other in found[1:]:
        for (scale, zero), (wanted, wanted_zero) in zip(other, found[0], strict=True):
            assert scale == pytest.approx(wanted, rel=1e-4)
            assert abs(zero - wanted_zero) <= 1


def test_what_is_remembered_does_not_grow():
    """Some keep every activation until the end."""

    def size(samples: int) -> int:
        program = observed(Tangled(), list(torch.randn(samples, 3, 16, 16).clamp(-4, 4).split(5)), "auto")
        states = [state_of(s.observer) for s in sites_of(program).by_key.values() if s.observer is not None]
        return sum(t.nbytes for t in pytree.tree_leaves(states) if isinstance(t, torch.Tensor))

    few, sites = size(10), len(sites_of(observed(Tangled(), [torch.randn(2, 3, 16, 16)])).by_key)
    assert size(80) < 1.5 * few + 1000
    assert few <= sites * 4097 * 8


def test_a_network_captured_with_one_sample_takes_any_batch():
    torch.manual_seed(0)
    program = run_passes(fxpress.capture(Tangled().eval(), torch.randn(1, 3, 16, 16)), PREPARE)
    data = [(torch.randn(3, 3, 16, 16),), (torch.randn(1, 3, 16, 16),)]
    session = make_session(fxpress.to_onnx(fxpress.quantize(program, data)))
    for batch in (1, 2, 5):
        assert session.run(torch.randn(batch, 3, 16, 16).numpy())[0].shape == (batch, 4)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.last = nn.Dropout(0.5), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


def test_calibration_neither_trains_nor_drops():
    """Statistics of BatchNorm must not move, and dropout must not scale what is observed."""
    module = Dropping().train()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(4, 3, 8, 8)
    program = fxpress.capture(module, x[:2])
    before = {k: v.clone() for k, v in program.state_dict().items()}
    PassManager("quantize{ranges=minmax}").run(program, Context(target=TARGET, calibration=[(x,)]))
    assert all(torch.equal(v, before[k]) for k, v in program.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    with pytest.raises(QuantizationError, match="training mode"):
        PassManager("quantize").run(program.train(), Context(target=TARGET, calibration=[(x,)]))


def test_nan_in_an_activation_names_the_layer():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(torch.sqrt(self.conv(x)))

    with pytest.raises(QuantizationError, match=r"sqrt.*NaN or infinity"):
        observed(Root(), [torch.randn(4, 3, 8, 8)])


def test_compile_leaves_the_users_module_alone():
    """Its weights are read where they are, not copied."""
    module = Dropping().eval()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    places = {n: p.data_ptr() for n, p in module.named_parameters()}
    fxpress.compile(module, (torch.randn(2, 3, 8, 8),), calibration=[torch.randn(8, 3, 8, 8)])
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert places == {n: p.data_ptr() for n, p in module.named_parameters()}
    assert all(p.requires_grad for p in module.parameters())


def test_percentile_is_an_option_of_the_pass():
    program = fxpress.capture(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 8, 8))
    context = Context(target=TARGET, calibration=[(torch.randn(8, 3, 8, 8),)])
    wide, narrow = (
        PassManager(f"quantize{{ranges=percentile,percentile={p}}}").run(program, context) for p in (100, 90)
    )
    scales = [
        next(n.args[1] for n in p.graph.nodes if n.target is torch.ops.fxpress.quantize.default) for p in (wide, narrow)
    ]
    assert scales[1] < 0.6 * scales[0]
    with pytest.raises(OptionError, match="no effect"):
        PassManager("quantize{percentile=99}").run(program, context)
