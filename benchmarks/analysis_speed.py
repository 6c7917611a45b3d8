"""How long dependency analysis takes: `python benchmarks/analysis_speed.py [--repeats 5] [--json FILE]`

1. Beside Torch-Pruning's DependencyGraph for the same model in the same process, interleaved, medians. Ours is
   `analyze` + `find_groups` on a captured program; theirs `DependencyGraph().build_dependency` on the module. Capture
   (torch.export, needed once for everything that fxpress does) is timed apart, and so is the first call of each.
2. Against depth: chains of residual blocks, milliseconds per node. Linear growth means that they stay the same.

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
from fxpress.passes.prune.rules import analyze

MODELS = ("torchvision:resnet50", "torchvision:vit_b_16", "torchvision:densenet121")
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
    """One model, both tools."""
    import torch_pruning

    module, args, _ = zoo_models.load(name)
    start = time.perf_counter()
    program = fxpress.capture(module, args)
    capture = time.perf_counter() - start
    theirs: Callable[[], object] = lambda: torch_pruning.DependencyGraph().build_dependency(module, args)  # noqa: E731
    times = [(timed(lambda: ours(program)), timed(theirs)) for _ in range(repeats + 1)]
    mine, other = (median(t[i] for t in times[1:]) for i in (0, 1))
    row: Row = {"model": name, "nodes": len(program.graph.nodes), "capture_s": capture}
    row |= {"first_ms": times[0][0], "fxpress_ms": mine, "torch_pruning_ms": other, "ratio": other / mine}
    return row


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
    print(f"{'model':28} {'nodes':>6} {'capture s':>10} {'first ms':>9} {'ours ms':>9} {'theirs ms':>10} {'ratio':>6}")
    for name in MODELS:
        r = compare(name, arguments.repeats)
        rows.append(r)
        numbers = f"{r['capture_s']:>10.1f} {r['first_ms']:>9.1f} {r['fxpress_ms']:>9.1f} {r['torch_pruning_ms']:>10.1f}"
        print(f"{name:28} {r['nodes']:>6} {numbers} {r['ratio']:>6.1f}", flush=True)
    print(f"{'depth':28} {'nodes':>6} {'ms':>9} {'us a node':>10}")
    for depth in DEPTHS:
        r = grow(depth, arguments.repeats)
        rows.append(r)
        print(f"{depth:<28} {r['nodes']:>6} {r['ms']:>9.1f} {r['us_per_node']:>10.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
