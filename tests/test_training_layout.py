"""Where the channels of a value are, as the graph says it, and cross entropy with the classes there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxpress
from fxpress.training.layout import channel_dim
from fxpress.training.objectives import Batch, CrossEntropy


class Function(nn.Module):
    """Layers to choose from, and what is done with them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.LayerNorm(6)
        self.whole, self.linear = nn.LayerNorm([6, 6, 6]), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


# Every size but the batch is 6: shapes say nothing.
CASES = {
    "unknown": (lambda m, x: torch.relu(x), None),
    "conv": (lambda m, x: torch.relu(m.conv(x)) * m.scale, 1),
    "pool": (lambda m, x: F.max_pool2d(x, 3, 1, 1), 1),
    "whole norm": (lambda m, x: m.whole(m.conv(x)), 1),
    "linear": (lambda m, x: F.gelu(m.linear(x)) + x, 3),
    "first that knows": (lambda m, x: x + m.linear(x), 3),
    "channels last": (lambda m, x: m.norm(m.conv(x).permute(0, 2, 3, 1)), 3),
    "moved": (lambda m, x: m.conv(x).permute(0, 2, 3, 1), 3),
    "and back": (lambda m, x: m.linear(x).transpose(1, -1), 1),
    "beside": (lambda m, x: m.conv(x).transpose(2, 3), 1),
    "tokens": (lambda m, x: m.conv(x).flatten(2).transpose(1, 2), 2),
    "places": (lambda m, x: m.conv(x).flatten(2), 1),
    "mixed": (lambda m, x: m.conv(x).flatten(1, 2), None),
    "windows": (lambda m, x: m.linear(x).reshape(-1, 3, 12, 6), 3),
    "pieces": (lambda m, x: torch.cat(m.conv(x).chunk(2, 1), 1), 1),
    "recurrent": (lambda m, x: m.lstm(x[:, 0])[0], 2),
    "product": (lambda m, x: torch.matmul(x, x.transpose(2, 3)), 3),
    "letters": (lambda m, x: torch.einsum("nchw,ncwk->nckh", m.conv(x), x), None),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_are_followed_through_the_graph(case):
    function, expected = CASES[case]
    program = fxpress.capture(Function(function).eval(), torch.randn(2, 6, 6, 6))
    assert channel_dim(program.output_nodes()[0]) == expected


def loss(function, labels: torch.Tensor, size: int) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    module, x = Function(function).eval(), torch.randn(4, 6, size, 6)
    program = fxpress.capture(module, x[:2])
    return float(CrossEntropy()(program, Batch((x,), labels)).detach()), module(x).detach()


@pytest.mark.parametrize("size", [5, 6])
def test_cross_entropy_takes_the_classes_of_tokens_from_the_last_dimension(size):
    labels = torch.randint(6, (4, size))
    got, output = loss(lambda m, x: m.linear(x[:, 0]), labels, size)
    assert got == pytest.approx(float(F.cross_entropy(output.flatten(0, 1), labels.flatten())))


@pytest.mark.parametrize("size", [5, 6])
def test_and_those_of_places_from_the_second(size):
    labels = torch.randint(6, (4, size))
    got, output = loss(lambda m, x: m.conv(x).mean(3, keepdim=True).flatten(2), labels, size)
    assert got == pytest.approx(float(F.cross_entropy(output, labels)))
