"""Pruning whole networks without a hint: exact against the oracle, every parameter accounted for, analysis fast."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import fxpress
from fxpress.frontend.cost import count_macs
from fxpress.passes.prune.groups import coverage, find_groups
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.prune.rules.table import analyze
from fxpress.passes.verify import relative_difference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks folder, which is not part of the package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def redrawn(name: str, size: int = 64) -> fxpress.Program:
    oracle = benchmark("pruning_oracle")
    module = oracle.build(name).eval()
    oracle.redraw(module)
    return fxpress.capture(module, (torch.randn(2, 3, size, size),))


def check(program: fxpress.Program, share: float) -> None:
    plan = plan_pruning(program, macs=share)
    pruned, masked = plan.apply(program), plan.mask(program)
    assert 0.99 * share <= plan.macs[1] / plan.macs[0] <= share
    assert count_macs(pruned) == plan.macs[1]
    assert oracle_error(masked, pruned) <= 1e-9
    # Zeroing changes the result by much, so that the agreement above says something.
    assert relative_difference(masked.call_example()[0], program.call_example()[0]) > 1e-3
    found = coverage(analyze(program))
    assert found.unexplained == 0
    assert found.grouped + found.pinned == program.parameter_count
    assert found.grouped >= 0.97 * program.parameter_count


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_cifar_resnet20(share: float) -> None:
    check(redrawn("cifar_resnet20", 32), share)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_models(name: str) -> None:
    check(redrawn(name), 0.5)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "efficientnet_b0", "regnet_y_400mf", "googlenet", "mnasnet0_5"]
)
def test_more_torchvision_models(name: str, share: float) -> None:
    check(redrawn(name), share)


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_t", "convnext_tiny", "timm:mobilevit_xxs", "timm:res2net50_26w_4s"])
def test_models_beyond_plain_cnns(name: str) -> None:
    """LayerNorm keeps its stream; hidden layers, heads and branches are pruned around it."""
    program = redrawn(name, 224 if "mobilevit" in name else 64)
    plan = plan_pruning(program, macs=0.7)
    assert oracle_error(plan.mask(program), plan.apply(program)) <= 1e-9
    assert coverage(analyze(program)).unexplained == 0


@pytest.mark.zoo
def test_analysis_is_fast() -> None:
    """densenet121, whose concatenations are long, within half a second (a loaded machine gets three tries)."""
    program = redrawn("densenet121")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        find_groups(analyze(program))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.realdata
def test_trained_resnet20_keeps_its_predictions_best_by_importance(real_data: Path) -> None:
    """On real weights, l2 keeps more of the accuracy than random choice at the same budget, and the oracle holds."""
    models = benchmark("models")
    model = models.load_checkpoint(models.cifar_resnet20(), real_data / "cifar_resnet20.th")
    data = np.load(real_data / "cifar10_train20k.npz")
    images = torch.from_numpy(data["images"][:256]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    inputs, labels = (images - mean) / std, torch.from_numpy(data["labels"][:256]).long()
    program = fxpress.capture(model, (inputs[:2],))
    accuracy = lambda p: float((p(inputs).argmax(1) == labels).float().mean())  # noqa: E731
    assert accuracy(program) > 0.95
    reached = {}
    for importance in ("l2", "random"):
        plan = plan_pruning(program, macs=0.9, importance=importance)
        pruned = plan.apply(program)
        assert oracle_error(plan.mask(program), pruned) <= 1e-9
        reached[importance] = accuracy(pruned)
    assert reached["l2"] > reached["random"]
