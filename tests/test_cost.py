"""MACs, parameters and bytes against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.frontend.cost import cost_table, count_macs, parameter_bytes


def macs(module: nn.Module, *shape: int, dynamic_batch: bool = True) -> int:
    return count_macs(fxpress.capture(module.eval(), (torch.randn(shape),), dynamic_batch=dynamic_batch))


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 10), 8 * 100 * 27),
        (nn.Conv2d(8, 16, 3, stride=2, groups=4), (2, 8, 11, 11), 16 * 25 * 2 * 9),
        (nn.Conv2d(8, 8, 5, groups=8, padding=2), (2, 8, 6, 6), 8 * 36 * 25),
        (nn.Conv1d(3, 4, 3), (2, 3, 12), 4 * 10 * 9),
        (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4), 4 * 27 * 16),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5), 25 * 4 * 3 * 9),
        (nn.Linear(7, 9), (2, 7), 63),
        (nn.Linear(7, 9), (2, 5, 7), 5 * 63),
    ],
)
@pytest.mark.parametrize("batch", [2, 4])
def test_macs_of_one_example(module: nn.Module, shape: tuple[int, ...], expected: int, batch: int) -> None:
    assert macs(module, batch, *shape[1:]) == expected
    assert macs(module, batch, *shape[1:], dynamic_batch=False) == expected


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(x, x, x)
        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_both_products(fused: bool) -> None:
    assert macs(Attention(fused), 2, 3, 7, 8) == 2 * 3 * 7 * 7 * 8


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(F.relu(self.conv(x))))


def test_a_shared_layer_works_twice_and_weighs_once() -> None:
    program = fxpress.capture(Shared().eval(), (torch.randn(2, 4, 6, 6),))
    first, second, norm = cost_table(program)
    assert first.macs == second.macs == 4 * 36 * 36
    assert (first.parameters, second.parameters, norm.parameters) == (4 * 36 + 4, 0, 8)
    assert sum(row.parameters for row in cost_table(program)) == program.parameter_count
    # Weights and bias of both layers, and the two running statistics, in float32.
    assert parameter_bytes(program) == 4 * (4 * 36 + 4 + 8 + 8)


def test_an_example_without_a_batch_is_one_example() -> None:
    assert macs(nn.Conv2d(3, 8, 3, padding=1), 3, 10, 10, dynamic_batch=False) == 8 * 100 * 27


def test_names_are_the_users() -> None:
    program = fxpress.capture(Shared().eval(), (torch.randn(2, 4, 6, 6),))
    assert [row.name for row in cost_table(program)] == ["conv", "conv", "norm"]
    assert "aten.conv2d" in str(cost_table(program)[0])


def test_quantized_weights_are_counted_through_their_dequantize() -> None:
    from fxpress.frontend.operators import declare_operators

    declare_operators()

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(6, 3, 3, 3, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, torch.ops.fxpress.dequantize_channel(self.weight, self.scale, 0))

    program = fxpress.capture(Quantized().eval(), (torch.randn(2, 3, 5, 5),))
    (row,) = cost_table(program)
    assert (row.macs, row.parameters, row.bytes) == (6 * 9 * 27, 162, 162)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        y, _ = self.rnn(x)
        return torch.einsum("btc,bsc->bts", y, y)


def test_recurrent_layers_and_einsum_are_counted_alike_here_and_in_the_file():
    from fxpress.backends.coverage import node_macs
    from fxpress.backends.onnx.lower import lower

    program = fxpress.capture(Recurrent().eval(), torch.randn(2, 7, 6))
    lstm = 7 * 2 * (4 * 5 * (6 + 5) + 4 * 5 * (10 + 5))
    assert count_macs(program) == lstm + 7 * 7 * 10
    assert sum(dict(node_macs(lower(program))).values()) == lstm + 7 * 7 * 10
