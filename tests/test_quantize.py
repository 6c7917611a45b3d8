"""Quantization: what is annotated, what folding leaves, and that the simulation is what the runtime computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxpress
from fxpress.backends.coverage import measure_coverage
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.errors import DataError, FxpressError, QuantizationError
from fxpress.frontend.operators import dequantize, pixel_blocks, quantize
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, op_counts, run_passes
from fxpress.passes.quantize.annotate import annotate_program, annotation
from fxpress.passes.quantize.fold import fold_program, quantize_weight, weight_scales
from fxpress.passes.quantize.ranges import choose
from fxpress.passes.quantize.ranges.observers import Candidates
from fxpress.passes.quantize.ranges.rules import CANDIDATES, RULES
from fxpress.passes.quantize.stem import block_weights
from fxpress.runtime.layers import check_layers

TARGET = load_target("ort-x86")
PREPARE = "cleanup,fuse-batchnorm,canonicalize"


class Small(nn.Module):
    """Everything a CNN brings: residual, option-A-like pad, depthwise, gate, concat, pool, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())
        self.wide = nn.Conv2d(8, 12, 3, 1, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(x)
        x = x + y * self.gate(y)
        shortcut = nn.functional.pad(x, (0, 0, 0, 0, 2, 2))
        x = torch.cat([torch.relu(self.wide(x) + shortcut), x], 1)
        return self.head(nn.functional.avg_pool2d(x, x.shape[-1]).flatten(1))


def batches(count: int = 4, size: int = 4) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, 3, 16, 16, generator=generator),) for _ in range(count)]


def prepared(module: nn.Module | None = None, example=None) -> fxpress.Program:
    torch.manual_seed(0)
    module = (module or Small()).eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    program = fxpress.capture(module, torch.randn(2, 3, 16, 16) if example is None else example)
    return run_passes(program, PREPARE)


def context(data=None) -> Context:
    return Context(target=TARGET, calibration=batches() if data is None else data)


def quantized(program=None, pipeline="quantize", data=None) -> fxpress.Program:
    return PassManager(pipeline).run(program or prepared(), context(data))


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.pow(2).sum() / (reference - other).pow(2).sum()))


# -- the arithmetic ------------------------------------------------------------------------------------------------


def test_rounding_is_half_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9])
    assert quantize(x, 1.0, 10, torch.uint8).tolist() == [10, 12, 12, 10, 8, 255, 0]
    assert dequantize(quantize(x[:5], 1.0, 10, torch.uint8), 1.0, 10).tolist() == [0, 2, 2, 0, -2]


def test_weights_are_symmetric_per_channel_within_half_a_step():
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([1e-3, 1, 10, 0, 5, 1e2]).reshape(-1, 1, 1, 1)
    scales = weight_scales(weight, TARGET.weight, "minmax")
    q = quantize_weight(weight, scales)
    assert q.dtype is torch.int8
    assert q.abs().max() <= 127
    error = (q.float() * scales.reshape(-1, 1, 1, 1) - weight).abs()
    assert (error <= scales.reshape(-1, 1, 1, 1) * 0.5001).all()


def test_mse_weights_have_no_larger_error():
    weight = torch.rand(4, 20_000) - 0.5
    weight[:, 0] = 0.6  # a little clipping pays here
    errors = {}
    for rule in ("minmax", "mse"):
        scales = weight_scales(weight, TARGET.weight, rule)
        errors[rule] = ((quantize_weight(weight, scales).float() * scales[:, None] - weight) ** 2).sum(1)
    assert (errors["mse"] <= errors["minmax"] * 1.0001).all()
    assert (errors["mse"] < errors["minmax"]).any()


# -- annotation ----------------------------------------------------------------------------------------------------


def test_what_is_annotated():
    program = prepared()
    count, reasons = annotate_program(program, TARGET)
    kinds = {str(n.target).split(".")[1] for n in program.graph.nodes if annotation(n) is not None}
    assert {"conv2d", "linear", "add", "mul", "cat", "sigmoid", "adaptive_avg_pool2d", "constant_pad_nd", "flatten"} <= kinds
    assert reasons == []
    assert count >= 14


