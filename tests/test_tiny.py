"""The tutorial: the whole tool on one tiny network. Read it from top to bottom; each test is one step."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import fxpress


# A trained network is all that fxpress starts from. This one is a convolution with BatchNorm and ReLU, a second one
# beside a shortcut, and a classifier.
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(5):  # let BatchNorm see some data, as training would
            net(torch.randn(64, 3, 8, 8))
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# Step 1. Capture. The network becomes a Program: one graph of ATen operators, whose batch size is open.
def test_1_capture(net, images):
    program = fxpress.capture(net, (images[:2],))
    assert [str(i) for i in program.inputs] == ["x: float32[batch, 3, 8, 8]"]
    assert torch.equal(program(images), net(images))  # it runs like the network it came from, at any batch size
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in net.named_parameters()}  # names are kept


# Step 2. Passes rewrite a Program. A pipeline is a list of passes, written as text. The argument is never changed.
def test_2_passes(net, images):
    program = fxpress.capture(net, (images[:2],))
    fused = fxpress.run_passes(program, "cleanup,fuse-batchnorm")
    assert "batch_norm" not in fused.text()
    assert "batch_norm" in program.text()
    torch.testing.assert_close(fused(images), net(images), rtol=1e-4, atol=1e-5)
    assert [(r.name, r.changes) for r in fused.log] == [("cleanup", 0), ("fuse-batchnorm", 2)]  # what each pass did


# Step 3. Pruning. A plan says which channels go; it is found without hints. conv1 and conv2 are added to each other, so
# their channels go together. `mask` zeroes the removed channels where they are read: pruning must equal it exactly.
def test_3_pruning(net, images):
    program = fxpress.capture(net, (images[:2],))
    plan = fxpress.plan_pruning(program, macs=0.5)
    smaller = plan.apply(program)
    assert smaller.parameter_count < 0.6 * program.parameter_count
    torch.testing.assert_close(smaller(images), plan.mask(program)(images), rtol=1e-4, atol=1e-5)


# Step 4. Quantization. The Program now computes on 8-bit integers, as the deployed model will, and still runs in PyTorch,
# so that one can ask at once what it cost. What is not fused yet is fused first.
def test_4_quantization(net, images):
    int8 = fxpress.quantize(fxpress.capture(net, (images[:2],)), calibration=images.split(16))
    assert "fxpress.quantize" in int8.text()
    assert "batch_norm" not in int8.text()
    error = int8(images) - net(images)
    assert 0 < error.square().mean() < 0.01 * net(images).square().mean()


# Step 5. Lowering. Any Program, at any step, can be written as ONNX.
def test_5_lowering(net, images):
    model = fxpress.to_onnx(fxpress.capture(net, (images[:2],)))
    assert [i.name for i in model.graph.input] == ["x"]


# Step 6. All of it in one call, verified. The metric is a function of `run`, which maps a batch to the model's output: it
# judges the network in PyTorch and the compiled file in ONNX Runtime alike.
@pytest.fixture(scope="module")
def folder(net, images, tmp_path_factory):
    answers = net(images).argmax(1)

    def agreement(run):
        return float((run(images).argmax(1) == answers).float().mean())

    folder = tmp_path_factory.mktemp("tutorial") / "out"
    artifact = fxpress.compile(
        net, (images[:2],), calibration=images.split(16), evaluate=agreement, max_drop="10%", output=folder
    )
    assert artifact.kept, artifact
    return folder


def test_6_compile(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["float"]["metric"] == 1.0
    assert report["compiled"]["metric"] >= 0.9
    assert report["compiled"]["size_bytes"] < 0.6 * report["float"]["size_bytes"]
    assert report["parity"]["layer_max_steps"] <= 1  # PyTorch and ONNX Runtime agree, layer by layer
    assert report["coverage"]["integer_macs"] == 1.0  # and the runtime really computes on integers
    assert (folder / "report.html").is_file()


# Step 7. Deployment needs numpy and onnxruntime only.
def test_7_deployment(folder, net, images):
    run = fxpress.load(folder)
    scores = run(images.numpy())
    assert isinstance(scores, np.ndarray)
    assert np.mean(scores.argmax(1) == net(images).argmax(1).numpy()) >= 0.9


# Step 8. Mistakes are explained: what, and how to go on.
def test_8_mistakes(net, images):
    with pytest.raises(fxpress.FxpressError) as caught:
        fxpress.compile(net, (images[:2],), calibration=[images.double()])
    assert "float64" in str(caught.value)
    assert "hint: convert it: x.to(torch.float32)" in str(caught.value)
