"""Verification must find what is wrong, and find nothing where nothing is wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from fxpress.backends.onnx.lower import lower
from fxpress.errors import DataError, VerificationError
from fxpress.frontend.capture import capture
from fxpress.frontend.operators import declare_operators, quantize
from fxpress.frontend.program import Program, set_attribute
from fxpress.passes.rewrite import argument, aten, call_after, call_before, find, put_constant, set_argument
from fxpress.passes.verify import refresh_values
from fxpress.runtime.cut import cut_program, quantized_sites
from fxpress.runtime.feed import random_inputs
from fxpress.runtime.layers import check_layers, layer_table
from fxpress.runtime.verify import check_parity, differences


class Net(nn.Module):
    """Two convolutions with a shortcut, pooling, a classifier and a float tail."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        y = y + self.b(y)
        return self.head(y.mean((2, 3))).softmax(-1)


def float_program() -> Program:
    return capture(Net(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def quantized_program(program: Program) -> Program:
    """Quantize by hand, in the form that the quantizer promises: `quantize` nodes name the float node they hold."""
    declare_operators()
    program = program.copy()
    scales = {"x": 0.03, "relu": 0.012, "add": 0.02, "mean": 0.01}
    nodes = {n.name: n for n in program.graph.nodes}
    for name, scale in scales.items():
        _quantize_value(nodes[name], scale, 128 if name != "relu" else 0)
    for layer in find(program, aten.conv2d.default, aten.linear.default):
        _quantize_weights(program, layer)
    program.graph.lint()
    program.graph_module.recompile()
    refresh_values(program)
    return program


def _quantize_value(node: Any, scale: float, zero_point: int) -> None:
    ops = torch.ops.fxpress
    readers = list(node.users)
    q = call_after(node, ops.quantize.default, node, scale, zero_point, torch.uint8)
    q.meta["custom"] = {"layer": node.name}
    x = call_after(q, ops.dequantize.default, q, scale, zero_point)
    for reader in readers:
        reader.replace_input_with(node, x)


def _quantize_weights(program: Program, layer: Any) -> None:
    """int8 weights with a scale per output channel; int32 bias with the scale of input times weights."""
    weight, bias = (program.state_dict()[str(argument(layer, n).target)] for n in ("weight", "bias"))
    scale = weight.abs().amax(tuple(range(1, weight.ndim))) / 127
    _quantize_constant(program, layer, "weight", weight, scale, torch.int8)
    _quantize_constant(program, layer, "bias", bias, scale * layer.args[0].args[1], torch.int32)


def _quantize_constant(
    program: Program, layer: Any, name: str, value: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> None:
    path = str(argument(layer, name).target)
    integers = (value / scale.reshape(-1, *[1] * (value.ndim - 1))).round().to(dtype)
    stored = put_constant(program, f"q.{path}", integers, layer)
    scales = put_constant(program, f"s.{path}", scale, layer)
    set_argument(layer, name, call_before(layer, torch.ops.fxpress.dequantize_channel.default, stored, scales, 0))


def changed(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    """The model with one initializer scaled."""
    model = copy.deepcopy(model)
    for item in model.graph.initializer:
        if item.name == name:
            value = numpy_helper.to_array(item)
            item.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), name))
            return model
    raise KeyError(name)


# -- whole programs -------------------------------------------------------------------------------------------------


def test_a_right_file_passes_at_all_batches() -> None:
    program = float_program()
    parity = check_parity(program, lower(program), real_inputs=(torch.randn(3, 3, 8, 8),))
    assert parity.batches == (1, 2, 5)
    assert parity.kept
    assert parity.max_relative < 1e-5
    assert parity.output_within_1_step == 1.0
    assert parity.smallest_reference > 0.1
    assert not parity.quantized


def test_a_wrong_weight_is_found() -> None:
    program = float_program()
    parity = check_parity(program, changed(lower(program), "head.bias", 1.01))
    assert parity.max_relative > 1e-4
    assert not parity.kept
    assert parity.output_within_1_step < 1.0


def test_a_fixed_batch_is_checked_at_its_own_batch() -> None:
    program = capture(Net(), torch.randn(3, 3, 8, 8), dynamic_batch=False)
    parity = check_parity(program, lower(program), real_inputs=(torch.randn(3, 3, 8, 8),))
    assert parity.batches == (3,)
    assert parity.kept


def test_nan_in_one_only_is_an_infinite_difference() -> None:
    a, b = np.array([1.0, np.nan]), np.array([1.0, 2.0])
    assert differences(a, b)[0] == np.inf
    assert differences(a, a)[0] == 0
    assert differences(np.array([np.inf]), np.array([-np.inf]))[0] == np.inf
    assert differences(np.zeros(0), np.zeros(0)) == (0, 0)


def test_random_inputs_have_the_range_of_the_examples() -> None:
    class Lookup(nn.Module):
        def forward(self, ids: torch.Tensor, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
            return (ids + flag).float().mean() + x

    ids = torch.randint(3, 17, (2, 50))
    program = capture(Lookup(), (ids, torch.randn(2, 200) * 40 + 100, torch.ones(2, 1, dtype=torch.bool)))
    drawn = random_inputs(program, 5, torch.Generator().manual_seed(0))
    assert [tuple(x.shape) for x in drawn] == [(5, 50), (5, 200), (5, 1)]
    assert drawn[0].min() >= 3
    assert drawn[0].max() <= 16
    assert 20 < drawn[1].std() < 60
    assert drawn[2].dtype == torch.bool
    assert check_parity(program, lower(program)).kept


def test_a_squeezed_batch_of_one_is_compared_and_told() -> None:
    class Squeeze(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3), keepdim=True).squeeze()

    program = capture(Squeeze(), torch.randn(2, 3, 8, 8))
    parity = check_parity(program, lower(program))
    assert parity.squeezed
    assert parity.kept


def test_wrong_number_of_inputs_and_other_shapes_are_errors() -> None:
    program = float_program()
    with pytest.raises(DataError, match="takes 1 inputs"):
        check_parity(program, lower(program), real_inputs=())
    with pytest.raises(DataError, match="empty"):
        check_parity(program, lower(program), real_inputs=(torch.zeros(0, 3, 8, 8),))
    other = capture(nn.Sequential(Net(), nn.Linear(5, 4)), torch.randn(2, 3, 8, 8))
    with pytest.raises(VerificationError, match="PyTorch gives"):
        check_parity(program, _renamed(lower(other)))


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its input called x, whatever it is called."""
    old = model.graph.input[0].name
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        node.input[:] = ["x" if i == old else i for i in node.input]
    return model


# -- layers ---------------------------------------------------------------------------------------------------------


def test_sites_are_the_quantized_activations() -> None:
    program = quantized_program(float_program())
    sites = quantized_sites(program)
    assert [s.layer for s in sites] == ["x", "relu", "add", "mean"]
    assert sites[1].bounds == (0.0, pytest.approx(255 * 0.012))
    assert quantized_sites(float_program()) == ()


def test_the_cut_program_computes_each_layer_from_the_integers_it_is_fed() -> None:
    program = quantized_program(float_program())
    cut = cut_program(program)
    assert [i.name for i in cut.program.inputs][1:] == [f"{s.node.name}_in" for s in cut.sites]
    x = torch.randn(2, 3, 8, 8)
    fed = [torch.randint(0, 256, s.node.meta["val"].shape[1:], dtype=torch.uint8)[None].repeat_interleave(2, 0) for s in cut.sites]
    with torch.no_grad():
        first = cut.program.graph_module(x, *fed)
        second = cut.program.graph_module(x, fed[0], fed[1], fed[2] * 0, fed[3])
    assert torch.equal(first[0], quantize(x, 0.03, 128, torch.uint8))
    assert torch.equal(first[2], second[2])  # reads sites 0 and 1 only
    assert not torch.equal(first[3], second[3])  # reads site 2


def test_each_layer_is_within_one_step() -> None:
    program = quantized_program(float_program())
    parity = check_layers(program, (torch.randn(4, 3, 8, 8),))
    assert [layer.name for layer in parity.layers] == ["x", "relu", "add", "mean"]
    assert parity.max_steps <= 1
    assert parity.share_equal > 0.99
    assert parity.output_relative < 1e-4
    assert parity.kept


def test_a_wrong_layer_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gets another weight than the simulation: only the layer that reads it is off."""
    from fxpress.runtime import layers

    program = quantized_program(float_program())
    monkeypatch.setattr(layers, "lower", lambda p: changed(lower(p), "s.b.weight", 1.3))
    parity = check_layers(program, (torch.randn(2, 3, 8, 8),))
    assert {layer.name for layer in parity.layers if layer.max_steps > 1} == {"add"}
    assert not parity.kept


def test_quantized_parity_end_to_end_counts_steps() -> None:
    program = quantized_program(float_program())
    parity = check_parity(program, lower(program))
    assert parity.quantized
    assert parity.kept
    assert parity.output_within_1_step > 0.9


def test_layers_of_a_float_program_are_an_error() -> None:
    with pytest.raises(VerificationError, match="no quantized"):
        check_layers(float_program(), (torch.randn(2, 3, 8, 8),))


def test_layer_table_tells_isolated_from_accumulated() -> None:
    reference = float_program()
    rows = layer_table(reference, quantized_program(reference), (torch.randn(4, 3, 8, 8),))
    assert [r.name for r in rows] == ["x", "relu", "add", "mean"]
    assert [r.op for r in rows] == ["input", "relu", "add", "mean"]
    json.dumps([asdict(r) for r in rows], allow_nan=False)
    assert all(20 < r.sqnr_isolated_db < 60 for r in rows)
    assert rows[0].sqnr_isolated_db == rows[0].sqnr_accumulated_db
    assert rows[3].sqnr_isolated_db > rows[3].sqnr_accumulated_db - 1
    assert rows[1].bytes == 8 * 3 * 9 + 8 * 4 + 8 * 4 + 8 * 4  # int8 weights, int32 bias, two float scales
    assert rows[2].bytes == 8 * 8 * 9 + 3 * 8 * 4
    assert rows[3].bytes == 0


def test_a_bad_layer_shows_in_its_own_row() -> None:
    """Halving the weights of one layer ruins its isolated row and leaves the others' alone."""
    reference = float_program()
    program = quantized_program(reference)
    before = layer_table(reference, program, (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)),))
    weights = program.state_dict()["q.b.weight"]
    set_attribute(program.graph_module, "q.b.weight", weights // 2)
    after = layer_table(reference, program, (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)),))
    assert after[2].sqnr_isolated_db < before[2].sqnr_isolated_db - 10
    assert after[1] == before[1]
    assert after[3].sqnr_isolated_db == before[3].sqnr_isolated_db
    assert after[3].sqnr_accumulated_db < before[3].sqnr_accumulated_db


