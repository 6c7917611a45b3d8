"""What quantization-aware training and distillation are worth: `python benchmarks/qat.py [--judge held-out] [--json FILE]`

ResNet-20 with its published weights on CIFAR-10. Trained on cifar10_train20k, calibrated on its first 1,000 images. The
questions, each answered within one run:

    width 4   4-bit weights and activations in simulation: calibration alone (ranges that cover all values, or those of
              least squared error, which training starts from) against one epoch of training
    width 4 inside   as width 4, with the picture, the first layer's weights and the last layer at 8 bits, as is custom
    width 8   INT8: calibration alone against one epoch of training
    budget    MACs cut by 2; three epochs of distillation and one of training that simulates INT8, against four epochs of
              fine-tuning on labels and calibration; INT8 top-1 in ONNX Runtime

`--judge test` is cifar10_test_a, which nothing was tuned on. `--judge held-out` is for choosing options: the last 2,000
train images, which are then not trained on. `--examples` and `--limit` make a small trial of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pruning_recovery import EXAMPLE, load, make, top1

import fxpress
from fxpress.backends.targets import load_target
from fxpress.frontend.program import layer_name
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager
from fxpress.passes.rewrite import aten
from fxpress.runtime.session import make_session
from fxpress.training.distill import Distillation
from fxpress.training.matching import matched_values
from fxpress.training.qat import Simulation, train_simulated

HELD_OUT = 2000
BATCH = 50
# What recover found on a thousand images: matching the sums of residual branches generalizes, scores weigh little.
MATCH = f"soft=0,labels=0,match=1,optimizer=muon,warmup=0.05,batch_size={BATCH},augment=flip-shift"
SIMULATE = "cleanup,canonicalize,fuse-batchnorm{keep=true},annotate,observe{ranges=mse},calibrate,fake-quantize"
TARGET = load_target("ort-x86")

Pictures = tuple[torch.Tensor, torch.Tensor]


class Setting:
    """The data of a run and what it is trained with."""

    def __init__(self, options: argparse.Namespace) -> None:
        pictures, labels = load("cifar10_train20k.npz")
        held_out = options.judge == "held-out"
        end = len(labels) - HELD_OUT if held_out else len(labels)
        rows = slice(0, min(end, options.examples or end))
        self.train: Pictures = pictures[rows], labels[rows]
        judged = (pictures[end:], labels[end:]) if held_out else load("cifar10_test_a.npz")
        self.judged: Pictures = judged[0][: options.limit], judged[1][: options.limit]
        self.calibration = pictures[:1000].split(100)
        self.seed, self.rate, self.epochs = options.seed, options.learning_rate, options.epochs
        self.zero_points = options.zero_points
        self.distil_rate, self.wide_rate, self.narrow_rate = options.distil_rate, options.wide_rate, options.narrow_rate

    def context(self) -> Context:
        calibration = [(x,) for x in self.calibration]
        return Context(TARGET, calibration, seed=self.seed, training=self.train)

    def top1(self, program: fxpress.Program) -> float:
        """Percent, in PyTorch."""
        return top1(program, *self.judged)

    def top1_of_runtime(self, program: fxpress.Program) -> float:
        """Percent, in ONNX Runtime."""
        session, (x, y) = make_session(fxpress.to_onnx(program), threads=1), self.judged
        hits = sum(
            int((session.run(a.numpy())[0].argmax(1) == b.numpy()).sum()) for a, b in zip(x.split(250), y.split(250))
        )
        return 100 * hits / len(y)

    def run(self, program: fxpress.Program, pipeline: str) -> fxpress.Program:
        return PassManager(pipeline).run(program, self.context())


def width_4(setting: Setting, program: fxpress.Program, wide: str = "") -> dict[str, float]:
    """Simulated top-1 before and after training, but for the layers that `wide` names."""
    narrow = f"weight_bits=4,activation_bits=4,full_width=[{wide}]"
    fake = setting.run(program, f"{SIMULATE}{{{narrow},learn_zero_points={str(setting.zero_points).lower()}}}")
    widest = f"{SIMULATE.replace('mse', 'minmax')}{{{narrow},weights=minmax}}"
    teacher = setting.run(program, "cleanup,canonicalize,fuse-batchnorm{keep=true}")
    objective = Distillation(fake, teacher, [matched_values(fake, teacher, None)])
    results = {
        "calibrated, minmax": setting.top1(setting.run(program, widest)),
        "calibrated, mse": setting.top1(fake),
    }
    for epochs in setting.epochs:
        options = fxpress.TrainingOptions(
            epochs, BATCH, fxpress.Muon(setting.narrow_rate), warmup=0.05, seed=setting.seed
        )
        simulation = Simulation(freeze=0)
        trained = train_simulated(
            fake, setting.train, options, None, simulation, objective=objective, augment="flip-shift"
        ).program
        results[f"trained, {epochs}"] = setting.top1(trained)
    return results


def width_4_inside(setting: Setting, program: fxpress.Program) -> dict[str, float]:
    """As `width_4` with full width at both ends."""
    layers = [layer_name(n) for n in program.graph.nodes if n.target in (aten.conv2d.default, aten.linear.default)]
    return width_4(setting, program, f"{layers[0]},{layers[-1]}")


def width_8(setting: Setting, program: fxpress.Program) -> dict[str, float]:
    """INT8 top-1 in the runtime with and without training."""
    calibrated = setting.run(program, "cleanup,canonicalize,fuse-batchnorm,quantize")
    trained = setting.run(program, f"cleanup,canonicalize,{_qat(setting.wide_rate)}")
    return {"calibrated": setting.top1_of_runtime(calibrated), "trained": setting.top1_of_runtime(trained)}


def budget(setting: Setting, program: fxpress.Program) -> dict[str, float]:
    """Four epochs each: distillation and training with simulation, against labels and calibration."""
    prune = "cleanup,prune{macs=0.5,importance=hessian,normalize=cost,round_to=1},recover"
    pruned = setting.run(program, prune)
    train = f"batch_size=128,augment=flip-shift,learning_rate={setting.rate}"
    last = "canonicalize,fuse-batchnorm,quantize"
    rate = setting.distil_rate
    distil = f"{prune},distil{{epochs=3,freeze=true,learning_rate={rate},{MATCH}}},canonicalize,{_qat(rate / 3)}"
    start = time.perf_counter()
    ours = setting.run(program, distil)
    seconds = time.perf_counter() - start
    plain = setting.run(program, f"{prune},finetune{{epochs=4,{train}}},{last}")
    return {
        "recovered": setting.top1(pruned),
        "finetuned, calibrated": setting.top1_of_runtime(plain),
        "distilled, trained": setting.top1_of_runtime(ours),
        "seconds": seconds,
    }


def _qat(rate: float) -> str:
    return f"fuse-batchnorm{{keep=true}},qat{{freeze=0,learning_rate={rate},{MATCH}}}"


QUESTIONS: dict[str, Callable[[Setting, fxpress.Program], dict[str, float]]] = {
    "width-4": width_4,
    "width-4-inside": width_4_inside,
    "width-8": width_8,
    "budget": budget,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="*", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--judge", choices=("test", "held-out"), default="test")
    parser.add_argument("--examples", type=int, help="train on that many images only")
    parser.add_argument("--limit", type=int, help="judge on that many images only")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of plain fine-tuning")
    parser.add_argument("--distil-rate", type=float, default=5e-3)
    parser.add_argument("--wide-rate", type=float, default=5e-4, help="of 8 bits")
    parser.add_argument("--narrow-rate", type=float, default=3e-3, help="of 4 bits")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1], help="of 4 bits")
    parser.add_argument("--zero-points", action="store_true", help="learn those of 4 bits too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting, program = Setting(options), fxpress.capture(make("resnet20"), (EXAMPLE,))
    results: dict[str, Any] = {"float": setting.top1(program), "images": len(setting.judged[1])}
    print(f"float {results['float']:.2f} % on {results['images']} images ({options.judge}), seed {options.seed}")
    for name in options.questions:
        start = time.perf_counter()
        results[name] = QUESTIONS[name](setting, program)
        figures = "   ".join(f"{k} {v:.2f}" for k, v in results[name].items())
        print(f"{name:8} {figures}   ({time.perf_counter() - start:.0f} s)", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({**results, "options": vars(options) | {"json": str(options.json)}}, indent=1)
        )


if __name__ == "__main__":
    main()
