"""Depthwise convolutions on a whole number of vectors: channels of zeros around them, and the same numbers."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.coverage import node_macs
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import op_counts, run_passes
from fxpress.passes.quantize.written import as_written
from fxpress.runtime.layers import check_layers
from fxpress.runtime.session import make_session

TARGET = load_target("ort-x86")
WIDTH = 12


class Gated(nn.Module):
    """Squeeze and excite behind a depthwise convolution, as MobileNetV3 has it."""

    def __init__(self, act=nn.ReLU) -> None:
        super().__init__()
        self.expand, self.act = nn.Conv2d(8, WIDTH, 1), act()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1, groups=WIDTH)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)
        self.project = nn.Conv2d(WIDTH, 8, 1)

    def forward(self, x):
        x = self.act(self.depthwise(self.act(self.expand(x))))
        return self.project(x * nn.functional.hardsigmoid(self.up(torch.relu(self.down(self.pool(x))))))


def block(*, act=nn.ReLU, bias=True, kernel=3):
    return nn.Sequential(
        nn.Conv2d(8, WIDTH, 1, bias=bias), nn.BatchNorm2d(WIDTH), act(),
        nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=WIDTH, bias=bias), nn.BatchNorm2d(WIDTH), act(),
        nn.Conv2d(WIDTH, 8, 1, bias=bias),
    )  # fmt: skip


class Joined(nn.Module):
    """What is around the depthwise convolution has other readers, or other writers."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        self.first, self.depthwise = nn.Conv2d(8, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.last = nn.Conv2d(2 * WIDTH if how == "concat" else WIDTH, 8, 1)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = torch.relu(self.depthwise(a))
        if self.how == "concat":
            return self.last(torch.cat([a, b], 1))
        if self.how == "sum":
            return self.last(a + b)
        if self.how == "output":
            return self.last(b), b
        return self.last(b).flatten(1)


WIDENED = {
    "relu": (block(), 1),
    "relu6, no bias": (block(act=nn.ReLU6, bias=False), 1),
    "silu": (block(act=nn.SiLU), 1),
    "hardswish, 5x5": (block(act=nn.Hardswish, kernel=5), 1),
    "two": (nn.Sequential(block(), block(act=nn.Identity)), 2),
    "gated": (Gated(), 1),
    "gated, hardswish": (Gated(nn.Hardswish), 1),
    "plain end": (Joined("flat"), 1),
}
LEFT = {"concat": Joined("concat"), "sum": Joined("sum"), "output": Joined("output")}


class OneGate(nn.Module):
    """One gate for all channels, as spatial attention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(8, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.gate, self.last = nn.Conv2d(WIDTH, 1, 1), nn.Conv2d(WIDTH, 8, 1)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.first(x))))
        return self.last(x * torch.sigmoid(self.gate(x)))


LEFT["one gate"] = OneGate()


def quantized(module, target=TARGET):
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    data = [(torch.randn(4, 8, 9, 9),) for _ in range(2)]
    program = run_passes(fxpress.capture(module.eval(), data[0]), "cleanup,canonicalize,fuse-batchnorm")
    return run_passes(program, "quantize{ranges=minmax}", Context(target, data)), data[1][0]


def groups(program):
    return [n.args[6] for n in program.graph.nodes if str(n.target) == "aten.conv2d.default" and len(n.args) > 6]


@pytest.mark.parametrize("name", WIDENED)
def test_depthwise_convolutions_are_widened(name, tmp_path):
    module, count = WIDENED[name]
    program, x = quantized(module)
    assert [g for g in groups(as_written(program)) if g > 1] == [16] * count
    assert [g for g in groups(program) if g > 1] == [WIDTH] * count, "what is simulated does not change"
    plain, _ = quantized(module, dataclasses.replace(TARGET, depthwise_multiple=1))
    assert [g for g in groups(as_written(plain)) if g > 1] == [WIDTH] * count
    wanted = program(x)
    assert torch.equal(as_written(program)(x), wanted)
    for batch in (1, 4):
        (there,) = make_session(lower(program)).run(x[:batch].numpy())
        (same,) = make_session(lower(plain)).run(x[:batch].numpy())
        assert (there == same).all()
        torch.testing.assert_close(torch.from_numpy(there), wanted[:batch])
    assert check_layers(program, (x,)).max_steps == 0
    assert sorted(c for _, c in node_macs(lower(program))) == sorted(c for _, c in node_macs(lower(plain)))
    make_session(lower(program), optimized_path=tmp_path / "run.onnx")
    ops = [n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node]
    assert not {"Conv", "FusedConv"} & set(ops)
    shapes = {i.name: list(i.dims) for i in lower(program).graph.initializer}
    assert any(s[:1] == [16] for s in shapes.values())
    program.save(tmp_path / "int8.pt2")
    assert groups(as_written(fxpress.Program.load(tmp_path / "int8.pt2"))) == groups(as_written(program))


@pytest.mark.parametrize("name", LEFT)
def test_where_something_else_depends_on_the_channels_they_stay(name):
    program, x = quantized(LEFT[name])
    assert [g for g in groups(as_written(program)) if g > 1] == [WIDTH]
    assert op_counts(as_written(program)) == op_counts(program)
    outputs = make_session(lower(program)).run(x.numpy())
    assert len(outputs) == 1 + (name == "output")
    torch.testing.assert_close(torch.from_numpy(outputs[0]), program.run_flat((x,))[0])


def test_the_same_file_is_written_each_time():
    program, _ = quantized(WIDENED["gated, hardswish"][0])
    assert len({lower(program).SerializeToString() for _ in range(3)}) == 1


def test_few_channels_are_not_multiplied():
    """3 channels stay 3: 16 would be five times the work."""
    module = nn.Sequential(nn.Conv2d(8, 3, 1), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1))
    program, _ = quantized(module)
    assert [g for g in groups(as_written(program)) if g > 1] == [3]