def test_an_exact_layer_is_capped_not_infinite() -> None:
    class Copy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x) + 0.0

    reference = capture(Copy(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    program = reference.copy()
    declare_operators()
    (relu,) = find(program, aten.relu.default)
    _quantize_value(relu, 1.0, 0)
    program.graph_module.recompile()
    refresh_values(program)
    (line,) = layer_table(reference, program, (torch.tensor([[1.0, 2.0]]),))
    assert line.sqnr_isolated_db == 200.0
    (line,) = layer_table(reference, program, (torch.zeros(1, 2),))
    assert line.sqnr_isolated_db == 200.0


def test_rows_without_a_float_value_are_empty_not_wrong() -> None:
    reference = float_program()
    program = quantized_program(reference)
    for site in quantized_sites(program):
        if site.layer == "add":
            site.node.meta["custom"] = {"layer": "gone"}
    row = layer_table(reference, program, (torch.randn(2, 3, 8, 8),))[2]
    assert row.sqnr_isolated_db is None
    assert row.sqnr_accumulated_db is None


def test_moves_on_integers_between_layers() -> None:
    """Max pooling between quantize and dequantize belongs to the layer after it."""
    declare_operators()

    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ops = torch.ops.fxpress
            q = F.max_pool2d(ops.quantize(x, 0.03, 100, torch.uint8), 2)
            y = ops.dequantize(q, 0.03, 100) * 0.7
            return ops.dequantize(ops.quantize(y, 0.02, 100, torch.uint8), 0.02, 100)

    program = capture(Pool(), torch.randn(2, 3, 8, 8))
    parity = check_layers(program, (torch.randn(3, 3, 8, 8),))
    assert len(parity.layers) == 2
    assert parity.max_steps <= 1
    assert check_parity(program, lower(program)).output_within_1_step == 1.0
