"""Processors with and without VNNI: right numbers on both, and a word about it where they cost speed."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target, target_names
from fxpress.compilation import placing
from fxpress.errors import OptionError
from fxpress.runtime import processor, session
from fxpress.runtime.layers import check_layers
from fxpress.runtime.session import Session, make_session


class Loud(nn.Module):
    """Two layers of one width, whose weights and inputs are all at the end of their range: pairs are 2 * 255 * 127."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 1, bias=False) for _ in range(2))
        self.last = nn.Linear(16, 16)
        for layer in (self.first, self.second, self.last):
            nn.init.constant_(layer.weight, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 16, 4, 4] in [0, 1] -> [n, 16]."""
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture
def loud():
    x = torch.linspace(0, 1, 4 * 16 * 4 * 4).reshape(4, 16, 4, 4)
    return fxpress.capture(Loud(), (x,)), x


@pytest.mark.parametrize("target", ["ort-x86", "ort-x86-avx2", "ort-arm"])
def test_the_largest_products_are_exact_on_any_processor(loud, target):
    program, x = loud
    quantized = fxpress.quantize(program, (x,), target=target)
    parity = check_layers(quantized, (x,))
    assert parity.max_steps <= (1 if target == "ort-arm" else 0)


class Depthwise(Loud):
    """The same, the second layer depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        nn.init.constant_(self.second.weight, 0.1)


@pytest.mark.parametrize("network", [Loud, Depthwise])
def test_models_for_avx2_are_exact_as_anyone_loads_them(loud, network):
    x = loud[1]
    quantized = fxpress.quantize(fxpress.capture(network(), (x,)), (x,), target="ort-x86-avx2")

    def load(model):
        return Session(onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]))

    assert check_layers(quantized, (x,), load).max_steps == 0
    largest = {int(t.abs().max()) for t in quantized.state_dict().values() if t.dtype == torch.int8}
    assert largest == ({63, 127} if network is Depthwise else {63})


def test_the_probe_agrees_with_a_model(loud):
    """Where it says that products saturate, a model of eight bits is wrong with the runtime's own options, else right."""
    program, x = loud
    model = lower(fxpress.quantize(program, (x,)))
    plain = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = plain.run(None, {plain.get_inputs()[0].name: x.numpy()})
    (exact,) = make_session(model).run(x.numpy())
    assert bool(np.abs(found - exact).max() > 0.1 * np.abs(exact).max()) == processor.saturates()


@pytest.mark.parametrize("saturating", [True, False])
def test_exact_products_are_asked_for_only_where_they_saturate(monkeypatch, loud, saturating):
    """With AMX the option takes the fast kernels away: resnet18 was as slow on integers as in float."""
    monkeypatch.setattr(session, "saturates", lambda: saturating)
    asked = []
    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", lambda _, name, value: asked.append((name, value)))
    make_session(lower(loud[0]))
    assert (("session.x64quantprecision", "1") in asked) == saturating


def test_no_two_weights_share_a_zero_point(loud):
    """ONNX Runtime refuses such files where it makes weights unsigned, which it does without VNNI."""
    program, x = loud
    graph = lower(fxpress.quantize(program, (x,))).graph
    stored = {t.name for t in graph.initializer}
    zero_points = [n.input[2] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    weights = [z for z in zero_points if next(t for t in graph.initializer if t.name == z).data_type == 3]
    assert len(weights) == len(set(weights)) == 3


def test_the_probe_is_the_model_it_says():
    """All weights 127: an input of 255s gives 200 steps where sums are exact."""
    constants = {
        "one": np.array(1, np.float32),
        "none": np.array(0, np.uint8),
        "w": np.full((64, 16), 127, np.int8),
        "w_none": np.array(0, np.int8),
        "scale": np.array(64 * 255 * 127 / 200, np.float32),
    }
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", ["x", "one", "none", "w", "one", "w_none", "scale", "none"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 16])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert onnx.load_from_string(zlib.decompress(base64.b64decode(processor._PRODUCT))) == model


@pytest.mark.parametrize(("saturating", "name"), [(True, "ort-x86-avx2"), (False, "ort-x86")])
def test_the_native_target(monkeypatch, saturating, name):
    monkeypatch.setattr(processor, "saturates", lambda: saturating)
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert processor.native_target() == name
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor.native_target() == "ort-arm"


@pytest.mark.parametrize("name", target_names())
def test_only_weights_of_seven_bits_are_safe(name):
    assert load_target(name).may_saturate == (name != "ort-x86-avx2")


@pytest.mark.parametrize("saturating", [True, False])
def test_a_report_says_where_the_processor_is_another(monkeypatch, loud, saturating):
    """The speed of a model for VNNI is not judged without it, its numbers are, and the report says why."""
    program, x = loud
    monkeypatch.setattr(placing, "saturates", lambda: saturating)
    report = fxpress.compile(program, calibration=(x,)).report
    promises = {p["name"]: p for p in report["promises"]}
    assert promises["parity"]["kept"]
    assert ("no VNNI" in promises["parity"]["detail"]) == saturating
    assert ("not-slower" in promises) != saturating
    for target in ("ort-x86-avx2", "ort-arm"):
        assert placing.without_vnni(load_target(target)) == ""


@pytest.mark.parametrize(("machine", "here"), [("x86_64", "ort-x86"), ("AMD64", "ort-x86"), ("aarch64", "ort-arm"), ("arm64", "ort-arm")])
def test_speed_is_judged_on_the_processor_that_a_target_is_for(monkeypatch, machine, here):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(placing, "saturates", lambda: False)
    judged = {name for name in target_names() if placing.runs_here(load_target(name))}
    assert judged == ({here} if here == "ort-arm" else {here, "ort-x86-avx2"})


def test_tuning_for_another_processor_is_refused(monkeypatch, loud):
    program, x = loud
    monkeypatch.setattr(placing, "saturates", lambda: True)
    with pytest.raises(OptionError, match="this processor has no VNNI"):
        fxpress.compile(program, calibration=(x,), tune=True)
