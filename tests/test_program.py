"""Capture, run, switch modes, save and load: the promises of `Program`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpress
from fxpress.errors import CaptureError, DataError
from fxpress.frontend.program import layer_name, source_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, eps=3e-3, momentum=0.2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu_(self.norm(self.conv(x)))
        return {"logits": self.head(self.drop(x.mean((2, 3)))), "map": x}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_capture_runs_like_the_module_at_any_batch(net):
    program = fxpress.capture(net, torch.randn(1, 3, 8, 8))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)


def test_capture_names_inputs_outputs_and_parameters(net):
    program = fxpress.capture(net, torch.randn(2, 3, 8, 8))
    assert [str(i) for i in program.inputs] == ["x: float32[batch, 3, 8, 8]"]
    assert [str(o) for o in program.outputs] == ["logits: float32[batch, 4]", "map: float32[batch, 8, 8, 8]"]
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in net.named_parameters()}
    assert program.parameter_count == sum(p.numel() for p in net.parameters())


def test_capture_keeps_source_lines_and_layer_names(net):
    program = fxpress.capture(net, torch.randn(2, 3, 8, 8))
    nodes = {layer_name(n): n for n in program.graph.nodes if n.op == "call_function"}
    assert "torch.relu_(self.norm(self.conv(x)))" in (source_of(nodes["conv"]) or "")
    assert {"conv", "norm", "drop", "head"} <= set(nodes)


def test_capture_leaves_the_module_alone(net):
    before = copy.deepcopy(net.state_dict())
    net.train()
    program = fxpress.capture(net, torch.randn(2, 3, 8, 8))
    assert net.training
    with torch.no_grad():
        next(iter(program.parameters())).add_(1.0)
    torch.testing.assert_close(net.state_dict(), before)


def test_fixed_batch_is_an_option(net):
    program = fxpress.capture(net, torch.randn(3, 3, 8, 8), dynamic_batch=False)
    assert program.inputs[0].dims == (3, 3, 8, 8)


def test_train_and_eval_are_those_of_the_module(net):
    """Running statistics update in train mode with the module's own momentum and eps, and do not in eval mode."""
    program = fxpress.capture(net, torch.randn(2, 3, 8, 8))
    x = torch.randn(6, 3, 8, 8)
    torch.manual_seed(1)
    expected = net.train()(x)
    torch.manual_seed(1)
    got = program.train()(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(program.state_dict()["norm.running_var"], net.norm.running_var)
    kept = net.norm.running_mean.clone()
    torch.testing.assert_close(program.eval()(x), net.eval()(x))
    torch.testing.assert_close(program.state_dict()["norm.running_mean"], kept)


def test_dropout_that_is_always_on_stays_on():
    class MonteCarlo(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    program = fxpress.capture(MonteCarlo(), torch.ones(2, 100))
    program.train().eval()
    assert (program(torch.ones(2, 100)) == 0).any()


def test_batchnorm_without_statistics_stays_on_batch_statistics():
    norm = nn.BatchNorm1d(4, track_running_stats=False).eval()
    program = fxpress.capture(norm, torch.randn(3, 4))
    x = torch.randn(8, 4) * 3 + 1
    torch.testing.assert_close(program.train().eval()(x), norm(x))


@pytest.mark.parametrize("training", [False, True])
def test_save_and_load(net, tmp_path, training):
    program = fxpress.capture(net, torch.randn(2, 3, 8, 8))
    program.train(training).save(tmp_path / "net.pt2")
    loaded = fxpress.Program.load(tmp_path / "net.pt2").eval()
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)
    assert loaded.inputs == program.inputs
    assert loaded.outputs == program.outputs


def test_load_of_something_else_is_an_error(tmp_path):
    (tmp_path / "no.pt2").write_bytes(b"not an archive")
    with pytest.raises(CaptureError, match="not a readable"):
        fxpress.Program.load(tmp_path / "no.pt2")
    with pytest.raises(fxpress.FxpressError, match="no such file"):
        fxpress.Program.load(tmp_path / "absent.pt2")


def test_keyword_inputs_and_several_tensors():
    class Two(nn.Module):
        def forward(self, a, *, b, scale=2.0):
            return a * scale + b["bias"]

    program = fxpress.capture(Two(), (torch.ones(1, 3),), {"b": {"bias": torch.ones(1, 3)}, "scale": 3.0})
    out = program(torch.ones(4, 3), b={"bias": torch.full((4, 3), 2.0)}, scale=3.0)
    torch.testing.assert_close(out, torch.full((4, 3), 5.0))


# -- what cannot be captured says where and what to do ------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class FrozenBatch(nn.Module):
    def forward(self, x):
        return x.view(2, 12) * 2


class Fails(nn.Module):
    def forward(self, x):
        return x @ torch.ones(5, 5)


@pytest.mark.parametrize(
    ("module", "line", "hint"),
    [
        (Branches(), "if x.sum() > 0", "torch.where"),
        (FrozenBatch(), "", "dynamic_batch=False"),
        (Fails(), "x @ torch.ones(5, 5)", "check shapes"),
    ],
)
def test_capture_errors_name_the_line_and_a_remedy(module, line, hint):
    with pytest.raises(CaptureError) as error:
        fxpress.capture(module, torch.randn(2, 3, 4))
    assert line in str(error.value)
    assert hint in str(error.value)


def test_bad_example_inputs():
    with pytest.raises(DataError, match="NaN"):
        fxpress.capture(nn.ReLU(), torch.tensor([[float("nan")]]))
    with pytest.raises(DataError, match="no tensor"):
        fxpress.capture(nn.ReLU(), ())
    with pytest.raises(DataError, match="empty"):
        fxpress.capture(nn.ReLU(), torch.zeros(0, 3))
    with pytest.raises(DataError, match="do not fit"):
        fxpress.capture(nn.ReLU(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    with pytest.raises(CaptureError, match=r"torch\.nn\.Module"):
        fxpress.capture(lambda x: x, torch.zeros(2, 3))