def test_float_layers_are_named_with_the_reason():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2, 2)
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(self.up(x))

    program = prepared(Odd())
    _, reasons = annotate_program(program, TARGET)
    assert len(reasons) == 1
    assert reasons[0].startswith("up stays in float: ONNX Runtime has no integer ConvTranspose")


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(QuantizationError, match="nothing of this program"):
        quantized(prepared(nn.Sequential(nn.Tanh())))


def test_arithmetic_between_float_ops_stays_float():
    class Residual(nn.Module):
        def forward(self, x):
            return torch.tanh(torch.tanh(x) + x)

    program = fxpress.capture(Residual(), torch.randn(2, 3))
    assert annotate_program(program, TARGET)[0] == 0


# -- folding -------------------------------------------------------------------------------------------------------


def test_folded_program_holds_integers_under_the_users_names():
    program = quantized()
    state = program.state_dict()
    assert state["wide.weight"].dtype is torch.int8
    assert state["wide.bias"].dtype is torch.int32
    assert state["wide.weight_scale"].shape == (12,)
    assert not [n for n, _ in program.named_parameters()], "no float parameter is left"
    counts = op_counts(program)
    assert "aten.hardtanh.default" not in counts, "ReLU6 is absorbed"
    assert "fxpress.observe.default" not in counts


def test_simulation_is_close_to_float_and_equal_to_the_runtime_within_a_step():
    program = prepared()
    int8 = quantized(program)
    (x,) = batches(1, 16)[0]
    assert sqnr(program(x), int8(x)) > 20
    parity = check_layers(int8, (x,))
    assert parity.max_steps <= 1
    assert parity.share_equal > 0.999


def test_every_rule_and_the_steps_one_by_one_agree():
    program = prepared()
    for rule in RULES:
        whole = quantized(program, f"quantize{{ranges={rule}}}")
        steps = quantized(program, f"annotate,observe{{ranges={rule}}},calibrate,fold")
        (x,) = batches(1)[0]
        assert torch.equal(whole(x), steps(x))
        assert sqnr(program(x), whole(x)) > 10


def test_auto_takes_the_best_rule_and_says_so():
    program = prepared()
    notes = " ".join(quantized(program).log[-1].notes)
    assert "ranges by" in notes
    assert notes.count(" dB") == len(CANDIDATES)


def test_result_does_not_depend_on_batching():
    """Up to the last bits: the float layers themselves sum in another order at another batch size."""
    program = prepared()
    data = torch.cat([b[0] for b in batches()])
    for rule in RULES:
        found = []
        for size in (1, 5, 16):
            int8 = quantized(program, f"quantize{{ranges={rule}}}", [(d,) for d in data.split(size)])
            nodes = [n for n in int8.graph.nodes if n.target is torch.ops.fxpress.quantize.default]
            found.append([n.args[1] for n in nodes])
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)


def test_argument_program_is_untouched():
    program = prepared()
    before = program.text()
    quantized(program)
    assert program.text() == before


