"""Programs of which not every input has the batch: a mask behind the one that has, a scalar before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxpress
from fxpress.frontend.batch_dim import batch_name, batched, count_examples, some_examples
from fxpress.frontend.batches import as_batches
from fxpress.passes.quantize.accuracy.trials import split_samples
from fxpress.passes.quantize.running import in_parts


class Masked(nn.Module):
    """Tokens that are mixed by a matrix of the caller's, the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [n, 16, 8] and mask [16, 16]."""
        return self.two(torch.relu(mask @ self.one(x)))


class Scaled(nn.Module):
    """A scalar beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * t


MASKED = (torch.randn(12, 16, 8), torch.rand(16, 16))
SCALED = (torch.tensor(0.5), torch.randn(12, 8))


@pytest.mark.parametrize(("module", "inputs", "which"), [(Masked(), MASKED, 0), (Scaled(), SCALED, 1)])
def test_examples_are_counted_and_cut_where_the_batch_is(module, inputs, which):
    program = fxpress.capture(module, inputs)
    assert batched(program.inputs) == (which == 0, which == 1)
    assert batch_name(program.inputs) is not None
    assert count_examples(program.inputs, inputs) == 12
    cut = some_examples(program.inputs, inputs, slice(2, 5))
    assert cut[which].shape[0] == 3
    assert cut[1 - which] is inputs[1 - which]
    assert count_examples(program.inputs, as_batches(program, [inputs]).first(7)) == 7
    assert sum(count_examples(program.inputs, p) for p in in_parts(program, inputs)) == 12
    split = split_samples(program, [inputs], 100, 100, "test")
    assert [sum(count_examples(program.inputs, b) for b in part) for part in (split.fit, split.judge)] == [9, 3]


@pytest.mark.parametrize("pipeline", [None, "cleanup,quantize{ranges=minmax},correct-bias,learn-rounding{steps=2}"])
@pytest.mark.parametrize(("module", "inputs"), [(Masked(), MASKED), (Scaled(), SCALED)])
def test_such_programs_are_compiled(module, inputs, pipeline):
    artifact = fxpress.compile(module, inputs, calibration=[inputs] * 2, pipeline=pipeline)
    assert artifact.kept
    parity = artifact.report["parity"]
    assert parity["batches"] == [1, 2, 5]
    assert parity["layer_max_steps"] <= 1


def test_such_programs_stay_in_float():
    for module, inputs in ((Masked(), MASKED), (Scaled(), SCALED)):
        assert fxpress.compile(module, inputs, recipe="float").report["parity"]["batches"] == [1, 2, 5]


class Inside(nn.Module):
    """The batch is the second dim between two layers: [tokens, batch, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x.transpose(0, 1)))).transpose(0, 1)


def test_ranges_do_not_depend_on_batching_where_the_batch_is_inside():
    """The average of the samples' own ranges: 24 tokens are no samples."""
    torch.manual_seed(0)
    x = torch.randn(24, 24, 8) * torch.linspace(0.2, 4, 24)[:, None, None]
    program = fxpress.capture(Inside(), x[:2])
    found = []
    for size in (1, 3, 12):
        quantized = fxpress.quantize(program, x.split(size), ranges="moving-average")
        nodes = [n for n in quantized.graph.nodes if str(n.target) == "fxpress.quantize.default"]
        found.append([n.args[1] for n in nodes])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
