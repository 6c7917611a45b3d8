"""Importance criteria compared: ResNet-20 pruned by each, judged by how often it still agrees with the float model.

    OMP_NUM_THREADS=1 python benchmarks/importance.py

1,000 CIFAR-10 train images without labels choose the channels (those criteria that look at data) and re-estimate the
BatchNorm statistics; 2,000 other train images judge: the share on which the pruned model predicts what the unpruned one
does, as pruned and after the re-estimation. No test image is used. Seed 0; `random` is the mean of five seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from int8_accuracy import DATA, collect
from models import cifar_resnet20, load_checkpoint
from torch.nn import functional

import fxpress
from fxpress.frontend.program import Program
from fxpress.passes.prune.importance.registry import criteria
from fxpress.passes.rewrite import aten, find, set_argument


def reestimated(program: Program, images: torch.Tensor) -> Program:
    """A copy whose BatchNorm statistics are those of `images`, layer after layer, in one batch."""
    copy = program.copy().train()
    for node in find(copy, aten.batch_norm.default):
        set_argument(node, "momentum", 1.0)
    copy.graph_module.recompile()
    copy.run_flat((images,))
    return copy.eval()


def predictions(program: Program, images: torch.Tensor) -> torch.Tensor:
    """The most probable classes [N]."""
    return torch.cat([program.run_flat((part,))[0].argmax(1) for part in images.split(100)])


def agreement(program: Program, images: torch.Tensor, wanted: torch.Tensor) -> float:
    """Percent of predictions that are the wanted ones."""
    return 100 * float((predictions(program, images) == wanted).double().mean())


def judge(
    program: Program, options: dict[str, object], macs: float, calibration: torch.Tensor, images: torch.Tensor,
    wanted: torch.Tensor,
) -> dict[str, float]:  # fmt: skip
    """Seconds to plan, agreement as pruned and with statistics re-estimated."""
    start = time.perf_counter()
    plan = fxpress.plan_pruning(program, macs=macs, **options)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    pruned = plan.apply(program)
    return {
        "seconds": seconds,
        "macs": plan.macs[1] / plan.macs[0],
        "pruned": agreement(pruned, images, wanted),
        "reestimated": agreement(reestimated(pruned, calibration), images, wanted),
    }


def variants(names: list[str], calibration: torch.Tensor, labels: torch.Tensor) -> dict[str, list[dict[str, object]]]:
    """Title -> options of `plan_pruning`, several where they are averaged. What reads gradients comes with labels too."""
    result: dict[str, list[dict[str, object]]] = {}
    for name in names:
        options: dict[str, object] = {"importance": name}
        if criteria()[name].needs_data:
            options["data"] = calibration.split(50)
        seeds = range(5) if name == "random" else [0]
        result[name] = [{**options, "seed": seed} for seed in seeds]
        if criteria()[name].reads == "gradients":
            data = list(zip(calibration.split(50), labels.split(50)))
            result[f"{name}, labels"] = [{**options, "data": data, "loss": functional.cross_entropy}]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("criteria", nargs="*", default=list(criteria()))
    parser.add_argument("--macs", type=float, nargs="*", default=[0.75, 0.5])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, collect(DATA / "cifar10_train20k.npz", "cifar10", 3000))
    calibration, images = x[::3], x[torch.arange(len(x)) % 3 != 0]
    program = fxpress.capture(load_checkpoint(cifar_resnet20(), DATA / "cifar_resnet20.th"), (x[:2],))
    wanted = predictions(program, images)
    results = []
    for macs in options.macs:
        print(f"\nMACs {macs:g}: agreement with the unpruned model on {len(images)} images, %")
        for title, trials in variants(options.criteria, calibration, y[::3].long()).items():
            found = [judge(program, t, macs, calibration, images, wanted) for t in trials]
            row = {key: statistics.mean(f[key] for f in found) for key in found[0]}
            results.append({"criterion": title, "budget": macs, **row})
            print(
                f"{title:16} as pruned {row['pruned']:6.2f}   BatchNorm re-estimated {row['reestimated']:6.2f}   {row['seconds']:6.1f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
