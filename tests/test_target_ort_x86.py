"""Every row of the ort-x86 table against the runtime: the pattern is built, quantized, lowered, loaded, and the optimized
graph is read. A row that promises integers must become an integer kernel; a row that says float must stay float."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.coverage import measure_coverage, optimized_graph
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target, target_names
from fxpress.errors import OptionError
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.runtime.layers import check_layers
from fxpress.runtime.session import make_session

TARGET = load_target("ort-x86")
PIPELINE = "cleanup,fuse-batchnorm,canonicalize,quantize"


def conv(i: int = 8, o: int = 8, k: int = 3, **options) -> nn.Module:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Between(nn.Module):
    """conv -> function of its output -> conv, so that the function sits between integer layers."""

    def __init__(self, function, channels_out: int = 8) -> None:
        super().__init__()
        self.first, self.function, self.last = conv(), function, conv(channels_out)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Head(nn.Module):
    """conv -> function -> linear."""

    def __init__(self, function, features: int = 8) -> None:
        super().__init__()
        self.first, self.function, self.last = conv(), function, nn.Linear(features, 5)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class TwoBranches(nn.Module):
    def __init__(self, join, channels_out: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.join, self.last = conv(), conv(), join, conv(channels_out)

    def forward(self, x):
        return self.last(self.join(self.a(x), self.b(x)))


class ChannelGate(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up, self.last = conv(), conv(k=1), conv(k=1), conv()

    def forward(self, x):
        x = self.first(x)
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.last(x * gate)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.c(torch.relu(x + self.b(x)))


def compiled(module: nn.Module, shape=(2, 8, 12, 12), pipeline: str = PIPELINE):
    torch.manual_seed(0)
    module.eval()
    program = fxpress.capture(module, torch.randn(shape))
    context = Context(target=TARGET, calibration=[(torch.randn(shape),) for _ in range(3)])
    quantized = PassManager(pipeline).run(program, context)
    return quantized, lower(quantized)


class Tokens(nn.Module):
    """Pixels as tokens through a block of a transformer: the three projections read the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return x + self.mlp(x)