def test_parts_of_a_split_that_only_float_ops_read():
    """One part goes to a layer, the other to a float op: both must come out of the integers as real numbers."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            first, second = self.a(x).chunk(2, 1)
            return torch.tanh(torch.cat([second, self.b(first)], 1))

    program = prepared(Split())
    (x,) = batches(1)[0]
    int8 = quantized(program)
    assert "aten.chunk.default" in op_counts(int8)
    assert sqnr(program(x), int8(x)) > 25


def test_integers_never_reach_a_float_op():
    program = prepared()
    for node in program.graph.nodes:
        node.meta.pop("quantize", None)
    observed = PassManager("annotate,observe,calibrate").run(program, context())
    move = next(n for n in observed.graph.nodes if (a := annotation(n)) is not None and a.row.kind == "move")
    outputs = [n for n in observed.graph.nodes if n.op == "output"]
    outputs[0].args = ((move,),)  # as if a float op read the move itself, not what is dequantized of it
    with pytest.raises(QuantizationError, match="reads integers"):
        fold_program(observed, TARGET, "minmax")


def test_shared_weights_are_quantized_for_each_reader():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x) * 4))

    module = Shared().eval()
    program = run_passes(fxpress.capture(module, torch.randn(2, 3, 16, 16)), PREPARE)
    int8 = quantized(program)
    (x,) = batches(1)[0]
    assert sqnr(program(x), int8(x)) > 20
    lower(int8)


def test_a_dead_channel_does_not_overflow_its_bias():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        module[0].weight[0] = 1e-20
        module[0].bias[0] = 3.0
    program = run_passes(fxpress.capture(module, torch.randn(2, 3, 16, 16)), PREPARE)
    int8 = quantized(program)
    (x,) = batches(1)[0]
    assert sqnr(program(x), int8(x)) > 25


def test_quantized_programs_are_saved_and_loaded(tmp_path):
    int8 = quantized()
    int8.save(tmp_path / "int8.pt2")
    (x,) = batches(1)[0]
    loaded = fxpress.Program.load(tmp_path / "int8.pt2")
    assert torch.equal(loaded(x), int8(x))
    assert lower(loaded).SerializeToString()


@pytest.mark.parametrize(
    ("scores", "samples", "best"),
    [
        ((30.4, 31.7, 30.8), 4, "minmax"),  # Inception, on four samples: on 32 the average is 3 dB worse
        ((31.2, 28.0, 30.9), 32, "minmax"),
        ((17.3, 20.5, 19.0), 32, "moving-average"),
        ((30.2, 19.5, 32.3), 32, "mse"),
        ((30.0, 30.6, 30.0), 32, "moving-average"),
        ((30.0, 30.6, 30.0), 8, "minmax"),
    ],
)
def test_a_rule_that_cuts_must_win_by_more_than_few_samples_can_tell(scores, samples, best):
    observer = Candidates()
    told = dict(zip(CANDIDATES, scores))
    notes, sqnr = choose._choose_rule([observer], lambda: told[observer.chosen], samples)
    assert observer.chosen == best
    assert sqnr == told[best]
    assert f"on {samples} calibration samples" in notes[0]


@given(
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    halves=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    channels=st.integers(1, 4),
)
@settings(deadline=None, max_examples=80)
def test_a_stem_over_blocks_is_the_same_convolution(kernel, pads, halves, channels):
    size = (2 * halves[0], 2 * halves[1])
    weight = torch.randint(-127, 128, (5, channels, *kernel)).double()
    x = torch.randint(0, 256, (2, channels, *size)).double()
    want = torch.nn.functional.conv2d(x, weight, stride=2, padding=pads)
    blocks, before, after = block_weights(weight, pads, size, tuple(want.shape[2:]))
    moved = torch.nn.functional.pad(pixel_blocks(x, 2), (before[1], after[1], before[0], after[0]))
    assert torch.equal(torch.nn.functional.conv2d(moved, blocks), want)


def test_stems_become_blocks_on_the_target_that_wants_them():
    program = prepared()
    assert op_counts(quantized(program))["fxpress.pixel_blocks.default"] == 1
    plain = dataclasses.replace(TARGET, stem_blocks=False)
    int8 = PassManager("quantize").run(program, Context(target=plain, calibration=batches()))
    assert "fxpress.pixel_blocks.default" not in op_counts(int8)
    (x,) = batches(1)[0]
    assert sqnr(int8(x), quantized(program)(x)) > 40


# -- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "ctx", "error", "message"),
    [
        ("quantize", Context(calibration=batches()), QuantizationError, "needs a target"),
        ("quantize", Context(target=TARGET), DataError, "needs calibration data"),
        ("quantize", Context(target=TARGET, calibration=[]), DataError, "empty"),
        ("annotate,observe,fold", Context(target=TARGET, calibration=batches()), QuantizationError, "seen no data"),
        ("calibrate", Context(target=TARGET, calibration=batches()), QuantizationError, "no observers"),
    ],
)
def test_mistakes_are_explained(pipeline, ctx, error, message):
    with pytest.raises(error) as caught:
        PassManager(pipeline).run(prepared(), ctx)
    assert message in str(caught.value)
    assert "hint:" in str(caught.value)


def test_nan_in_data_and_in_weights():
    bad = [(torch.full((2, 3, 16, 16), float("nan")),)]
    with pytest.raises(FxpressError, match="NaN"):
        quantized(data=bad)
    program = prepared()
    with torch.no_grad():
        dict(program.named_parameters())["wide.weight"][0] = float("nan")
    with pytest.raises(FxpressError, match="NaN"):
        quantized(program)


# -- what a user keeps in float ---------------------------------------------------------------------------------------


def float_layers(program: fxpress.Program) -> set[str]:
    """The float parameters of at least two dims that are left: those of layers that stay in float."""
    return {name for name, p in program.graph_module.named_parameters() if p.ndim >= 2}


@pytest.mark.parametrize(
    ("glob", "kept"),
    [
        ("wide", {"wide.weight"}),
        ("conv2d", {"stem.0.weight"}),
        ("wi*", {"wide.weight"}),
        ("gate", {"gate.1.weight", "gate.3.weight"}),
    ],
)
def test_keep_float_names_a_layer_a_node_or_a_module(glob, kept):
    int8 = quantized(pipeline=f"quantize{{keep_float={glob}}}")
    assert float_layers(int8) == kept
    check = check_layers(int8, batches()[0])
    assert check.kept


def test_keep_float_that_names_nothing_is_refused():
    with pytest.raises(fxpress.FxpressError, match="names no node"):
        quantized(pipeline="quantize{keep_float=stam}")


def test_pictures_with_channels_last_go_through_pools_of_integers():
    """PyTorch's pool of 8-bit numbers in that layout refuses more than 127 places."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(8, 3, 32, 32)
    int8 = fxpress.quantize(fxpress.capture(module, (x[:2],)), x)
    pool = next(n for n in int8.graph.nodes if "max_pool2d" in str(n.target))
    assert pool.meta["val"].dtype is torch.uint8
    assert torch.equal(int8(x), int8(x.contiguous(memory_format=torch.channels_last)))
    assert [n.op_type for n in fxpress.to_onnx(int8).graph.node].count("Identity") == 0


