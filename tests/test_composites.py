"""Ops that capture writes out as plain ones give what they gave, and are pruned and exported like those."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.frontend.cost import op_name
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.planning import plan_pruning
from fxpress.runtime.verify import check_parity


class Cells(nn.Module):
    """Every kind of cell, with and without biases, unrolled over six steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(5, 16), nn.GRUCell(16, 12, bias=False)
        self.tanh, self.relu = nn.RNNCell(12, 8), nn.RNNCell(8, 8, nonlinearity="relu")
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 6, 5] -> [n, 3]."""
        h = c = torch.zeros(x.shape[0], 16)
        g, t, r = (torch.zeros(x.shape[0], n) for n in (12, 8, 8))
        for step in range(6):
            h, c = self.lstm(x[:, step], (h, c))
            g = self.gru(h, g)
            t = self.tanh(g, t)
            r = self.relu(t, r)
        return self.out(r)


@pytest.fixture(scope="module")
def cells() -> tuple[nn.Module, fxpress.Program]:
    torch.manual_seed(0)
    module = Cells().eval()
    return module, fxpress.capture(module, torch.randn(2, 6, 5))


def test_cells_are_written_out(cells: tuple[nn.Module, fxpress.Program]) -> None:
    module, program = cells
    assert not any("cell" in op_name(n) for n in program.graph.nodes)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 6, 5)
        torch.testing.assert_close(program(x), module(x))
    assert check_parity(program, fxpress.to_onnx(program)).max_relative < 1e-5


def test_hidden_sizes_of_cells_are_pruned(cells: tuple[nn.Module, fxpress.Program]) -> None:
    _, program = cells
    plan = plan_pruning(program, ratio=0.5)
    pruned = plan.apply(program)
    shapes = {n: tuple(t.shape) for n, t in pruned.state_dict().items()}
    assert shapes["lstm.weight_hh"] == (32, 8)
    assert shapes["gru.weight_ih"] == (18, 8)
    assert shapes["relu.weight_hh"] == (4, 4)
    assert oracle_error(plan.mask(program), pruned) <= 1e-9


@pytest.mark.parametrize("options", [{}, {"p": 1.0, "keepdim": True}, {"eps": 0.1}])
def test_pairwise_distance(options: dict[str, float]) -> None:
    class Net(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return F.pairwise_distance(a, b, **options)

    inputs = torch.randn(2, 7), torch.randn(2, 7)
    program = fxpress.capture(Net(), inputs)
    torch.testing.assert_close(program(*inputs), Net()(*inputs))
    assert check_parity(program, fxpress.to_onnx(program)).max_relative < 1e-5


class Between(nn.Module):
    """conv a -> something over its 16 channels -> conv b."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(x)))


def _gathered(x: torch.Tensor) -> torch.Tensor:
    """The tokens of the highest mean, as masked autoencoders and detectors choose them."""
    tokens = x.flatten(2).mT
    best = tokens.mean(2).topk(9, 1)[1]
    return torch.gather(tokens, 1, best.unsqueeze(-1).repeat(1, 1, tokens.shape[-1])).mT.reshape(-1, 16, 3, 3)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, (2, 3), keepdim=True)
    deviation, _ = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) + deviation


@pytest.mark.parametrize(
    "function",
    [
        _gathered,
        _normalized,
        lambda x: x.mean(1, keepdim=True).repeat(1, 16, 1, 1) * x,
        lambda x: x * ((x >= -1) & (x < 1) | (x > 2)).float(),
        lambda x: F.conv2d(x, (torch.ones(1, 1, 3, 3) / 9).repeat(16, 1, 1, 1), groups=16, padding=1),
    ],
)
def test_channels_are_pruned_through_what_is_written_out(function) -> None:
    torch.manual_seed(0)
    module = Between(function).eval()
    program = fxpress.capture(module, torch.randn(2, 3, 6, 6))
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program(x), module(x))
    plan = plan_pruning(program, ratio=0.5)
    pruned = plan.apply(program)
    assert pruned.state_dict()["a.weight"].shape[0] == 8
    assert pruned.state_dict()["b.weight"].shape[1] == 8
    assert oracle_error(plan.mask(program), pruned) < 1e-9
    assert check_parity(pruned, fxpress.to_onnx(pruned)).max_relative < 1e-5


def test_a_repeat_of_wider_dims_stays() -> None:
    program = fxpress.capture(Between(lambda x: x[:, :8].repeat(1, 2, 1, 1)), torch.randn(2, 3, 6, 6))
    assert any(op_name(n) == "aten.repeat" for n in program.graph.nodes)
