"""All targets: number formats and their laws, and that each table's rows hold in the runtime that can run them here.

The patterns are those of ort-x86; `ort-arm` is rewritten by ONNX Runtime as on ARM (`Target.session`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxpress
from fxpress.backends.coverage import measure_coverage, optimized_graph
from fxpress.backends.onnx.lower import lower
from fxpress.backends.structure import check_structure, stored_coverage
from fxpress.backends.targets import load_target, target_names
from fxpress.errors import QuantizationError
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.passes.quantize.fold import quantize_weight, weight_scales
from fxpress.passes.quantize.spec import NumberFormat, Target, choose_params
from fxpress.runtime.layers import check_layers
from fxpress.runtime.verify import check_parity

PIPELINE = "cleanup,fuse-batchnorm,canonicalize,quantize{ranges=minmax}"


def _patterns() -> ModuleType:
    """The patterns of test_target_ort_x86.py; a module of its own, so that modules are fresh."""
    path = Path(__file__).with_name("test_target_ort_x86.py")
    spec = importlib.util.spec_from_file_location("ort_x86_patterns", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PATTERNS = _patterns()
SHAPE = (2, 8, 12, 12)


def quantized(module: nn.Module, target: Target, shape=SHAPE) -> fxpress.Program:
    torch.manual_seed(0)
    program = fxpress.capture(module.eval(), torch.randn(shape))
    return PassManager(PIPELINE).run(program, Context(target, [(torch.randn(shape),) for _ in range(3)]))


def kernels(model, target: Target) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in optimized_graph(model, session=target.session).node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


# -- the tables in ONNX Runtime -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ort-x86-avx2", "ort-arm"])
@pytest.mark.parametrize("pattern", [*PATTERNS.INTEGER, *PATTERNS.MOVES])
def test_rows_become_integer_kernels(name, pattern):
    target = load_target(name)
    program = quantized({**PATTERNS.INTEGER, **PATTERNS.MOVES}[pattern][0], target)
    model = lower(program)
    got = kernels(model, target)
    if pattern in PATTERNS.INTEGER:
        _, wanted, unwanted = PATTERNS.INTEGER[pattern]
        assert {op: got.get(op, 0) for op in wanted} == wanted, got
        assert not set(unwanted) & set(got), got
    else:
        assert any(op in got for op in PATTERNS.MOVES[pattern][1].split("|")), got
        assert got["QuantizeLinear"] == 1, got
    assert measure_coverage(model, session=target.session).integer_macs == 1.0
    # As it is loaded by default, too: on x86 signed integers become unsigned ones, with the same results.
    assert check_layers(program, (torch.randn(3, *SHAPE[1:]),)).max_steps <= 1


@pytest.mark.parametrize("name", ["ort-x86-avx2", "ort-arm"])
def test_tokens_become_integer_products(name):
    target = load_target(name)
    program = quantized(PATTERNS.Tokens(), target)
    assert kernels(lower(program), target).get("QGemm") == 5
    assert check_layers(program, (torch.randn(3, *SHAPE[1:]),)).max_steps <= 1


def test_arm_stores_signed_integers_and_relu_vanishes():
    program = quantized(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), load_target("ort-arm"))
    types = {n.args[3] for n in program.graph.nodes if n.target is torch.ops.fxpress.quantize.default}
    assert types == {torch.int8}
    assert not any(n.target is torch.ops.aten.relu.default for n in program.graph.nodes)
    # After the ReLU zero is the smallest stored number.
    assert -128 in [n.args[2] for n in program.graph.nodes if n.target is torch.ops.fxpress.quantize.default]


# -- formats --------------------------------------------------------------------------------------------------------

FORMATS = {
    "u8": (NumberFormat(torch.uint8), (0, 255)),
    "s8": (NumberFormat(torch.int8, symmetric=True), (-128, 127)),
    "s8 narrow": (NumberFormat(torch.int8, symmetric=True, narrow=True), (-127, 127)),
    "7 bits": (NumberFormat(torch.int8, symmetric=True, bits=7), (-64, 63)),
    "u16": (NumberFormat(torch.uint16), (0, 65535)),
    "s16": (NumberFormat(torch.int16, symmetric=True), (-32768, 32767)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_limits(name):
    form, limits = FORMATS[name]
    assert form.limits == limits


@pytest.mark.parametrize("name", FORMATS)
@given(low=st.floats(-50, 0), high=st.floats(0, 50))
@settings(max_examples=30, deadline=None)
def test_every_value_in_range_is_stored_within_half_a_step(name, low, high):
    form, (qmin, qmax) = FORMATS[name]
    params = choose_params(low, high, form)
    assert qmin <= params.zero_point <= qmax
    assert params.zero_point == 0 or not form.symmetric
    for x in (low, high, 0.0, (low + high) / 2):
        q = min(max(round(x / params.scale) + params.zero_point, qmin), qmax)
        # Rounding the zero point may cost the ends of an affine range another half step.
        assert abs((q - params.zero_point) * params.scale - x) <= params.scale * (0.5 if form.symmetric else 1.0) + 1e-5


def test_symmetric_needs_a_signed_type():
    with pytest.raises(QuantizationError, match="no negative numbers"):
        choose_params(-1, 1, NumberFormat(torch.uint8, symmetric=True))


def pairs_in_int16(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What `vpmaddubsw` gives: products of neighbours added in pairs, saturated to int16."""
    products = activations.to(torch.int32) * weights.to(torch.int32)
    return products.reshape(-1, 2).sum(1).clamp(-32768, 32767)


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_seven_bit_weights_cannot_saturate_pairs(seed, scale):
    """For every weight that folding can give and the largest activations. Eight bits do saturate: the test can fail."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 64, generator=generator) * scale
    largest = torch.full((4 * 64,), 255, dtype=torch.uint8)
    for form, saturates in ((load_target("ort-x86-avx2").weight, False), (load_target("ort-x86").weight, True)):
        q = quantize_weight(weight, weight_scales(weight, form, "minmax"), form).flatten()
        q = torch.cat([q, q[q.abs().argmax()].repeat(2)])  # two of the largest side by side
        activations = torch.cat([largest, largest[:2]])
        exact = (activations.int() * q.int()).reshape(-1, 2).sum(1)
        assert bool((pairs_in_int16(activations, q) != exact).any()) == saturates


def test_seven_bits_at_their_limits():
    low, high = load_target("ort-x86-avx2").weight.limits
    assert 2 * 255 * high <= 32767
    assert 2 * 255 * low >= -32768


@pytest.mark.parametrize("name", target_names())
def test_every_target_runs_in_pytorch_and_in_onnx_runtime(name):
    """Where the runtime is another one, the file is standard ONNX all the same, and computes what the program does."""
    program = quantized(PATTERNS.Residual(), load_target(name))
    assert check_layers(program, (torch.randn(4, *SHAPE[1:]),)).max_steps <= 1
    assert check_parity(program, lower(program)).output_within_1_step >= 0.99


# -- targets that are not here: the form of the file ----------------------------------------------------------------


def nodes_of(model, op: str) -> list:
    return [n for n in model.graph.node if n.op_type == op]


def makers(model) -> dict:
    return {o: n for n in model.graph.node for o in n.output}


@pytest.mark.parametrize("name", ["tensorrt", "qnn", "openvino"])
@pytest.mark.parametrize("pattern", ["residual", "silu", "squeeze and excite", "linear, linear", "split", "padded average pool"])
def test_files_have_the_form_that_the_target_asks_for(name, pattern):
    target = load_target(name)
    program = quantized({**PATTERNS.INTEGER, **PATTERNS.MOVES}[pattern][0], target)
    model = lower(program)
    assert check_structure(model, target) == []
    assert stored_coverage(model).integer_macs == 1.0
    assert check_layers(program, (torch.randn(3, *SHAPE[1:]),)).max_steps <= 1


def test_tokens_in_the_form_of_each_target():
    for name in ("tensorrt", "qnn", "openvino"):
        model = lower(quantized(PATTERNS.Tokens(), load_target(name)))
        assert check_structure(model, load_target(name)) == []
        kind = "MatMul" if name == "openvino" else "Gemm"
        assert {n.name.split("_")[0] for n in nodes_of(model, kind)} >= {"q", "k", "v"}


def test_structure_finds_what_another_target_wrote():
    model = lower(quantized(PATTERNS.Residual(), load_target("ort-x86")))
    found = "\n".join(check_structure(model, load_target("tensorrt")))
    assert "quantizes to uint8" in found
    assert "bias" in found
    found = "\n".join(check_structure(lower(quantized(PATTERNS.Residual(), load_target("tensorrt"))), load_target("qnn")))
    assert "quantizes to int8" in found
    assert "is not int32" in found


def test_tensorrt_quantizes_the_residual_and_not_the_branch_that_ends_in_a_layer():
    model = lower(quantized(PATTERNS.Residual(), load_target("tensorrt")))
    (add,) = nodes_of(model, "Add")
    assert sorted(makers(model)[i].op_type for i in add.input) == ["Conv", "DequantizeLinear"]
    # The Relu stays, in front of the quantization: zero is in the middle of the stored numbers.
    (relu,) = (n for n in nodes_of(model, "Relu") if n.input[0] == add.output[0])
    assert [n.op_type for n in model.graph.node if relu.output[0] in n.input] == ["QuantizeLinear"]
    # No bias is quantized.
    biases = {n.input[2] for n in nodes_of(model, "Conv")}
    assert biases <= {t.name for t in model.graph.initializer}


def test_symmetric_activations_do_not_absorb_relu_without_fusing_it():
    target = dataclasses.replace(load_target("ort-x86"), activation=NumberFormat(torch.int8, symmetric=True))
    program = quantized(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), target)
    assert any(n.target is torch.ops.aten.relu.default for n in program.graph.nodes)
    x = torch.randn(2, *SHAPE[1:])
    assert check_layers(program, (x,)).max_steps <= 1


def test_qnn_converts_between_eight_and_sixteen_bits():
    """conv (8) -> softmax (16) -> conv (8): the softmax reads and gives uint16, the convolutions uint8."""
    program = quantized(PATTERNS.Between(nn.Softmax(1)), load_target("qnn"))
    quantize, dequantize = torch.ops.fxpress.quantize.default, torch.ops.fxpress.dequantize.default
    types = [n.args[3] for n in program.graph.nodes if n.target is quantize]
    wide, narrow = torch.uint16, torch.uint8
    assert types == [narrow, narrow, wide, wide, narrow, narrow]
    (softmax,) = (n for n in program.graph.nodes if "softmax" in str(n.target))
    assert softmax.args[0].target is dequantize
    assert softmax.args[0].args[0].args[3] is wide
    assert check_layers(program, (torch.randn(3, *SHAPE[1:]),)).max_steps <= 1


def test_qnn_weights_of_linear_layers_have_one_scale():
    program = quantized(PATTERNS.Head(nn.Flatten(), 8 * 144), load_target("qnn"))
    scales = {k: v for k, v in program.state_dict().items() if k.endswith("weight_scale") and v.ndim == 1}
    (linear,) = (v for k, v in scales.items() if k.startswith("last"))
    (conv,) = (v for k, v in scales.items() if k.startswith("first"))
    assert len(set(linear.tolist())) == 1
    assert len(set(conv.tolist())) > 1


@pytest.mark.parametrize("name", ["tensorrt", "qnn"])
def test_the_report_says_what_was_not_run(name):
    module = PATTERNS.Residual().eval()
    data = [torch.randn(SHAPE)]
    report = fxpress.compile(module, (data[0],), calibration=data, target=name, recipe="int8").report
    promises = {p["name"]: p for p in report["promises"]}
    assert promises["structure"]["kept"]
    assert "not run" in promises["structure"]["detail"]
    (stage,) = (s for s in report["stages"] if s["pass"] == name)
    assert f"not run on {name} here" in stage["notes"][0]
    assert report["coverage"]["integer_macs"] == 1.0


def test_float_islands_of_a_target_that_is_not_here_have_its_reasons():
    data = [torch.randn(SHAPE)]
    report = fxpress.compile(PATTERNS.Tokens().eval(), (data[0],), calibration=data, target="tensorrt", recipe="int8").report
    assert report["coverage"]["integer_macs"] == pytest.approx(704 / (704 + 2304))  # attention is in float
    assert all(island["reason"] and island["hint"] for island in report["coverage"]["float_islands"])
    assert not any(island["reason"] == "it is written in float" for island in report["coverage"]["float_islands"])


def test_int8_moves_outside_integer_ops_load_on_x86():
    """ONNX Runtime on x86 makes int8 uint8 and then refuses its own graph; it is loaded without that."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            y = self.first(x)
            return torch.softmax(y.flatten(1), 1), self.last(y)

    program = quantized(Branches(), load_target("ort-arm"))
    assert check_parity(program, lower(program)).output_within_1_step >= 0.99


@pytest.mark.parametrize("name", ["ort-x86", "qnn"])
@pytest.mark.parametrize("ranges", ["auto", "mse"])
def test_the_range_of_an_output_is_not_clipped(name, ranges):
    """One large score among many small ones is what a classifier says: MobileNetV2 for qnn lost 7 points of top-1 by
    clipping it."""
    torch.manual_seed(0)
    last = nn.Conv2d(8, 8, 1, bias=False)
    x = torch.randn(16, 8, 12, 12)
    x[0, :, 0, 0] *= 40
    program = fxpress.capture(nn.Sequential(nn.Conv2d(8, 8, 1), last).eval(), x[:2])
    context = Context(load_target(name), [(x,)])
    made = PassManager(f"cleanup,quantize{{ranges={ranges}}}").run(program, context)
    (output,) = made.output_nodes()
    _, scale, zero_point = output.args
    wide = program(x).detach()
    assert (255 - zero_point) * scale >= 0.99 * wide.max()
    assert -zero_point * scale <= 0.99 * wide.min()