class ByHand(nn.Module):
    """Linear layers as people write them by hand: one matrix twice, with and without a vector added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(8, 16) * 0.3), nn.Parameter(torch.randn(16) * 0.1)
        self.second, self.third = nn.Parameter(torch.randn(6, 16) * 0.3), nn.Parameter(torch.randn(6, 4) * 0.3)

    def forward(self, x):
        y = torch.relu(self.bias + x @ self.first)
        return torch.relu(y @ self.second.T) @ self.third


@pytest.mark.parametrize("target", ["ort-x86", "ort-x86-avx2", "tensorrt", "qnn"])
@pytest.mark.parametrize("shape", [(16, 8), (16, 5, 8)])
def test_products_with_constant_matrices_are_layers(target, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    program = fxpress.capture(ByHand().eval(), x[:2])
    int8 = fxpress.quantize(program, x, target=target)
    assert sum(n.target is torch.ops.aten.linear.default for n in int8.graph.nodes) == 3
    if target.startswith("ort"):
        assert measure_coverage(fxpress.to_onnx(int8, target=target)).integer_macs == 1
    ours, theirs = int8(x), program(x)
    assert 10 * torch.log10(theirs.square().sum() / (theirs - ours).square().sum()) > 25
    layers = check_layers(int8, (x,))
    assert layers.kept
    assert layers.share_equal > 0.999
