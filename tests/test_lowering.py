"""Lowering as a whole: the interface, names, rejections, constants, quantized operators, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxpress.backends.onnx import lower as lower_module
from fxpress.backends.onnx.lower import lower, write
from fxpress.backends.onnx.table import lowering_rows, row
from fxpress.errors import DataError, FxpressError, LoweringError, OutputError
from fxpress.frontend.capture import capture
from fxpress.frontend.operators import declare_operators
from fxpress.runtime.session import make_session


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.stem(x)))
        return self.head(y.mean((2, 3)))


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def test_a_small_net_reads_like_its_source() -> None:
    model = lower(capture(Net(), torch.randn(2, 3, 8, 8)))
    assert ops(model) == ["Conv", "BatchNormalization", "Relu", "GlobalAveragePool", "Reshape", "Gemm"]
    assert [n.name for n in model.graph.node][:2] == ["stem", "norm"]
    names = {i.name for i in model.graph.initializer}
    assert {"stem.weight", "stem.bias", "norm.running_mean", "head.weight"} <= names
    props = {p.key: p.value for p in model.graph.node[0].metadata_props}
    assert "test_lowering.py" in props["fxpress.source"] or "conv.py" in props["fxpress.source"]
    assert props["fxpress.node"] == "conv2d"


def test_interface_keeps_names_and_symbols() -> None:
    model = lower(capture(Net(), torch.randn(2, 3, 8, 8)))
    (x,), (y,) = model.graph.input, model.graph.output
    assert x.name == "x"
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert [d.dim_param or d.dim_value for d in y.type.tensor_type.shape.dim] == ["batch", 5]
    assert model.opset_import[0].version == 21


def test_flatten_and_attention_reshapes_need_no_shape_nodes() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = lower(capture(layer, torch.randn(2, 5, 8)))
    assert "Shape" not in ops(model)


def test_several_outputs_inputs_as_outputs_and_repeated_outputs() -> None:
    program = capture(Call(lambda x: {"same": x, "a": x + 1, "constant": torch.ones(3), "again": x}), torch.randn(2, 3))
    outputs = make_session(lower(program)).run(np.ones((4, 3), np.float32))
    assert [o.tolist()[0] if o.ndim == 2 else o.tolist() for o in outputs] == [[1] * 3, [2] * 3, [1] * 3, [1] * 3]


def test_constants_are_folded_and_dead_code_is_left_out() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        unused = x * 3  # noqa: F841
        return x + torch.arange(12.0).view(3, 4).sum(0) * 2

    assert ops(lower(capture(Call(run), torch.randn(2, 4)))) == ["Add"]


def test_weights_are_referenced_and_shared() -> None:
    shared = nn.Linear(8, 8)
    program = capture(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 3, 8))
    model = lower_module.build(program)
    weights = [v for v in model.graph.initializers.values() if v.const_value.size == 64]
    assert len(weights) == 1  # one transposed copy for both uses
    program = capture(nn.Linear(8, 8), torch.randn(2, 8))
    weight = lower_module.build(program).graph.initializers["weight"].const_value.numpy()
    assert weight.__array_interface__["data"][0] == program.state_dict()["weight"].data_ptr()


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_other_opsets_run(opset: int) -> None:
    layer = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Softplus()).eval()
    program = capture(layer, torch.randn(2, 5, 8))
    model = lower(program, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    x = torch.randn(3, 5, 8)
    assert np.allclose(make_session(model).run(x.numpy())[0], program(x).detach().numpy(), atol=1e-5)


def test_training_mode_and_unknown_opset_are_errors() -> None:
    program = capture(Net(), torch.randn(2, 3, 8, 8))
    with pytest.raises(LoweringError, match="opset 7"):
        lower(program, opset=7)
    with pytest.raises(LoweringError, match="training"):
        lower(program.train())


REJECTED: list[tuple[str, Callable[..., Any], tuple[torch.Tensor, ...], str]] = [
    ("no row", lambda x: torch.fft.rfft(x).abs(), (torch.randn(2, 8),), "aten.fft_rfft.default"),
    ("random", lambda x: x + torch.rand(8), (torch.randn(2, 8),), "aten.rand.default"),
    ("indices", lambda x: F.max_pool2d(x, 2, return_indices=True), (torch.randn(2, 3, 8, 8),), "indices"),
    ("negative norm 0", lambda x: torch.linalg.vector_norm(x, 0), (torch.randn(2, 8),), "0-norm"),
    ("batch statistics", lambda x: F.batch_norm(x, None, None, training=True), (torch.randn(2, 8),), "statistics"),
    ("complex", lambda x: x.to(torch.complex64).abs(), (torch.randn(2, 8),), "complex64"),
]


@pytest.mark.parametrize("item", REJECTED, ids=lambda r: r[0])
def test_what_is_not_lowered_is_an_error_with_a_place_and_a_hint(item: Any) -> None:
    _, function, inputs, words = item
    program = capture(Call(function), inputs)
    with pytest.raises(LoweringError, match=words) as caught:
        lower(program)
    assert "test_lowering.py" in str(caught.value.where)
    assert caught.value.hint


def test_an_argument_that_a_row_does_not_declare_is_rejected() -> None:
    """`right` is an argument of bucketize with a default; the row below does not know it."""

    @row("aten.bucketize.Tensor")
    def bucketize(g: Any, x: Any, boundaries: Any) -> Any:
        return g.op("Identity", x)

    edges = torch.tensor([0.0, 1.0])
    with pytest.raises(LoweringError, match="right=True is not lowered"):
        lower(capture(Call(lambda x: torch.bucketize(x, edges, right=True)), torch.randn(2, 8)))
    lower(capture(Call(lambda x: torch.bucketize(x, edges)), torch.randn(2, 8)))


def test_two_rows_for_one_op_are_an_error() -> None:
    with pytest.raises(LoweringError, match="two rows"):

        @row("aten.relu.default")
        def another(g: Any, x: Any) -> Any:
            return x.value


def test_rows_are_listed_with_family_and_summary() -> None:
    rows = lowering_rows()
    assert len(rows) > 250
    assert rows["aten.conv2d.default"].family == "ops_conv"
    assert rows["aten.gelu.default"].summary.startswith("Gelu")


def test_write_makes_a_file_that_runs(tmp_path: Path) -> None:
    program = capture(Net(), torch.randn(2, 3, 8, 8))
    write(program, tmp_path / "deep" / "net.onnx")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["net.onnx"]
    x = torch.randn(1, 3, 8, 8)
    (y,) = make_session(tmp_path / "deep" / "net.onnx").run(x.numpy())
    assert np.allclose(y, program(x).detach().numpy(), atol=1e-5)


def test_large_weights_go_to_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(nn.Linear(64, 64), torch.randn(2, 64))
    monkeypatch.setattr(lower_module, "_EXTERNAL_ABOVE", 1000)
    write(program, tmp_path / "big.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data"}
    assert (tmp_path / "big.onnx").stat().st_size < 4000
    x = torch.randn(3, 64)
    (y,) = make_session(tmp_path / "big.onnx").run(x.numpy())
    assert np.allclose(y, program(x).detach().numpy(), atol=1e-5)


def test_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(capture(nn.Linear(4, 4), torch.randn(2, 4)), tmp_path / "file" / "net.onnx")


# -- quantized operators --------------------------------------------------------------------------------------------


def quantized(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    declare_operators()
    return capture(Call(function), inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantize_and_dequantize_round_and_saturate_alike(dtype: torch.dtype) -> None:
    def run(x: torch.Tensor) -> Any:
        q = torch.ops.fxpress.quantize(x, 0.5, 3, dtype)
        return q, torch.ops.fxpress.dequantize(q, 0.5, 3)

    program = quantized(run, torch.randn(2, 8))
    model = lower(program)
    onnx.checker.check_model(model, full_check=True)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear"]
    assert len([i for i in model.graph.initializer if i.data_type == 1]) == 1  # the scale is shared
    x = torch.cat([torch.arange(-8, 8) * 0.25, torch.tensor([1e6, -1e6, 0.0, 1e-9] * 4)]).view(4, 8)
    for ours, theirs in zip(make_session(model).run(x.numpy()), program.run_flat((x,))):
        assert np.array_equal(ours, theirs.numpy())


class QuantizedConv(nn.Module):
    """conv + relu as the quantizer writes it: int8 weights per channel, int32 bias, Q on both sides."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        shape = (4, 3, 3, 3) if name == "conv" else (4, 3)
        self.register_buffer("weight", torch.randint(-127, 128, shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.rand(4) * 0.01 + 0.001)
        self.register_buffer("bias", torch.randint(-500, 500, (4,), dtype=torch.int32))
        self.register_buffer("bias_scale", self.weight_scale * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.fxpress
        x = ops.dequantize(ops.quantize(x, 0.02, 128, torch.uint8), 0.02, 128)
        weight = ops.dequantize_channel(self.weight, self.weight_scale, 0)
        bias = ops.dequantize_channel(self.bias, self.bias_scale, 0)
        y = F.conv2d(x, weight, bias) if self.name == "conv" else F.linear(x, weight, bias)
        return ops.dequantize(ops.quantize(F.relu(y), 0.01, 0, torch.uint8), 0.01, 0)


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_quantized_layers_become_integer_kernels(name: str, tmp_path: Path) -> None:
    declare_operators()
    x = torch.randn(2, 3, 8, 8) if name == "conv" else torch.randn(2, 3)
    program = capture(QuantizedConv(name), x)
    model = lower(program)
    onnx.checker.check_model(model, full_check=True)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    assert kinds["weight"] == onnx.TensorProto.INT8
    assert kinds["bias"] == onnx.TensorProto.INT32
    session = make_session(model, optimized_path=tmp_path / "optimized.onnx")
    optimized = ops(onnx.load(tmp_path / "optimized.onnx"))
    assert ("QLinearConv" if name == "conv" else "QGemm") in optimized
    (ours,) = session.run(x.numpy())
    assert np.abs(ours - program(x).numpy()).max() <= 0.01 * 1.001  # one step


def test_integers_flow_through_data_movement() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.fxpress.quantize(x, 0.1, 0, torch.int8)
        q = torch.cat([q, q.flip(1)], 1).transpose(1, 2).reshape(x.shape[0], -1, 4)[:, 1:].permute(0, 2, 1)
        q = torch.stack(torch.unbind(q, 1), 1).expand(-1, -1, -1).repeat(1, 2, 1).unsqueeze(1)
        q = F.pad(q, (1, 1)).roll(1, 2)
        return torch.ops.fxpress.dequantize(q, 0.1, 0)

    program = quantized(run, torch.randn(2, 4, 6))
    x = torch.randn(5, 4, 6)
    (ours,) = make_session(lower(program)).run(x.numpy())
    assert np.array_equal(ours, program(x).numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_max_pool_and_resize_of_8_bit(dtype: torch.dtype) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.fxpress.quantize(x, 0.1, 5, dtype)
        return torch.ops.fxpress.dequantize(F.max_pool2d(q, 3, 2, 1, ceil_mode=True), 0.1, 5)

    program = quantized(run, torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    (ours,) = make_session(lower(program)).run(x.numpy())
    assert np.array_equal(ours, program(x).numpy())


def test_three_dimensional_quantized_linear_is_gemm() -> None:
    declare_operators()
    program = capture(QuantizedConv("linear"), torch.randn(2, 5, 3))
    model = lower(program)
    assert "Gemm" in ops(model)
    assert "MatMul" not in ops(model)
    x = torch.randn(4, 5, 3)
    (ours,) = make_session(model).run(x.numpy())
    assert np.abs(ours - program(x).numpy()).max() <= 0.01 * 1.001


# -- sessions -------------------------------------------------------------------------------------------------------


def test_session_checks_its_inputs() -> None:
    session = make_session(lower(capture(Net(), torch.randn(2, 3, 8, 8))))
    x = np.zeros((1, 3, 8, 8), np.float32)
    assert session.input_names == ("x",)
    assert session.run({"x": x})[0].shape == (1, 5)
    for bad in [(x, x), ({"y": x},), (x.astype(np.float64),), (x[:, :2],)]:
        with pytest.raises(DataError):
            session.run(*bad)
    with pytest.raises(FxpressError, match="refuses"):
        make_session(b"not a model")
    double = lower(capture(nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)))
    with pytest.raises(FxpressError, match="use float32"):
        make_session(double)
    with pytest.raises(FxpressError, match="threads"):
        make_session(b"", threads=0)
