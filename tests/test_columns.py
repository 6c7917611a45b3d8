"""Stems that are computed for several columns at once: the same numbers, to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxpress
from fxpress.backends.coverage import node_macs
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.frontend.operators import columns_apart, columns_together
from fxpress.passes.base import Context
from fxpress.passes.manager import op_counts, run_passes
from fxpress.passes.quantize import columns
from fxpress.passes.quantize.columns import widened
from fxpress.passes.quantize.written import as_written
from fxpress.runtime.layers import check_layers
from fxpress.runtime.session import make_session

TARGET = load_target("ort-x86")


@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    size=st.tuples(st.integers(7, 12), st.integers(3, 6)),
    channels=st.integers(1, 4),
    count=st.integers(2, 5),
)
@settings(deadline=None, max_examples=120)
def test_columns_together_are_the_same_convolution(kernel, pads, size, channels, count):
    x = torch.randint(0, 256, (2, channels, size[0], count * size[1])).double()
    weight = torch.randint(-127, 128, (5, channels, *kernel)).double()
    if x.shape[3] + 2 * pads[1] - kernel[1] + 1 < count:
        return
    want = torch.nn.functional.conv2d(x, weight, padding=pads)
    wide, before, after = widened(weight, pads[1], count)
    moved = torch.nn.functional.pad(columns_together(x, count), (before, after, pads[0], pads[0]))
    got = columns_apart(torch.nn.functional.conv2d(moved, wide), count)
    # Where the output is not as wide as the input, its end differs: such stems are left alone.
    both = min(got.shape[3], want.shape[3])
    assert torch.equal(got[..., :both], want[..., :both])
    assert got.shape == want.shape or want.shape[3] != x.shape[3]


def test_columns_come_apart_again():
    x = torch.arange(2 * 3 * 4 * 8).reshape(2, 3, 4, 8)
    together = columns_together(x, 4)
    assert together.shape == (2, 12, 4, 2)
    assert torch.equal(columns_apart(together, 4), x)
    # With channels last nothing moves.
    assert torch.equal(together.permute(0, 2, 3, 1).flatten(), x.permute(0, 2, 3, 1).flatten())


STEMS = {
    "vgg": nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3)),
    "norm, relu6": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1)),
    "grey, 5x5": nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3)),
    "silu": nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3)),
    "the output": nn.Sequential(nn.Conv2d(3, 16, 3, padding=1)),
    "tall": nn.Sequential(nn.Conv2d(2, 8, (5, 3), padding=(0, 1)), nn.Conv2d(8, 8, 3)),
    "no activation, residual": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())),
}  # fmt: skip
OTHERS = {
    "strided": nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3)),
    "narrower": nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)),
    "grouped": nn.Sequential(nn.Conv2d(4, 16, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(16, 8, 3)),
    "dilated": nn.Sequential(nn.Conv2d(3, 16, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(16, 8, 3)),
    "pointwise": nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3)),
    "four channels, many outputs": nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3)),
    "many channels": nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)),
}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """These networks have few weights beside the stem's."""
    monkeypatch.setattr(columns, "_MOST_GROWTH", 100.0)


def test_a_small_file_does_not_grow(monkeypatch):
    monkeypatch.undo()
    assert kernels(quantized(STEMS["vgg"])[0]) == (0, 0)
    deep = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 3))
    assert kernels(quantized(deep)[0]) == (1, 1)


def test_zeros_are_no_work():
    """The share of MACs on integers is that of the model."""
    program, _ = quantized(STEMS["vgg"])
    plain, _ = quantized(STEMS["vgg"], target=dataclasses.replace(TARGET, stem_columns=1))
    assert [c for _, c in node_macs(lower(program))] == [c for _, c in node_macs(lower(plain))]


def quantized(module, width=16, target=TARGET):
    torch.manual_seed(0)
    channels = next(p for p in module.modules() if isinstance(p, nn.Conv2d)).in_channels
    data = [(torch.randn(4, channels, 12, width),) for _ in range(2)]
    program = run_passes(fxpress.capture(module.eval(), data[0]), "cleanup,canonicalize,fuse-batchnorm")
    return run_passes(program, "quantize{ranges=minmax}", Context(target, data)), data[1][0]


def kernels(program):
    counts = op_counts(as_written(program))
    return counts["fxpress.columns_together.default"], counts["fxpress.columns_apart.default"]


@pytest.mark.parametrize("name", STEMS)
def test_stems_are_written_as_written(name, tmp_path):
    program, x = quantized(STEMS[name])
    assert kernels(program) == (1, 1)
    plain, _ = quantized(STEMS[name], target=dataclasses.replace(TARGET, stem_columns=1))
    assert kernels(plain) == (0, 0)
    assert op_counts(program) == op_counts(plain), "what is simulated does not change"
    wanted = program(x)
    assert torch.equal(plain(x), wanted)
    for one in (program, as_written(program)):
        assert torch.equal(one(x), wanted)
    for batch in (1, 4):
        (there,) = make_session(lower(program)).run(x[:batch].numpy())
        (same,) = make_session(lower(plain)).run(x[:batch].numpy())
        assert (there == same).all()
        assert torch.allclose(torch.from_numpy(there), wanted[:batch])
    assert check_layers(program, (x,)).max_steps == 0
    # The mark is part of the program.
    program.save(tmp_path / "int8.pt2")
    assert kernels(fxpress.Program.load(tmp_path / "int8.pt2")) == (1, 1)


@pytest.mark.parametrize("name", OTHERS)
def test_what_gains_nothing_stays(name):
    assert kernels(quantized(OTHERS[name])[0]) == (0, 0)


def test_a_width_that_does_not_divide_stays():
    assert kernels(quantized(STEMS["vgg"], width=18)[0]) == (0, 0)


def test_the_graph_that_is_run_moves_nothing(tmp_path):
    """Channels stay last between the stem and the next convolution: one Transpose at the input and one at the output."""
    import onnx

    program, _ = quantized(STEMS["norm, relu6"])
    make_session(lower(program), optimized_path=tmp_path / "run.onnx")
    ops = [n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node]
    assert ops.count("QLinearConv") == 2
    assert ops.count("Transpose") == 2
