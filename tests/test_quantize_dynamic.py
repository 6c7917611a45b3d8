"""Dynamic quantization: the arithmetic is the runtime's, the kernels are the fast ones, no data is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference.ops.op_dynamic_quantize_linear import DynamicQuantizeLinear
from torch import nn

import fxpress
from fxpress.backends.coverage import measure_coverage, optimized_graph
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.errors import QuantizationError
from fxpress.frontend.dynamic import quantize_by_range
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.runtime.dynamic_layers import check_dynamic
from fxpress.runtime.session import make_session
from fxpress.runtime.verify import check_parity


class Tokens(nn.Module):
    """Linear layers on [N, T, K]; the last has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Transposed(nn.Module):
    """A linear layer as GPT-2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Words(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(20, 16), nn.LSTM(16, 12, batch_first=True, **options)
        self.head = nn.Linear(24 if options.get("bidirectional") else 12, 5)

    def forward(self, tokens):
        y, (h, c) = self.lstm(self.words(tokens))
        return self.head(y), h, c


def quantized(module: nn.Module, example: torch.Tensor, target: str = "ort-x86", pipeline="cleanup,quantize-dynamic"):
    program = fxpress.capture(module.eval(), example)
    return PassManager(pipeline).run(program, Context(load_target(target)))


LINEAR = {
    "matrix": (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)), (4, 16), 2),
    "tokens": (Tokens(), (3, 7, 16), 2),
    "four dims": (nn.Linear(16, 8), (2, 3, 5, 16), 1),
    "transposed": (Transposed(), (3, 16), 1),
}
RECURRENT = {
    "plain": {},
    "no bias": {"bias": False},
    "two ways": {"bidirectional": True},
    "layers": {"num_layers": 2, "bidirectional": True},
}


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-6, 1e6), shift=st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_ranges_are_those_of_onnx(seed, scale, shift):
    """Against ONNX's own reference implementation."""
    x = (torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    steps, found_scale, zero = quantize_by_range(x)
    q, want_scale, want_zero = DynamicQuantizeLinear.eval(x.numpy())
    assert float(found_scale) == pytest.approx(float(want_scale), rel=1e-6)
    assert abs(float(zero) - float(want_zero)) <= 1
    if float(zero) == float(want_zero):
        assert np.abs(steps.numpy() + float(zero) - q).max() <= 1


@pytest.mark.parametrize("values", [torch.zeros(2, 3), torch.zeros(0, 3)])
def test_a_tensor_without_range(values):
    steps, scale, zero = quantize_by_range(values)
    assert (float(scale), float(zero)) == (1.0, 0.0)
    assert steps.shape == values.shape
    assert not steps.any()


@pytest.mark.parametrize("target", ["ort-x86", "ort-x86-avx2"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_become_the_fused_kernel(name, target):
    module, shape, layers = LINEAR[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    program = quantized(module, x, target)
    model = lower(program)
    kernels = [n.op_type for n in optimized_graph(model).node]
    assert kernels.count("DynamicQuantizeMatMul") == layers, kernels
    assert not {"Gemm", "MatMul", "MatMulInteger"} & set(kernels)
    assert measure_coverage(model).integer_macs == 1.0
    assert check_dynamic(program, (x,)).max_steps == 0
    assert check_parity(program, model).max_relative <= 1e-2
    reference = module(x).detach()
    assert (program(x) - reference).abs().max() <= 0.05 * reference.abs().max()


@pytest.mark.parametrize("name", RECURRENT)
def test_lstm_becomes_the_runtimes_own_kernel(name):
    torch.manual_seed(0)
    module, tokens = Words(**RECURRENT[name]), torch.randint(0, 20, (3, 7))
    program = quantized(module, tokens)
    model = lower(program)
    kernels = [n.op_type for n in optimized_graph(model).node]
    assert kernels.count("DynamicQuantizeLSTM") == RECURRENT[name].get("num_layers", 1)
    assert "LSTM" not in kernels
    assert measure_coverage(model).integer_macs == 1.0
    layers = check_dynamic(program, (tokens,))
    assert layers.kept
    assert layers.share_equal >= 0.99
    assert check_parity(program, model).output_within_1_step >= 0.99
    for got, want in zip(program(tokens), module(tokens)):
        assert (got[0] - want[0]).abs().max() <= 0.1


def test_seven_bit_weights_without_vnni():
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    program = quantized(nn.Linear(16, 32), x, "ort-x86-avx2")
    (weights,) = (t for t in program.state_dict().values() if t.dtype is torch.int8)
    assert weights.abs().max() <= 64


def test_the_simulation_is_the_kernel_up_to_one_step_of_the_input():
    """With a wide input a step is visible: outputs differ by rounding of float32 alone."""
    torch.manual_seed(0)
    x = torch.randn(64, 300) * torch.logspace(-2, 2, 300)
    program = quantized(nn.Linear(300, 40), x)
    (got,) = make_session(lower(program)).run(x.numpy())
    step = float(x.max() - x.min()) / 255
    largest_weight = float(max(t.float().abs().max() for n, t in program.state_dict().items() if n.endswith("_scale"))) * 127
    assert np.abs(got - program(x).detach().numpy()).max() <= step * largest_weight


def test_keep_float_and_layers_that_cannot():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    program = quantized(module, torch.randn(2, 16), pipeline="quantize-dynamic{keep_float=[1]}")
    assert sum("dynamic_linear" in str(n.target) for n in program.graph.nodes) == 1
    assert program.log[-1].notes == ["1 stays in float: keep_float names it"]
    with pytest.raises(QuantizationError, match="no linear or LSTM layer"):
        quantized(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    with pytest.raises(QuantizationError, match="projections"):
        quantized(nn.LSTM(8, 8, proj_size=4, batch_first=True), torch.randn(2, 5, 8))
    with pytest.raises(QuantizationError, match="written for ONNX Runtime, not for tensorrt"):
        quantized(module, torch.randn(2, 16), "tensorrt")


def test_shared_weights_stay_what_they_are_elsewhere():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 16)

        def forward(self, tokens):
            return nn.functional.linear(self.words(tokens), self.words.weight)

    torch.manual_seed(0)
    module, tokens = Tied(), torch.randint(0, 20, (2, 5))
    program = quantized(module, tokens)
    assert program.state_dict()["words.weight"].dtype is torch.float32
    reference = module(tokens)
    assert (program(tokens) - reference).abs().max() <= 0.05 * reference.abs().max()


def test_the_recipe_needs_no_data(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 256)
    module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    artifact = fxpress.compile(module, (x,), recipe="int8-dynamic", output=tmp_path / "out")
    assert artifact.kept
    assert artifact.report["coverage"]["integer_macs"] == 1.0
    assert artifact.report["compiled"]["size_bytes"] < 0.3 * artifact.report["float"]["size_bytes"]
    assert artifact.report["compiled"]["macs"] == artifact.report["float"]["macs"]
    assert artifact.report["sqnr_db"] > 30
    assert artifact.report["parity"]["layer_max_steps"] == 0
    assert fxpress.load(tmp_path / "out")(x.numpy()).shape == (2, 10)


def test_a_dynamic_program_is_saved_and_read(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (3, 7))
    program = quantized(Words(), tokens)
    program.save(tmp_path / "words.pt2")
    again = fxpress.Program.load(tmp_path / "words.pt2")
    torch.testing.assert_close(again(tokens)[0], program(tokens)[0])


def test_layers_are_compared_on_what_they_read():
    """A layer that computes something else is found, and blamed: its scales are changed in the file alone."""
    torch.manual_seed(0)
    program = quantized(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)), torch.randn(4, 16))

    def load(model):
        (scale,) = (t for t in model.graph.initializer if t.name.startswith("2.weight_scale"))
        changed = np.frombuffer(scale.raw_data, np.float32) * np.float32(1.05)
        scale.raw_data = changed.tobytes()
        return make_session(model)

    layers = check_dynamic(program, (torch.randn(4, 16),), load)
    assert not layers.kept
    assert [layer.name for layer in layers.layers if layer.max_steps > 1] == ["2"]
