"""Bias correction: the mean of each layer's output is the float one's again, in the int32 bias."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.structure import check_structure
from fxpress.backends.targets import load_target
from fxpress.errors import DataError, OptionError, PipelineError
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.prune.recovery.partial_run import PartialRun
from fxpress.passes.quantize.accuracy.correct_bias import correct_biases, typical
from fxpress.passes.quantize.accuracy.float_twin import FLOAT_TWIN, make_twins
from fxpress.passes.quantize.passes import Quantize
from fxpress.passes.rewrite import constant
from fxpress.runtime.layers import check_layers
from fxpress.runtime.session import make_session

TARGET = load_target("ort-x86")
COARSE = dataclasses.replace(TARGET, weight=dataclasses.replace(TARGET.weight, bits=3))


class Net(nn.Module):
    """A stem of stride 2 (which folding rewrites over blocks), a layer without bias, a residual, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        return self.head(x.mean((2, 3)))


def data(count: int = 5) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(16, 3, 16, 16, generator=generator),) for _ in range(count)]


@pytest.fixture(scope="module")
def program() -> fxpress.Program:
    torch.manual_seed(0)
    return run_passes(fxpress.capture(Net().eval(), data()[0]), "cleanup,canonicalize")


def context(target=COARSE) -> Context:
    return Context(target=target, calibration=data())


def quantized(program, context) -> fxpress.Program:
    context.wanted = frozenset({FLOAT_TWIN})
    copy = program.copy()
    Quantize(ranges="minmax").run(copy, context)
    copy.graph_module.recompile()
    return copy


def channel_means(program, node, batches) -> torch.Tensor:
    """Of each sample: [samples, channels]."""
    run = PartialRun(program, [node])
    with torch.no_grad():
        values = torch.cat([run(b)[node] for b in batches])
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def test_the_typical_means_are_those_of_the_float_program(program):
    ctx = context()
    result = quantized(program, ctx)
    twins = make_twins(result, ctx, "test")
    assert len(twins.layers()) == 3
    before = {k.node: channel_means(result, k.node, data()) for k in twins.layers()}
    correct_biases(twins, data(), ctx)
    for layer in twins.layers():
        wanted = channel_means(twins.floating, layer.twin, data())
        off = (channel_means(result, layer.node, data()) - wanted).median(0).values.abs().max()
        assert off < 0.05 * (before[layer.node] - wanted).median(0).values.abs().max()


def test_it_helps_coarse_weights_and_stays_integers(program):
    corrected = run_passes(program, "quantize{ranges=minmax},correct-bias", context())
    record = corrected.log[-1]
    assert record.changes == 3
    assert "dB with)" in record.notes[0]
    biases = [constant(corrected, n) for n in corrected.graph.nodes if n.op == "get_attr" and n.target.endswith("bias")]
    assert [b.dtype for b in biases] == [torch.int32] * 3
    assert check_layers(corrected, data()[0]).max_steps <= 1  # in ONNX Runtime


def test_it_is_off_where_it_does_not_help(program):
    ctx = context()
    once = quantized(program, ctx)
    twice = run_passes(run_passes(once, "correct-bias", ctx), "correct-bias", ctx)
    record = twice.log[-1]
    assert (record.changes == 0) == record.notes[0].startswith("left alone")


def test_what_it_needs(program):
    with pytest.raises(PipelineError, match="compares with the float program") as error:
        run_passes(quantized(program, Context(target=TARGET, calibration=data())), "correct-bias")
    assert "quantize,correct-bias" in str(error.value)
    ctx = context()
    result = quantized(program, ctx)
    with pytest.raises(DataError, match="correct-bias"):
        run_passes(result, "correct-bias", dataclasses.replace(ctx, calibration=None))
    with pytest.raises(OptionError, match="samples"):
        run_passes(result, "correct-bias{samples=0}", ctx)


def test_the_float_program_is_kept_only_where_it_is_wanted(program):
    ctx = context()
    run_passes(program, "quantize{ranges=minmax}", ctx)
    assert FLOAT_TWIN not in ctx.results
    run_passes(program, "quantize{ranges=minmax},correct-bias", ctx)
    assert FLOAT_TWIN in ctx.results


def test_the_median_does_not_follow_a_few_samples():
    shifts = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0], [1000.0, -1000.0]])
    assert typical(shifts).tolist() == [2.0, 2.0]
    assert typical(shifts[:3]).tolist() == [1.0, 2.0]


NO_BIAS = {
    "depthwise": (
        nn.Sequential(
            nn.Conv2d(8, 12, 1, bias=False), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.ReLU(),
            nn.Conv2d(12, 8, 1, bias=False),
        ),
        (8, 9, 9),
    ),
    "tokens": (nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4, bias=False)), (7, 16)),
}  # fmt: skip


@pytest.mark.parametrize("target", ["ort-x86", "openvino", "tensorrt"])
@pytest.mark.parametrize("name", NO_BIAS)
def test_layers_without_bias_get_one_as_the_target_has_them(name, target):
    """What is said of a layer (its form in the file) is not said of its new bias."""
    torch.manual_seed(0)
    module, shape = NO_BIAS[name]
    x = torch.randn(32, *shape)
    program = run_passes(fxpress.capture(module.eval(), x[:2]), "cleanup,canonicalize")
    there = load_target(target)
    coarse = dataclasses.replace(there, weight=dataclasses.replace(there.weight, bits=3))
    corrected = run_passes(program, "quantize{ranges=minmax},correct-bias", Context(coarse, [(x,)]))
    assert corrected.log[-1].changes > 0
    model = lower(corrected)
    assert make_session(model, threads=1).run(x[:5].numpy())[0].shape == tuple(program(x[:5]).shape)
    assert check_layers(corrected, (x[:4],)).kept
    assert not [p for p in check_structure(model, coarse) if "bias" in p]
