"""Options of a training that other parts have a say in: milestones and warm-up, what decays, float16, Accelerate."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import fxpress
from fxpress.errors import TrainingError
from fxpress.training import engine
from fxpress.training.objectives import scores
from fxpress.training.options import SGD, TrainingOptions
from fxpress.training.parameters import decay_groups, norm_parameters
from fxpress.training.schedules import Step

DATA = (torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)


def linear() -> fxpress.Program:
    torch.manual_seed(0)
    return fxpress.capture(nn.Linear(4, 3), (DATA[0][:2],))


def test_milestones_are_shares_of_the_whole_training_warm_up_or_not():
    def rates(warmup: float) -> list[float]:
        steps = Step((0.4, 0.8), 0.1)
        options = TrainingOptions(epochs=10, batch_size=40, optimizer=SGD(1.0), schedule=steps, warmup=warmup)
        return [r.learning_rate for r in fxpress.train(linear(), DATA, options).history]

    assert rates(0.0) == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)
    assert rates(0.2) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0] + [0.1] * 4 + [0.01] * 2)
    assert rates(0.5) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 0.5 / 6 * 1, 0.1, 0.1, 0.1, 0.01, 0.01], abs=1e-9)


class ByHand(nn.Module):
    """A norm over channels and a scaled branch, written by hand; a weight of one column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.zeros(4, 1, 1))
        self.gamma, self.position = nn.Parameter(torch.ones(1, 4, 1, 1)), nn.Parameter(torch.zeros(1, 4, 6, 6))
        self.conv, self.column = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4, 1))
        self.table_bias = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.position + self.table_bias
        y = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) * self.weight + self.bias
        return (x + self.gamma * self.conv(y)).mean((2, 3)) @ self.column


def test_biases_and_scales_of_any_shape_do_not_decay():
    program = fxpress.capture(ByHand().eval(), torch.randn(2, 4, 6, 6))
    named = dict(program.named_parameters())
    decaying, plain = decay_groups(named, norm_parameters(program), set(), 0.1)
    names = {id(p): n for n, p in named.items()}
    assert {names[id(p)] for p in decaying["params"]} == {"position", "conv.weight", "column"}
    assert {names[id(p)] for p in plain["params"]} == {"weight", "bias", "gamma", "conv.bias", "table_bias"}
    assert plain["weight_decay"] == 0


class Broken(torch.autograd.Function):
    """As it is, with a gradient that is not a number in the first `times` calls."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("nan") if ctx.bad else 1.0), None


@pytest.mark.parametrize("bad", [31, 60])
def test_a_scaled_loss_may_overflow_for_some_steps_but_not_for_ever(monkeypatch, bad):
    monkeypatch.setattr(engine, "check_precision", lambda *given: None)  # float16 here is slow, and the same

    def objective(program, batch):
        output = Broken.apply(scores(program, batch.inputs), batch.step < bad)
        return nn.functional.cross_entropy(output, batch.labels)

    options = TrainingOptions(epochs=60, batch_size=40, precision="float16", optimizer=SGD(0.1))
    if bad < 32:
        assert len(fxpress.train(linear(), DATA, options, objective=objective).history) == 60
        return
    with pytest.raises(TrainingError, match=r"step 31: the gradient of '(weight|bias)', .* is not finite"):
        fxpress.train(linear(), DATA, options, objective=objective)


# Accelerate's settings hold for a whole process, so each case has one of its own.
ACCELERATED = """
import sys, torch
from torch import nn
import fxpress
from accelerate import Accelerator
if sys.argv[1] == "mixed":
    Accelerator(mixed_precision="bf16", cpu=True)
if sys.argv[1] == "accumulating":
    Accelerator(gradient_accumulation_steps=4, cpu=True)
torch.manual_seed(0)
x, y = torch.randn(8, 4), torch.arange(8) % 3
program = fxpress.capture(nn.Linear(4, 3), (x[:2],))
options = fxpress.TrainingOptions(device="cpu", optimizer=fxpress.SGD(1.0, momentum=0.0))
try:
    print(fxpress.finetune(program, (x, y), options).state_dict()["weight"].tolist())
except fxpress.FxpressError as error:
    print(error.message)
"""


def test_accelerate_as_somebody_else_set_it_up(monkeypatch):
    def said(case: str) -> str:
        command = [sys.executable, "-c", ACCELERATED, case]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    plain = said("plain")
    assert "mixed_precision='bf16'" in said("mixed")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert said("accumulating") == plain, "the loss is not divided"
