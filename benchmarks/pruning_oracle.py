"""Is structured pruning exact? `python benchmarks/pruning_oracle.py [--json FILE] [--size 64] [MODEL ...]`

For each model and each MACs budget, the pruned program is compared in float64 with the original whose removed positions
are zeroed at every consumer. Weights, biases and BatchNorm statistics are redrawn at random, so that zeroing matters. No
model gets a hint. Exit code 1 where an error exceeds 1e-9 or a parameter is neither in a group nor pinned with a reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import models as own_models

import fxpress
from fxpress.frontend.cost import count_macs
from fxpress.frontend.sources import declare_torchvision_operators
from fxpress.passes.prune.groups import coverage, find_groups, find_pinned
from fxpress.passes.prune.masking import oracle_error
from fxpress.passes.prune.planning import plan_pruning
from fxpress.passes.prune.rules.table import analyze

MODELS = [
    "cifar_resnet20",
    "resnet18",
    "mobilenet_v2",
    "densenet121",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "regnet_y_400mf",
    "googlenet",
    "squeezenet1_1",
    "mnasnet0_5",
]
BUDGETS = (0.7, 0.5, 0.3)
BOUND = 1e-9


def build(name: str) -> torch.nn.Module:
    """One of our own models, or a torchvision or (`timm:NAME`) timm model without pretrained weights."""
    if name.startswith("cifar_"):
        return getattr(own_models, name)()
    _LIBRARIES.append(declare_torchvision_operators())
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=False)
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options)


_LIBRARIES: list[object] = []


def redraw(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights, biases and statistics, of a size that keeps activations finite and no output constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * values + name.endswith("weight"))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def measure(name: str, size: int) -> list[dict[str, object]]:
    """One row for each budget."""
    module = build(name).eval()
    redraw(module)
    program = fxpress.capture(module, (torch.randn(2, 3, size, size),))
    analyze(program)
    start = time.perf_counter()
    analysis = analyze(program)
    groups = find_groups(analysis)
    milliseconds = (time.perf_counter() - start) * 1e3
    found = coverage(analysis)
    rows = []
    for budget in BUDGETS:
        row: dict[str, object] = {
            "model": name,
            "budget": budget,
            "groups": len(groups),
            "pinned": len(find_pinned(analysis)),
        }
        row |= {
            "grouped_parameters": found.grouped,
            "pinned_parameters": found.pinned,
            "unexplained": found.unexplained,
        }
        row["analysis_ms"] = milliseconds
        try:
            plan = plan_pruning(program, macs=budget)
            pruned = plan.apply(program)
            assert count_macs(pruned) == plan.macs[1]
            row |= {"macs_kept": plan.macs[1] / plan.macs[0], "params_kept": plan.parameters[1] / plan.parameters[0]}
            row |= {"relative_error": oracle_error(plan.mask(program), pruned), "notes": list(plan.notes)}
        except fxpress.FxpressError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def print_row(row: dict[str, object]) -> None:
    """One line of the table."""
    head = f"{row['model']:28} {row['budget']:>6}"
    if "error" in row:
        print(head, row["error"], flush=True)
        return
    print(
        f"{head} {row['macs_kept']:>9.4f} {row['params_kept']:>9.4f} {row['groups']:>7} {row['pinned']:>7}"
        f" {row['unexplained']:>7} {row['analysis_ms']:>8.0f} {row['relative_error']:>9.1e}",
        flush=True,
    )


def main() -> int:
    """Run, print, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = ["budget", "macs_kept", "params_kept", "groups", "pinned", "unexpl.", "analysis", "relative"]
    print(
        f"{'model':28} {names[0]:>6} {'MACs':>9} {'params':>9} {names[3]:>7} {names[4]:>7} {names[5]:>7} {'ms':>8} {'error':>9}"
    )
    rows: list[dict[str, object]] = []
    for name in arguments.models:
        for row in measure(name, 32 if name.startswith("cifar_") else arguments.size):
            print_row(row)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in r or not r["relative_error"] <= BOUND or r["unexplained"] for r in rows))  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(main())
