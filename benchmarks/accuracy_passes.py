"""What each accuracy pass is worth: SQNR on held-out samples and top-1, on real weights and on networks made to collapse.

    OMP_NUM_THREADS=1 python benchmarks/accuracy_passes.py                    # all rows
    OMP_NUM_THREADS=1 python benchmarks/accuracy_passes.py --rows resnet20    # one

Calibration: 1,000 CIFAR-10 train images, or every fifth of the 500 ImageNet pictures. SQNR: on 256 other train images
(the judged pictures for ImageNet), outputs in PyTorch against the float program. top-1: in ONNX Runtime, on
cifar10_test_a or the other 400 pictures. Where weights are random, only the SQNR means anything.

Settings: int8 is ort-x86 as it is; "per tensor" has one scale for a whole weight tensor; "4-bit weights" uses 15 of the
255 integers. "scaled channels": within each residual block the channels between the two convolutions are multiplied by
random factors e^N(0, 1.5) and divided again behind the ReLU, which float does not notice. "outliers": four channels of
each LayerNorm are multiplied by 60 and divided again in the linear layers that read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from int8_accuracy import DATA, collect, top1
from models import BasicBlock, cifar_resnet20, cifar_resnet32

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.frontend.program import Program
from fxpress.frontend.sources import declare_torchvision_operators, load_source
from fxpress.frontend.sqnr import Sqnr
from fxpress.frontend.weights import load_weights
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.quantize.spec import Target
from fxpress.runtime.session import make_session

PREPARE = "cleanup,canonicalize,fuse-batchnorm"
PLAIN = "quantize"
CLIPPED = "quantize{weights=mse}"
BIAS = "quantize,correct-bias"
LEARNED = "quantize,learn-rounding"
EQUAL = "equalize,quantize"
SMOOTH = "smooth,quantize"
INSERT = "smooth{insert=true},quantize"
ALL = "equalize,smooth,quantize,learn-rounding,correct-bias"


@dataclass(frozen=True)
class Case:
    """A float program with its data: `labels` None where only the SQNR is asked."""

    program: Program
    calibration: list[tuple[torch.Tensor, ...]]
    held_out: list[tuple[torch.Tensor, ...]]
    judged: tuple[np.ndarray, np.ndarray] | None = None


# -- targets -------------------------------------------------------------------------------------------------------


def int8() -> Target:
    return load_target("ort-x86")


def per_tensor() -> Target:
    target = int8()
    return dataclasses.replace(target, weight=dataclasses.replace(target.weight, per_channel=False))


def four_bits() -> Target:
    target = int8()
    return dataclasses.replace(target, weight=dataclasses.replace(target.weight, bits=4))


# -- models --------------------------------------------------------------------------------------------------------


def cifar(make: Callable[[], torch.nn.Module], weights: str, spoil: bool = False) -> Case:
    """A CIFAR ResNet with its published weights."""
    module = make()
    load_weights(module, DATA / weights)
    x, _ = collect(DATA / "cifar10_train20k.npz", "cifar10", 2000)
    calibration, held_out = torch.from_numpy(x[::2]), torch.from_numpy(x[1::2][:256])
    program = prepared(module, calibration[:2])
    if spoil:
        program = run_passes(prepared(scaled_channels(module), calibration[:2]), "cleanup")
    judged = collect(DATA / "cifar10_test_a.npz", "cifar10")
    return Case(program, batches(calibration), batches(held_out), judged)


def scaled_channels(module: torch.nn.Module) -> torch.nn.Module:
    """Uneven channels inside each residual block, which ReLU lets through unchanged."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in module.modules():
            if isinstance(block, BasicBlock):
                factors = torch.exp(1.5 * torch.randn(len(block.bn1.weight), generator=generator))
                block.bn1.weight.mul_(factors)
                block.bn1.bias.mul_(factors)
                block.conv2.weight.div_(factors.reshape(1, -1, 1, 1))
    return module


def mobilenet_v2() -> Case:
    """MobileNetV2 with ImageNet weights."""
    module = load_source("torchvision:mobilenet_v2").module
    load_weights(module, DATA / "mobilenet_v2-b0353104.pth")
    x, y = collect(DATA / "imagenet_sample_500.zip", "imagenet")
    chosen = np.arange(len(x)) % 5 == 0
    calibration, rest = torch.from_numpy(x[chosen]), torch.from_numpy(x[~chosen])
    return Case(prepared(module, calibration[:2]), batches(calibration, 10), batches(rest[:100], 10), (x[~chosen], y[~chosen]))


def deit_tiny() -> Case:
    """DeiT-Tiny with random weights and outliers."""
    module = load_source("timm:deit_tiny_patch16_224").module
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(48, 3, 224, 224, generator=generator)
    readers = [(b.norm1, [b.attn.qkv]) for b in module.blocks] + [(b.norm2, [b.mlp.fc1]) for b in module.blocks]
    program = prepared(outliers(module, readers), pictures[:2])
    return Case(program, batches(pictures[:32], 8), batches(pictures[32:], 8))


