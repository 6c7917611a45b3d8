"""Do two processes give what one gives? Compare the lines of

    python benchmarks/processes.py
    torchrun --nproc-per-node 2 benchmarks/processes.py

Each trains the digits network from scratch on several seeds, and quantizes an untrained one, the calibration shared out.
A line for each seed: top-1 on held-out digits in percent, the mean loss of the last epoch; one for each range rule: the
checksum of all scales (float32, as the ONNX file stores them) and zero points.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys

import torch

import fxpress
from fxpress.demo import DigitNet, Digits, load_digits
from fxpress.runtime.evaluate import Top1

RULES = ("minmax", "moving-average", "percentile", "entropy", "mse")


def trained(digits: Digits, epochs: int, seed: int) -> str:
    """The line of a seed."""
    torch.manual_seed(seed)
    program = fxpress.capture(DigitNet(16), (digits.inputs[:2],))
    options = fxpress.TrainingOptions(epochs=epochs, optimizer=fxpress.AdamW(1e-2), keep="last", seed=seed)
    held_out = Top1([(digits.held_out_inputs, digits.held_out_labels)])
    result = fxpress.train(program, (digits.inputs, digits.labels), options, evaluate=held_out)
    return f"seed {seed}: top-1 {100 * result.kept.metric:.2f}, loss {result.kept.loss:.4f}"


def checksum(program: fxpress.Program, digits: Digits, rule: str, distributed: bool) -> str:
    """Of all scales and zero points."""
    int8 = fxpress.quantize(program, digits.inputs[:250].split(10), ranges=rule, distributed=distributed)
    nodes = [n for n in int8.graph.nodes if n.target is torch.ops.fxpress.quantize.default]
    scales = torch.tensor([n.args[1] for n in nodes], dtype=torch.float32)
    return hashlib.sha256(repr([scales.tolist(), [n.args[2] for n in nodes]]).encode()).hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits, distributed = load_digits(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    lines = []
    for seed in range(options.seeds):
        lines.append(trained(digits, options.epochs, seed))
    torch.manual_seed(0)
    fixed = fxpress.capture(DigitNet(16), (digits.inputs[:2],))  # the same weights, however many processes
    fused = fxpress.run_passes(fixed, "cleanup,canonicalize,fuse-batchnorm")
    lines += [f"{rule}: {checksum(fused, digits, rule, distributed)}" for rule in RULES]
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
