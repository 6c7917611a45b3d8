"""What of a module's own training a captured program does not have is said to who trains it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

import fxpress
from fxpress.frontend.train_modes import training_notes

X = torch.randn(4, 6)


@pytest.mark.parametrize("norm", [spectral_norm, hooked_spectral_norm])
def test_the_spectral_norm_of_capture_stays(norm):
    """In training the module finds the norm of its weight anew; the vectors that find it stand still in evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = fxpress.capture(nn.Sequential(norm(nn.Linear(6, 6)), nn.Linear(6, 3)).eval(), X)
    assert training_notes(program) == ["0: the norm that spectral_norm divides by stays that of capture"]


class Quiet(nn.Module):
    """Keeps its norm in evaluation, as many detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def train(self, mode: bool = True) -> Quiet:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def test_a_train_method_of_ones_own_is_not_followed():
    program = fxpress.capture(nn.Sequential(nn.Linear(6, 6), Quiet()).eval(), X)
    assert training_notes(program) == ["1: what the module's own train() does is not followed"]
    assert training_notes(fxpress.capture(nn.Linear(6, 3), X)) == []


def test_the_notes_survive_a_file(tmp_path):
    program = fxpress.capture(Quiet().eval(), X)
    program.save(tmp_path / "program.pt2")
    loaded = fxpress.Program.load(tmp_path / "program.pt2")
    assert training_notes(loaded) == training_notes(program) != []
    trained = fxpress.train(loaded, (X, torch.zeros(4).long()))
    assert training_notes(program)[0] in trained.notes()
