"""`fxpress demo`: the main job from beginning to end, on data that comes with scikit-learn.

A small conv-BN-ReLU network learns to read 8x8 digits; it is captured, pruned to half its MACs, trained for a moment to
follow the whole network, and compiled (fused, calibrated, quantized, lowered, verified). The held-out digits take no
part in training or calibration; they only judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .api import compile
from .compilation.settings import Progress
from .errors import SourceError
from .frontend.capture import capture
from .passes.prune.planning import plan_pruning
from .runtime.artifact import Artifact, check_output
from .runtime.evaluate import Top1
from .runtime.processor import native_target
from .training.distill import Distillation
from .training.loop import finetune
from .training.matching import matched_values
from .training.options import AdamW, Muon, TrainingOptions
from .training.threads import torch_threads

MACS_KEPT = 0.5
CALIBRATION = 256
_HELD_OUT = 0.3
_EPOCHS, _RECOVERY_EPOCHS = 8, 4


class DigitNet(nn.Module):
    """Six 3x3 convolutions with BatchNorm and ReLU, one residual sum, global pooling: 10 classes from [N, 1, 8, 8]."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = block(1, width)
        self.left = nn.Sequential(block(width, width), block(width, width))
        self.down = block(width, 2 * width, stride=2)
        self.right = nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [N, 10]."""
        x = self.stem(x)
        x = x + self.left(x)
        x = self.right(self.down(x))
        return self.head(x.mean((2, 3)))


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@dataclass(frozen=True)
class Digits:
    """Train and held-out digits: inputs float32 [N, 1, 8, 8] in [0, 1], labels [N]."""

    inputs: torch.Tensor
    labels: torch.Tensor
    held_out_inputs: torch.Tensor
    held_out_labels: torch.Tensor


def load_digits(seed: int = 0) -> Digits:
    """scikit-learn's 1,797 digits, split by `seed`. Raises SourceError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SourceError("the demo needs scikit-learn", hint="pip install 'fxpress[demo]'") from error
    data = load()
    inputs = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    held, kept = order.split([int(_HELD_OUT * len(order)), len(order) - int(_HELD_OUT * len(order))])
    return Digits(inputs[kept], labels[kept], inputs[held], labels[held])


def run_demo(output: str | Path, seed: int = 0, threads: int = 1, progress: Progress | None = None) -> Artifact:
    """Train, prune, train, compile and judge; writes the artifact to `output`. Raises FxpressError subclasses."""
    check_output(output)
    digits = load_digits(seed)
    with torch_threads(threads):
        return _run(Path(output), digits, seed, threads, progress)


def _run(output: Path, digits: Digits, seed: int, threads: int, progress: Progress | None) -> Artifact:
    torch.manual_seed(seed)
    data = (digits.inputs, digits.labels)
    options = TrainingOptions(epochs=_EPOCHS, optimizer=AdamW(1e-2, weight_decay=1e-4), seed=seed)
    untrained = capture(DigitNet(), (digits.inputs[:2],))
    reference = finetune(untrained, data, options, progress=progress, name="train")
    plan = plan_pruning(reference, macs=MACS_KEPT, round_to=16, seed=seed)
    student = plan.apply(reference)
    follow = Distillation(student, reference, [matched_values(student, reference, plan)], seed=seed)
    options = TrainingOptions(epochs=_RECOVERY_EPOCHS, optimizer=Muon(), seed=seed + 1)
    pruned = finetune(student, data, options, objective=follow, progress=progress)
    return compile(
        pruned,
        calibration=digits.inputs[:CALIBRATION].split(32),
        target=native_target(),
        evaluate=Top1([(digits.held_out_inputs, digits.held_out_labels)]),
        max_drop=0.01,
        reference=reference,
        plan=plan,
        output=output,
        name="digits demo",
        labels=map(str, range(10)),
        seed=seed,
        threads=threads,
        progress=progress,
    )
