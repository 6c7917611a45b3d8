"""What each kind of pruning costs and brings, on ResNet-20 with trained weights, without any recovery.

    python benchmarks/pruning_kinds.py [--seconds 3] [--only TEXT]

Agreement: the share of 1,000 train images, apart from the 256 that importances by data read, on which the pruned network
predicts what the float one predicts. Speed: both as float ONNX in ONNX Runtime, one thread, by processor time of
interleaved runs. File: the ONNX file after zlib, as a share of the unpruned file's.
"""

from __future__ import annotations

import argparse
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from models import cifar_resnet20, load_checkpoint

import fxpress
from fxpress.passes.prune.plan import PruningPlan
from fxpress.runtime.benchmark import compare_latency
from fxpress.runtime.session import make_session

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CASES: dict[str, dict[str, object]] = {
    "unstructured, 30 %": {"kind": "unstructured", "ratio": 0.3},
    "unstructured, 50 %": {"kind": "unstructured", "ratio": 0.5},
    "unstructured, 50 % of each layer": {"kind": "unstructured", "ratio": 0.5, "scope": "layer"},
    "unstructured, 50 %, LAMP": {"kind": "unstructured", "ratio": 0.5, "importance": "lamp"},
    "unstructured, 70 %": {"kind": "unstructured", "ratio": 0.7},
    "n:m, 4:8": {"kind": "n:m", "pattern": "4:8"},
    "n:m, 2:4": {"kind": "n:m", "pattern": "2:4"},
    **{
        f"blocks, {count} of 9, {name}": {"kind": "blocks", "ratio": ratio, "importance": name}
        for count, ratio in ((1, 0.12), (2, 0.23))
        for name in ("l2", "similarity", "change", "output")
    },
    "channels, MACs 0.88": {"macs": 0.884},
    "channels, MACs 0.77": {"macs": 0.767},
    "channels, MACs 0.77, multiples of 8": {"macs": 0.767, "round_to": 8},
}


def images(start: int, stop: int) -> torch.Tensor:
    """Normalized train images."""
    data = np.load(DATA / "cifar10_train20k.npz")["images"][start:stop]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (torch.from_numpy(data).permute(0, 3, 1, 2).float() / 255 - mean) / std


def plan_for(program: fxpress.Program, options: dict[str, object], calibration: torch.Tensor) -> PruningPlan:
    """The plan of one case, with data where the importance reads data."""
    by_data = options.get("importance") in ("similarity", "change", "output")
    return fxpress.plan_pruning(program, data=calibration.split(64) if by_data else None, **options)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(cifar_resnet20(), DATA / "cifar_resnet20.th").eval()
    calibration, held_out = images(0, 256), images(16_000, 17_000)
    program = fxpress.capture(model, (held_out[:2],))
    with torch.no_grad():
        expected = program(held_out).argmax(1)
    whole = fxpress.to_onnx(program)
    size, session = len(zlib.compress(whole.SerializeToString())), make_session(whole, threads=1)
    print("| kind | agreement | MACs kept | weights that are zero | file after zlib | speed |")
    print("|---|---|---|---|---|---|")
    for name, options in ((n, o) for n, o in CASES.items() if arguments.only in n):
        plan = plan_for(program, options, calibration)
        pruned = plan.apply(program)
        with torch.no_grad():
            agreement = float((pruned(held_out).argmax(1) == expected).float().mean())
        onnx = fxpress.to_onnx(pruned)
        timing = compare_latency(
            session, make_session(onnx, threads=1), (held_out[:1].numpy(),), seconds=arguments.seconds, clock=time.thread_time
        )
        share = len(zlib.compress(onnx.SerializeToString())) / size
        print(
            f"| {name} | {100 * agreement:.1f} % | {plan.macs[1] / plan.macs[0]:.3f} | {plan.zeros:,} | {share:.2f} "
            f"| {timing.ratio:.2f}× |",
            flush=True,
        )


if __name__ == "__main__":
    main()
