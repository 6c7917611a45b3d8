"""What all tests share: torchvision's operators, and where the real weights and data are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpress
from fxpress.frontend.sources import declare_torchvision_operators
from fxpress.runtime.evaluate import Top1

# The networks of the tests are small: more threads only wait for one another, long where the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# torchvision's compiled operators do not load beside a CPU-only torch; its Python part needs their names. This must
# happen before any test imports torchvision or timm.
declare_torchvision_operators()

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and data beside the checkout; tests that ask for it are skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real weights and data (../shared/data) are not here")
    return REAL_DATA


class TinyNet(nn.Module):
    """Conv-BN-ReLU twice and a linear layer: scores [N, 5] from [N, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="session")
def tiny_module() -> nn.Module:
    """A TinyNet whose BatchNorm statistics are not the trivial ones."""
    torch.manual_seed(0)
    module = TinyNet()
    module.train()
    with torch.no_grad():
        for _ in range(5):
            module(torch.randn(32, 3, 8, 8) + 0.3)
    return module.eval()


@pytest.fixture(scope="session")
def tiny_data() -> torch.Tensor:
    """64 examples for TinyNet."""
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.fixture(scope="session")
def tiny_folder(tiny_module, tiny_data, tmp_path_factory) -> Path:
    """TinyNet compiled to INT8, with a metric (agreement with the float model), in a folder. Not to be changed."""
    folder = tmp_path_factory.mktemp("compiled") / "tiny"
    with torch.no_grad():
        labels = tiny_module(tiny_data).argmax(1)
    preprocess = fxpress.Preprocess(scale=1 / 255, mean=(0.5, 0.5, 0.5), crop=(8, 8))
    fxpress.compile(
        tiny_module,
        (tiny_data[:2],),
        calibration=tiny_data.split(16),
        evaluate=Top1([(tiny_data, labels)]),
        preprocess=preprocess,
        labels=list("abcde"),
        output=folder,
        name="tiny",
    )
    return folder
