"""What is kept in float is computed in float: ONNX Runtime would quantize its weights by itself, per tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.coverage import optimized_graph
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.runtime.session import make_session

INTEGER = ("QLinearConv", "QGemm", "ConvInteger")


class Sandwich(nn.Module):
    """integer convolution -> what is kept in float -> integer convolution"""

    def __init__(self, kept: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.kept, self.last = nn.Conv2d(3, channels, 3, padding=1), kept, nn.Conv2d(channels, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.kept(self.first(x)))


def spread_weights(module: nn.Module) -> nn.Module:
    """Channels of very different size, which a scale per tensor cannot hold."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                sizes = torch.logspace(0, -3, layer.weight.shape[0])
                layer.weight.mul_(sizes.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    return module


def compiled(module: nn.Module, x: torch.Tensor, keep: str = "kept"):
    program = fxpress.capture(module.eval(), (x,))
    context = Context(load_target("ort-x86"), [(x,)])
    quantized = PassManager(f"cleanup,canonicalize,quantize{{ranges=minmax,keep_float={keep}}}").run(program, context)
    return quantized, lower(quantized)


KEPT = {
    "convolution": (lambda: nn.Conv2d(8, 8, 3, padding=1), 8),
    "with relu": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), 8),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), 16),
    "one channel": (lambda: nn.Conv2d(1, 8, 3, padding=1), 1),
    "behind a float pool": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)), 8),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_float_layer_between_integer_layers_stays_in_float(kind):
    torch.manual_seed(0)
    make, channels = KEPT[kind]
    kept = spread_weights(make())
    out = kept(torch.randn(1, channels, 8, 8)).shape[1]
    network = Sandwich(kept, channels)
    network.last = nn.Conv2d(out, 8, 1)
    x = torch.randn(2, 3, 8, 8)
    quantized, model = compiled(network, x)
    ops = [n.op_type for n in optimized_graph(model).node]
    assert sum(op in INTEGER for op in ops) == 2
    assert sum(op in ("Conv", "FusedConv") for op in ops) == 1
    (got,) = make_session(model).run(x.numpy())
    expected = quantized(x)
    step = (expected.max() - expected.min()) / 255
    assert (torch.from_numpy(got) - expected).abs().max() <= 1.01 * step


def test_a_float_head_behind_integer_layers_stays_in_float():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(16, 32), nn.Linear(32, 8))
    spread_weights(network[1])
    x = torch.randn(2, 3, 8, 8)
    _, model = compiled(network, x, keep="1")
    ops = [n.op_type for n in optimized_graph(model).node]
    assert ops.count("Gemm") == 1


def test_a_model_without_float_layers_is_written_as_before():
    x = torch.randn(2, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    program = fxpress.capture(network.eval(), (x,))
    assert [n.op_type for n in lower(program).graph.node] == ["Conv", "Conv"]
    model = lower(fxpress.quantize(program, [x]))
    activations = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and not n.input[0].endswith("weight")]
    assert all(not any(a.name == "axis" and a.i == 1 for a in n.attribute) for n in activations)


def test_a_float_silu_behind_an_integer_layer_is_one_kernel():
    """Each of its two readers would get a DequantizeLinear of its own, and the fusion would not see one input."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    quantized, model = compiled(Sandwich(nn.SiLU(), 8), x)
    ops = [n.op_type for n in optimized_graph(model).node]
    assert ops.count("QuickGelu") == 1
    assert "Sigmoid" not in ops
    (got,) = make_session(model).run(x.numpy())
    expected = quantized(x)
    step = (expected.max() - expected.min()) / 255
    assert (torch.from_numpy(got) - expected).abs().max() <= 1.01 * step
