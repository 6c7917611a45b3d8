"""Concatenated tensors share one scale where the outputs stay as good: the runtime then only copies bytes."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import fxpress
from fxpress.backends.targets import load_target
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.runtime.layers import check_layers

EXAMPLE = torch.zeros(2, 3, 16, 16)


class Branches(nn.Module):
    """Two branches, concatenated. What the right one gives, `ratio` times as large, is also read by a layer of its own
    that makes up for that."""

    def __init__(self, ratio: float = 1.0, relu: bool = True, signed: bool = False) -> None:
        super().__init__()
        self.left, self.right = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.relu, self.signed = relu, signed
        self.last, self.own = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            self.right.weight *= ratio
            self.right.bias *= ratio
            self.own.weight /= ratio

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.left(x), self.right(x)
        left = left.relu() if self.relu else left
        right = right if self.signed else right.relu()
        return self.last(torch.cat([left, right], 1)) + self.own(right)


def quantized(module: nn.Module, options: str = "") -> tuple[fxpress.Program, list[str]]:
    torch.manual_seed(1)
    program = fxpress.capture(module.eval(), (EXAMPLE,))
    context = Context(load_target("ort-x86"), [(torch.randn(16, 3, 16, 16),)])
    int8 = PassManager(f"cleanup,canonicalize,quantize{{{options}}}").run(program, context)
    return int8, [note for note in int8.log[-1].notes if "concatenated" in note]


def concat_scales(program: fxpress.Program) -> list[set[float]]:
    """Of each concatenation, the scales of its parts and of its result."""
    found = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.cat.default:
            around = [*node.all_input_nodes, *node.users]
            found.append({n.args[1] for n in around})
    return found


def make(**options: object) -> Branches:
    torch.manual_seed(0)
    return Branches(**options)  # type: ignore[arg-type]


def test_parts_of_alike_ranges_share_one_scale():
    int8, notes = quantized(make())
    assert [len(s) for s in concat_scales(int8)] == [1]
    assert notes[0].startswith("1 of 1 sets")
    layers = check_layers(int8, (torch.randn(3, 3, 16, 16),))
    assert layers.max_steps <= 1
    assert layers.share_equal > 0.999


def test_it_can_be_turned_off():
    int8, notes = quantized(make(), "tie=false")
    assert len(concat_scales(int8)[0]) > 1
    assert notes == []


def test_a_part_of_small_values_keeps_its_own_scale():
    """Under the scale of the large part it would have two steps left for the layer that reads it alone."""
    int8, notes = quantized(make(ratio=0.01))
    assert len(concat_scales(int8)[0]) > 1
    assert notes[0].startswith("0 of 1 sets")


def test_only_the_set_that_costs_too_much_is_left_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alike, self.apart = make(), make(ratio=0.01)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.alike(x) + self.apart(x)

    int8, notes = quantized(Both())
    assert sorted(len(s) for s in concat_scales(int8))[0] == 1
    assert sorted(len(s) for s in concat_scales(int8))[1] > 1
    assert notes[0].startswith("1 of 2 sets")


def test_an_activation_that_vanishes_keeps_zero_as_its_lower_bound():
    """A ReLU in front of a range with negative numbers would bring the convolution back to float."""
    int8, notes = quantized(make(signed=True))
    assert len(concat_scales(int8)[0]) > 1
    assert notes == []
    both, notes = quantized(make(relu=False, signed=True))
    assert [len(s) for s in concat_scales(both)] == [1]
    assert notes


def test_nested_concatenations_are_one_set():
    class Dense(nn.Module):
        """Every layer reads all before it."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(16, 8, 3, 1, 1)
            self.last = nn.Conv2d(24, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.first(x).relu()
            b = self.second(a).relu()
            c = self.third(torch.cat([a, b], 1)).relu()
            return self.last(torch.cat([a, b, c], 1)).mean((2, 3))

    torch.manual_seed(0)
    int8, notes = quantized(Dense())
    assert notes[0].startswith("1 of 1 sets")
    assert len(set.union(*concat_scales(int8))) == 1


@pytest.mark.parametrize("tie", [True, False])
def test_the_runtime_concatenates_integers_either_way(tie, tmp_path):
    import onnxruntime

    int8, _ = quantized(make(), f"tie={str(tie).lower()}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(fxpress.to_onnx(int8).SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == 4
    assert "QLinearConcat" in ops
