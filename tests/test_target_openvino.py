"""The openvino table against OpenVINO itself: the pattern is compiled there, the precision of every layer that is run
is read, and each layer, fed the same integers, agrees with the simulation."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.runtime import elsewhere
from fxpress.runtime.layers import check_layers
from fxpress.runtime.openvino import integer_share, make_openvino_session
from fxpress.runtime.processor import saturates

pytest.importorskip("openvino")

TARGET = load_target("openvino")
if saturates():  # so do OpenVINO's products without VNNI: weights of seven bits cannot
    TARGET = dataclasses.replace(TARGET, weight=dataclasses.replace(TARGET.weight, bits=7, narrow=False))
PIPELINE = "cleanup,fuse-batchnorm,canonicalize,quantize{ranges=minmax}"
SHAPE = (2, 8, 12, 12)


def _patterns() -> ModuleType:
    path = Path(__file__).with_name("test_target_ort_x86.py")
    spec = importlib.util.spec_from_file_location("openvino_patterns", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PATTERNS = _patterns()
BETWEEN = PATTERNS.Between


def quantized(module: nn.Module, shape=SHAPE) -> fxpress.Program:
    torch.manual_seed(0)
    program = fxpress.capture(module.eval(), torch.randn(shape))
    return PassManager(PIPELINE).run(program, Context(TARGET, [(torch.randn(shape),) for _ in range(3)]))


# Pattern -> kinds of layers that run on 8 bits.
INTEGER = {
    "conv": (PATTERNS.INTEGER["conv"][0], {"Convolution"}),
    "conv relu6": (PATTERNS.INTEGER["conv relu6"][0], {"Convolution"}),
    "depthwise conv": (PATTERNS.INTEGER["depthwise conv"][0], {"Convolution"}),
    "linear, linear": (PATTERNS.INTEGER["linear, linear"][0], {"Convolution", "FullyConnected"}),
    "residual": (PATTERNS.INTEGER["residual"][0], {"Convolution"}),
    "mul": (PATTERNS.INTEGER["mul"][0], {"Convolution"}),
    "concat": (PATTERNS.INTEGER["concat"][0], {"Convolution", "Concatenation"}),
    "silu": (PATTERNS.INTEGER["silu"][0], {"Convolution"}),
    "gelu": (BETWEEN(nn.GELU()), {"Convolution"}),
    "squeeze and excite": (PATTERNS.INTEGER["squeeze and excite"][0], {"Convolution", "Reduce"}),
    "average pool": (PATTERNS.INTEGER["average pool"][0], {"Convolution", "Pooling"}),
    "max pool": (PATTERNS.MOVES["max pool"][0], {"Convolution", "Pooling"}),
    "channel shuffle": (PATTERNS.MOVES["channel shuffle"][0], {"Convolution", "Transpose"}),
    "split": (PATTERNS.MOVES["split"][0], {"Convolution", "Split", "Concatenation"}),
    "pixel shuffle": (PATTERNS.MOVES["pixel shuffle"][0], {"Convolution", "DepthToSpace"}),
    "nearest upsampling": (PATTERNS.MOVES["nearest upsampling"][0], {"Convolution", "Interpolate"}),
    "tokens": (PATTERNS.Tokens(), {"FullyConnected"}),
}
# What OpenVINO computes wrongly where a dequantization with a zero point reaches it, so that it is kept apart.
APART = {
    "average pool whose borders count": BETWEEN(nn.AvgPool2d(3, 2, 1)),
    "pad of channels": BETWEEN(lambda x: nn.functional.pad(x, (0, 0, 0, 0, 2, 2)), 12),
    "pad of channels behind a slice": BETWEEN(lambda x: nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), 12),
    "pad of height and width": BETWEEN(lambda x: nn.functional.pad(x, (1, 2, 1, 0))),
    "float concat": BETWEEN(lambda x: torch.tanh(torch.cat([x[:, :4] * 3.3, torch.relu(x[:, 4:])], 1) + 1)),
}


def agree(program: fxpress.Program) -> None:
    """Layer by layer, and end to end, as numbers of steps of the output's range."""
    x = torch.randn(3, *SHAPE[1:])
    layers = check_layers(program, (x,), make_openvino_session)
    assert layers.max_steps <= 1
    assert layers.share_equal >= 0.999
    want = program.run_flat([x])[0]
    got = torch.from_numpy(make_openvino_session(lower(program)).run(x.numpy())[0])
    assert (got - want).abs().max() <= 4 / 255 * (want.max() - want.min())


@pytest.mark.parametrize("pattern", INTEGER)
def test_rows_run_on_integers_in_openvino(pattern):
    module, kinds = INTEGER[pattern]
    program = quantized(module)
    model = lower(program)
    kernels = make_openvino_session(model).kernels()
    precisions = {k.kind: k.precision for k in kernels if k.kind in kinds}
    assert set(precisions) == kinds
    assert set(precisions.values()) <= {"u8", "i8"}
    layers = [k for k in kernels if k.kind in ("Convolution", "FullyConnected")]
    assert all(k.precision in ("u8", "i8") for k in layers)
    # Attention stays in float: 2 * 144 * 8 MACs a token beside 704 in the linear layers.
    assert integer_share(model, kernels) == pytest.approx(704 / (704 + 2304) if pattern == "tokens" else 1.0)
    agree(program)


@pytest.mark.parametrize("pattern", APART)
def test_what_openvino_would_compute_wrongly_is_kept_apart(pattern):
    agree(quantized(APART[pattern]))


class Tokens(nn.Module):
    """Attention and two linear layers on tokens, as a transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16)

    def forward(self, x):
        x = x.flatten(2)[..., :16]
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.project(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_layers_on_tokens_are_products():
    """Behind a Gemm and a reshape OpenVINO 2026.4 refused DeiT: it moves scales through the reshape."""
    program = quantized(Tokens())
    counts = Counter(n.op_type for n in lower(program).graph.node)
    assert counts["MatMul"] == 4 + 2
    assert not counts["Gemm"]
    agree(program)


@pytest.mark.skipif(saturates(), reason="without VNNI nothing is run in OpenVINO: its products saturate")
def test_the_report_holds_what_openvino_says():
    module = PATTERNS.Residual().eval()
    data = [torch.randn(SHAPE)]
    report = fxpress.compile(module, (data[0],), calibration=data, target="openvino").report
    (promise,) = (p for p in report["promises"] if p["name"] == "openvino")
    assert promise["kept"]
    assert "100% of the MACs on integers" in promise["detail"]
    assert report["coverage"]["integer_macs"] == 1.0


def test_nothing_is_run_where_products_saturate(monkeypatch):
    monkeypatch.setattr(elsewhere, "saturates", lambda: True)
    module, data = PATTERNS.Residual().eval(), [torch.randn(SHAPE)]
    report = fxpress.compile(module, (data[0],), calibration=data, target="openvino").report
    (promise,) = (p for p in report["promises"] if p["name"] == "structure")
    assert promise["kept"]
    assert "no VNNI" in promise["detail"]
    assert not any(p["name"] == "openvino" for p in report["promises"])
