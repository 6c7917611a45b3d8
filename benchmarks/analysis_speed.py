"""How long dependency analysis takes: `python benchmarks/analysis_speed.py [--repeats 5] [--json FILE]`

1. Beside Torch-Pruning for the same model in the same process, interleaved, medians: our `analyze` of a captured
   program and their `DependencyGraph().build_dependency`, then both with the groups that follow from it (`find_groups`,
   `get_all_groups`). Theirs runs the model once: with the two pictures that ours was captured with, and with a single
   one. Capture (torch.export, needed once for everything that fxpress does) is timed apart, and so is our first call.
2. Against depth: chains of residual blocks, microseconds per node. Linear growth means that they stay the same.

Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import zoo_models

import fxpress
from fxpress.passes.prune.groups import find_groups
from fxpress.passes.prune.rules.table import analyze

MODELS = ("resnet50", "vit_b_16", "densenet121")
DEPTHS = (50, 100, 200, 400)
Row = dict[str, Any]


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def ours(program: fxpress.Program) -> None:
    """Axes of every tensor, and all groups."""
    find_groups(analyze(program))


def compare(name: str, repeats: int) -> Row:
    """One model, both tools, on the picture size of ImageNet."""
    import torch_pruning

    module, _, _ = zoo_models.load(f"torchvision:{name}")
    two, one = ((torch.randn(n, 3, 224, 224),) for n in (2, 1))
    start = time.perf_counter()
    program = fxpress.capture(module, two)
    capture = time.perf_counter() - start

    def theirs(args: tuple[torch.Tensor, ...], groups: bool = False) -> None:
        graph = torch_pruning.DependencyGraph().build_dependency(module, args)
        if groups:
            list(graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear]))

    calls: dict[str, Callable[[], object]] = {
        "analyze_ms": lambda: analyze(program),
        "torch_pruning_ms": lambda: theirs(two),
        "torch_pruning_one_ms": lambda: theirs(one),
        "groups_ms": lambda: ours(program),
        "torch_pruning_groups_ms": lambda: theirs(two, groups=True),
    }
    times = [{name: timed(call) for name, call in calls.items()} for _ in range(repeats + 1)]
    row: Row = {"model": name, "nodes": len(program.graph.nodes), "capture_s": capture, "first_ms": times[0]["analyze_ms"]}
    row |= {key: median(t[key] for t in times[1:]) for key in calls}
    row |= {"ratio": row["torch_pruning_ms"] / row["analyze_ms"]}
    row |= {"ratio_one": row["torch_pruning_one_ms"] / row["analyze_ms"]}
    return row | {"ratio_groups": row["torch_pruning_groups_ms"] / row["groups_ms"]}


class Block(nn.Module):
    """A bottleneck with a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width // 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width, h, w] -> the same."""
        return torch.relu(x + self.body(x))


def grow(depth: int, repeats: int) -> Row:
    """A chain of `depth` blocks, all on one residual stream."""
    module = nn.Sequential(nn.Conv2d(3, 64, 1), *(Block(64) for _ in range(depth)), nn.Conv2d(64, 10, 1)).eval()
    program = fxpress.capture(module, torch.randn(2, 3, 4, 4))
    times = [timed(lambda: ours(program)) for _ in range(repeats + 1)][1:]
    nodes = len(program.graph.nodes)
    return {"depth": depth, "nodes": nodes, "ms": median(times), "us_per_node": median(times) / nodes * 1e3}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    columns = {
        "nodes": "nodes", "capture_s": "capture s", "first_ms": "first ms", "analyze_ms": "ours ms",
        "torch_pruning_ms": "theirs", "ratio": "ratio", "torch_pruning_one_ms": "theirs, 1", "ratio_one": "ratio",
        "groups_ms": "groups ms", "torch_pruning_groups_ms": "theirs", "ratio_groups": "ratio",
    }  # fmt: skip
    print(f"{'model':14}" + "".join(f"{title:>10}" for title in columns.values()))
    for name in MODELS:
        r = compare(name, arguments.repeats)
        rows.append(r)
        print(f"{name:14}" + "".join(f"{r[c]:>10.1f}" for c in columns), flush=True)
    print(f"{'depth':28} {'nodes':>6} {'ms':>9} {'us a node':>10}")
    for depth in DEPTHS:
        r = grow(depth, arguments.repeats)
        rows.append(r)
        print(f"{depth:<28} {r['nodes']:>6} {r['ms']:>9.1f} {r['us_per_node']:>10.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