def bert() -> Case:
    """BERT, four layers, random weights: its LayerNorms come after the sums, which read them as well."""
    declare_torchvision_operators()  # transformers imports torchvision
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=4, attn_implementation="sdpa")
    module = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, config.vocab_size, (48, 128), generator=torch.Generator().manual_seed(0))
    layers = module.encoder.layer
    readers = [(a.output.LayerNorm, [b.attention.self.query, b.attention.self.key, b.attention.self.value]) for a, b in pairwise(layers)]
    readers += [(b.attention.output.LayerNorm, [b.intermediate.dense]) for b in layers]
    program = prepared(outliers(module, readers), tokens[:2])
    return Case(program, batches(tokens[:32], 8), batches(tokens[32:], 8))


def outliers(
    module: torch.nn.Module, readers: Iterable[tuple[torch.nn.LayerNorm, list[torch.nn.Linear]]], factor: float = 60.0
) -> torch.nn.Module:
    """Four channels of each norm multiplied, the layers that read it divided; weights redrawn so that nothing is 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm, linears in readers:
            norm.bias.normal_(0, 0.1, generator=generator)
            chosen = torch.randperm(len(norm.weight), generator=generator)[:4]
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            for linear in linears:
                linear.weight[:, chosen] /= factor
    return module


def prepared(module: torch.nn.Module, example: torch.Tensor) -> Program:
    return run_passes(fxpress.capture(module.eval(), (example,)), PREPARE)


def batches(x: torch.Tensor, size: int = 50) -> list[tuple[torch.Tensor, ...]]:
    return [(part,) for part in x.split(size)]


# -- rows ----------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[Callable[[], Case], Callable[[], Target], tuple[str, ...]]] = {
    "resnet20": (lambda: cifar(cifar_resnet20, "cifar_resnet20.th"), int8, (PLAIN, CLIPPED, BIAS, ALL)),
    "resnet32": (lambda: cifar(cifar_resnet32, "cifar_resnet32.th"), int8, (PLAIN, BIAS, ALL)),
    "resnet20-4bit": (lambda: cifar(cifar_resnet20, "cifar_resnet20.th"), four_bits, (PLAIN, CLIPPED, BIAS, LEARNED, ALL)),
    "resnet20-scaled": (
        lambda: cifar(cifar_resnet20, "cifar_resnet20.th", spoil=True), per_tensor, (PLAIN, EQUAL, BIAS, ALL),
    ),
    "mobilenet_v2": (mobilenet_v2, int8, (PLAIN, CLIPPED, BIAS, ALL)),
    "mobilenet_v2-per-tensor": (mobilenet_v2, per_tensor, (PLAIN, EQUAL, BIAS)),
    "deit_tiny-outliers": (deit_tiny, int8, (PLAIN, SMOOTH, f"{SMOOTH},correct-bias")),
    "bert-outliers": (bert, int8, (PLAIN, SMOOTH, INSERT)),
}  # fmt: skip


def measure(name: str, case: Case, target: Target, pipeline: str) -> dict[str, object]:
    """One pipeline on one case."""
    start = time.perf_counter()
    result = run_passes(case.program, pipeline, Context(target=target, calibration=case.calibration))
    seconds = time.perf_counter() - start
    row: dict[str, object] = {"row": name, "pipeline": pipeline, "seconds": seconds}
    row["sqnr_db"] = sqnr(case, result)
    if case.judged is not None:
        session = make_session(lower(result), threads=1)
        row["top1"] = top1(lambda a: session.run(a)[0], *case.judged)
    known = len(case.program.log)
    row["notes"] = [f"{r.name}: {note}" for r in result.log[known:] for note in r.notes if "dB" in note]
    return row


def sqnr(case: Case, result: Program) -> float:
    """Of all outputs together, in dB."""
    found = Sqnr()
    for batch in case.held_out:
        for a, b in zip(case.program.run_flat(batch), result.run_flat(batch)):
            found.add(a, b)
    assert found.decibel is not None
    return found.decibel


def float_top1(case: Case) -> float | None:
    if case.judged is None:
        return None
    session = make_session(lower(case.program), threads=1)
    return top1(lambda a: session.run(a)[0], *case.judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="leave out the pipelines that train")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"no data: {DATA} is absent")
    torch.set_num_threads(1)
    results = []
    for name in options.rows:
        torch.manual_seed(0)
        make, target, pipelines = ROWS[name]
        case = make()
        top = float_top1(case)
        print(f"\n{name}" + (f": float {top:.2f} %" if top is not None else ""), flush=True)
        print(f"{'pipeline':62} SQNR dB  top-1 %  seconds")
        for pipeline in (p for p in pipelines if not (options.quick and "learn-rounding" in p)):
            row = measure(name, case, target(), pipeline)
            results.append(row)
            figure = f"{row['top1']:8.2f}" if "top1" in row else " " * 8
            print(f"{pipeline:62} {row['sqnr_db']:7.2f} {figure} {row['seconds']:8.1f}", flush=True)
            for note in row["notes"]:  # type: ignore[attr-defined]
                print(f"    {note}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