class Attention(nn.Module):
    """Two heads over pixels, and the layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(x.shape[0], 144, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(y.transpose(1, 2).reshape(x.shape))


# Pattern -> ops that the optimized graph must have (with how often), and ops that it must not have.
FLOAT_CONVS = ("Conv", "FusedConv")
INTEGER = {
    "conv": (nn.Sequential(conv(), conv()), {"QLinearConv": 2}, FLOAT_CONVS),
    "conv relu": (nn.Sequential(conv(), nn.ReLU(), conv()), {"QLinearConv": 2}, (*FLOAT_CONVS, "Relu")),
    "conv relu6": (nn.Sequential(conv(), nn.ReLU6(), conv()), {"QLinearConv": 2}, (*FLOAT_CONVS, "Clip")),
    "conv clamp": (Between(lambda x: x.clamp(0, 3)), {"QLinearConv": 2}, (*FLOAT_CONVS, "Clip")),
    "conv batchnorm relu": (
        nn.Sequential(conv(bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv()),
        {"QLinearConv": 2},
        (*FLOAT_CONVS, "BatchNormalization"),
    ),
    "grouped conv": (nn.Sequential(conv(8, 16), conv(16, 16, groups=2), conv(16)), {"QLinearConv": 3}, FLOAT_CONVS),
    "depthwise conv": (nn.Sequential(conv(groups=8), nn.ReLU(), conv()), {"QLinearConv": 2}, FLOAT_CONVS),
    "same padding": (nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), conv()), {"QLinearConv": 2}, FLOAT_CONVS),
    "strided, dilated conv": (nn.Sequential(conv(stride=2), conv(dilation=2)), {"QLinearConv": 2}, FLOAT_CONVS),
    "linear on a matrix": (
        Head(lambda x: x.mean((2, 3))),
        {"QLinearConv": 1, "QGemm": 1, "QLinearGlobalAveragePool": 1},
        ("Gemm", "GlobalAveragePool"),
    ),
    "linear, linear": (
        Head(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU()), 16),
        {"QGemm": 2},
        ("Gemm", "Relu"),
    ),
    "add": (TwoBranches(torch.add), {"QLinearAdd": 1, "QLinearConv": 3}, ("Add", *FLOAT_CONVS)),
    "residual": (Residual(), {"QLinearAdd": 1, "QLinearConv": 3}, ("Add", "Relu", *FLOAT_CONVS)),
    "mul": (TwoBranches(torch.mul), {"QLinearMul": 1}, ("Mul", *FLOAT_CONVS)),
    "concat": (TwoBranches(lambda a, b: torch.cat([a, b], 1), 16), {"QLinearConcat": 1}, ("Concat", *FLOAT_CONVS)),
    "leaky relu": (Between(nn.LeakyReLU(0.1)), {"QLinearLeakyRelu": 1}, ("LeakyRelu", *FLOAT_CONVS)),
    "sigmoid": (Between(nn.Sigmoid()), {"QLinearSigmoid": 1}, ("Sigmoid", *FLOAT_CONVS)),
    "strided stem": (
        nn.Sequential(nn.Conv2d(8, 3, 1), nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), conv(16)),
        {"QLinearConv": 3, "Transpose": 3},
        ("Pad", *FLOAT_CONVS),
    ),
    "silu": (Between(nn.SiLU()), {"QLinearSigmoid": 1, "QLinearMul": 1}, ("Sigmoid", "QuickGelu", *FLOAT_CONVS)),
    "hardswish": (
        Between(nn.Hardswish()),
        {"QLinearLeakyRelu": 1, "QLinearMul": 1},
        ("HardSigmoid", "HardSwish", "Mul", *FLOAT_CONVS),
    ),
    "hardsigmoid": (Between(nn.Hardsigmoid()), {"QLinearLeakyRelu": 1}, ("HardSigmoid", *FLOAT_CONVS)),
    "squeeze and excite": (
        ChannelGate(),
        {"QLinearConv": 4, "QLinearMul": 1, "QLinearSigmoid": 1},
        ("Mul", *FLOAT_CONVS),
    ),
    "average pool": (Between(nn.AvgPool2d(2)), {"QLinearConv": 3}, ("AveragePool", "QLinearAveragePool", *FLOAT_CONVS)),
    "padded average pool": (Between(nn.AvgPool2d(3, 2, 1)), {"QLinearConv": 3}, ("AveragePool", "QLinearAveragePool")),
    "flatten": (Head(nn.Flatten(), 8 * 144), {"QGemm": 1}, ("Gemm", "DequantizeLinear")),
}
# Data movement runs on the 8-bit values: nothing is dequantized but the output.
MOVES = {
    "max pool": (Between(nn.MaxPool2d(3, 2, 1)), "MaxPool"),
    "channel shuffle": (
        Between(lambda x: x.view(x.shape[0], 2, 4, 12, 12).transpose(1, 2).reshape(x.shape[0], 8, 12, 12)),
        "Transpose",
    ),
    "permute": (Between(lambda x: x.permute(0, 1, 3, 2)), "Transpose"),
    "slice": (Between(lambda x: x[:, 2:6, ::2, ::2], 4), "Slice"),
    "chunk": (Between(lambda x: x.chunk(2, 1)[1], 4), "Slice|Split"),
    "split": (Between(lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1)), "Slice|Split"),
    "pad": (Between(lambda x: nn.functional.pad(x[:, :4], (0, 0, 0, 0, 2, 2))), "Pad"),
    "pixel shuffle": (Between(nn.PixelShuffle(2), 2), "DepthToSpace"),
    "nearest upsampling": (Between(nn.Upsample(scale_factor=2, mode="nearest")), "Resize"),
}
FLOAT = {
    "average pool with borders": (
        Between(nn.AvgPool2d(3, padding=1, count_include_pad=False)),
        "AveragePool|QLinearAveragePool",
        "without borders",
    ),
    "softmax": (Between(nn.Softmax(1)), "Softmax", "7 times slower"),
    "gelu": (Between(nn.GELU()), "Gelu", "no integer kernel"),
    "tanh": (Between(nn.Tanh()), "Tanh", "no integer kernel"),
    "transposed conv": (Between(nn.ConvTranspose2d(8, 8, 2, stride=2)), "ConvTranspose", "no integer ConvTranspose"),
}


def operators(model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in optimized_graph(model).node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


@pytest.mark.parametrize("name", INTEGER)
def test_integer_rows_become_integer_kernels(name):
    module, wanted, unwanted = INTEGER[name]
    _, model = compiled(module)
    got = operators(model)
    assert {op: got.get(op, 0) for op in wanted} == wanted, got
    assert not set(unwanted) & set(got), got
    assert measure_coverage(model).integer_macs == 1.0


@pytest.mark.parametrize("name", MOVES)
def test_moves_run_on_eight_bits(name):
    module, op = MOVES[name]
    _, model = compiled(module)
    got = operators(model)
    assert any(o in got for o in op.split("|")), got
    assert got.get("DequantizeLinear", 0) <= 1, got
    assert got["QuantizeLinear"] == 1, got
    assert measure_coverage(model).integer_macs == 1.0


@pytest.mark.parametrize("name", FLOAT)
def test_float_rows_stay_float_and_their_neighbours_do_not(name):
    module, op, reason = FLOAT[name]
    _, model = compiled(module)
    got = operators(model)
    assert any(o in got for o in op.split("|")), got
    assert got["QLinearConv"] == 2
    about = [n for n in fxpress.capture(module, torch.randn(2, 8, 12, 12)).graph.nodes if n.op == "call_function"]
    assert any(reason in TARGET.why_float(n) for n in about)


def test_tokens_are_matrices_and_quantized_once():
    """Linear layers on [N, T, K] become QGemm with float output; layers that read the same tokens share one quantize."""
    quantized, model = compiled(Tokens())
    got = operators(model)
    assert got["QGemm"] == 5, got
    assert got["QuantizeLinear"] == 3, got
    assert {i.op for i in measure_coverage(model).islands} <= {"MatMul", "FusedMatMul"}
    assert check_layers(quantized, (torch.randn(3, 8, 12, 12),)).max_steps <= 1


def test_addmm_with_parameters_is_a_linear_layer():
    """As in GPT-2, whose layers hold their weights transposed."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x):
            return torch.addmm(self.bias, x.mean((2, 3)), self.weight)

    module = Transposed()
    quantized, model = compiled(module)
    assert operators(model).get("QGemm") == 1
    x = torch.randn(3, 8, 12, 12)
    assert check_layers(quantized, (x,)).max_steps <= 1
    torch.testing.assert_close(quantized(x), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", ["forms=[attention]", "use_integer=[scaled_dot*]"])
def test_attention_on_integers_is_a_form_that_is_off(options):
    """Scores come out in float for the softmax, the second product feeds the next layer; its scale costs nothing."""
    _, model = compiled(Attention())
    assert {"MatMulIntegerToFloat", "QLinearMatMul"}.isdisjoint(operators(model))
    assert len(measure_coverage(model).islands) == 2
    quantized, model = compiled(Attention(), pipeline=f"{PIPELINE}{{{options}}}")
    got = operators(model)
    wanted = {"MatMulIntegerToFloat": 1, "QLinearMatMul": 1, "Mul": 0, "QuantizeLinear": 2}  # tokens, softmax's weights
    assert {op: got.get(op, 0) for op in wanted} == wanted, got
    assert measure_coverage(model).integer_macs == 1.0
    layers = check_layers(quantized, (torch.randn(3, 8, 12, 12),))
    assert layers.max_steps <= 1


def test_hardswish_saturates_where_the_function_does():
    """The table of 256 numbers against the function itself, and the form turned off."""
    module = Between(nn.Hardswish())
    quantized, _ = compiled(module, pipeline=f"{PIPELINE}{{ranges=minmax}}")
    floating, model = compiled(module, pipeline=f"{PIPELINE}{{ranges=minmax,forms=[-hardswish]}}")
    assert "HardSigmoid" in operators(model)
    x = torch.randn(4, 8, 12, 12)
    a, b = quantized(x), floating(x)
    assert 10 * torch.log10(b.square().sum() / (a - b).square().sum()) > 35


@pytest.mark.parametrize("options", [{"k": 7, "groups": 8}, {"groups": 2}], ids=["large-depthwise", "narrow-groups"])
def test_convolutions_that_are_slower_on_integers_are_forms_that_are_off(options, request):
    module = nn.Sequential(conv(), conv(**options), conv())
    _, model = compiled(module)
    got = operators(model)
    assert (got.get("QLinearConv"), got.get("Conv")) == (2, 1), got
    form = request.node.callspec.id
    for option in ("use_integer=[conv2d_1]", f"forms=[{form}]"):
        _, model = compiled(module, pipeline=f"{PIPELINE}{{{option}}}")
        assert operators(model)["QLinearConv"] == 3


def test_forms_that_do_not_exist_or_change_nothing_are_refused():
    for options, message in {
        "forms=[atention]": "no form of ort-x86",
        "forms=[-attention]": "off already",
        "use_integer=[first]": "no optional row",
        "use_integer=[nowhere]": "names no node",
    }.items():
        with pytest.raises(OptionError, match=message):
            compiled(Between(nn.ReLU()), pipeline=f"{PIPELINE}{{{options}}}")


def test_a_product_with_a_number_is_another_scale():
    quantized, model = compiled(Between(lambda x: (x * 0.25).view(-1, 8, 12, 12) / 3.0))
    got = operators(model)
    assert {"Mul", "QLinearMul", "Div"}.isdisjoint(got), got
    assert got["QuantizeLinear"] == 1, got
    assert check_layers(quantized, (torch.randn(3, 8, 12, 12),)).max_steps <= 1


@pytest.mark.parametrize("dims", [1, 3])
def test_conv_1d_and_3d(dims):
    """Conv of other dimensions than two: whatever the table says, the runtime must agree."""
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    _, model = compiled(nn.Sequential(kind(4, 8, 3), nn.ReLU(), kind(8, 4, 3)), (2, 4, *[9] * dims))
    assert operators(model).get("QLinearConv", 0) == 2
    assert measure_coverage(model).integer_macs == 1.0


@pytest.mark.parametrize("name", [*INTEGER, *MOVES, *FLOAT])
def test_simulation_and_runtime_agree_within_a_step_per_layer(name):
    """End to end on these small nets: at most a few steps of the output's own quantization, mostly none."""
    module = {**INTEGER, **MOVES, **FLOAT}[name][0]
    quantized, model = compiled(module)
    session = make_session(model)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 12, 12)
        want = quantized(x).detach().numpy()
        (got,) = session.run(x.numpy())
        scale = float(np.abs(want).max())
        assert np.abs(got - want).max() <= 0.03 * scale
        assert np.abs(got - want).mean() <= 0.003 * scale


def test_unknown_targets_are_explained():
    assert "ort-x86" in target_names()
    with pytest.raises(OptionError, match="did you mean 'ort-x86'"):
        load_target("ort-x68")
