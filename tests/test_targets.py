"""All targets: number formats and their laws, and that each table's rows hold in the runtime that can run them here.

The patterns are those of ort-x86; `ort-arm` is rewritten by ONNX Runtime as on ARM (`Target.session`).
"""

from __future__ import annotations

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
from fxpress.backends.targets import load_target, target_names
from fxpress.errors import QuantizationError
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.passes.quantize.fold import quantize_weight, weight_scales
from fxpress.passes.quantize.spec import NumberFormat, Target, choose_params
from fxpress.runtime.verify import check_layers, check_parity

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
