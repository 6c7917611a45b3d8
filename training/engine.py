"""What runs the steps: Hugging Face Accelerate, on one process or many, on a CPU or GPUs.

Start several processes with `torchrun --nproc-per-node N script.py` or `accelerate launch script.py`; the same script,
started plainly, runs on one. Every process calls the same functions; only the first writes files and tells progress.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_aggregate

from ..errors import OptionError, TrainingError, first_line
from ..frontend.program import Program
from ..passes.processor import has_bfloat16
from .examples import Part
from .objectives import Batch, Objective, counted_labels
from .options import Precision, TrainingOptions

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Step(nn.Module):
    """The loss of one batch as a module, so that whatever an objective calls, gradients are shared by the processes."""

    def __init__(self, program: Program, objective: Objective) -> None:
        super().__init__()
        self.model = program.graph_module
        self.objective = objective  # registered, and trained, where it is a module
        self._program = program

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.objective(self._program, batch)


class Engine:
    """Accelerate, as much of it as the loop needs, and mixed precision (which Accelerate fixes once for a process)."""

    def __init__(self, accelerator: Any, precision: Precision) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.part = Part(accelerator.process_index, accelerator.num_processes)
        self.dtype = _DTYPES.get(precision)
        # Small gradients vanish in float16 unless the loss is scaled up (Micikevicius et al. 2018).
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")

    @property
    def is_first(self) -> bool:
        """Is this the process that writes?"""
        return self.part.rank == 0

    def prepare(self, step: Step) -> nn.Module:
        """The step on the device, ready for several processes."""
        return self.accelerator.prepare(step)

    def loss(self, step: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of this process's part, its layers computed in the chosen precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return step(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Leave the gradients of the mean loss of all processes."""
        self.accelerator.backward(self.scaler.scale(loss))

    def update(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], largest: float | None) -> float:
        """One step with the gradients, scaled to a norm of at most `largest`. Returns the norm before; where it is not
        finite there was no step."""
        self.scaler.unscale_(optimizer)
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        if largest is not None and math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, largest, total)
        if math.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        return norm

    def from_first(self, value: float) -> float:
        """The value of the first process."""
        if self.part.count == 1:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor([value], dtype=torch.float64, device=self.device)))

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the tensors of the first, in place."""
        if self.part.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().clone()))

    def require_same(self, step: int) -> None:
        """Raise TrainingError unless every process begins at the same step."""
        if self.from_first(step) != step:
            raise TrainingError(
                f"process {self.part.rank} begins at step {step}, the first one elsewhere",
                hint="every process must see the same checkpoint folder",
            )

    def label_weight(self, labels: torch.Tensor, weight: float) -> float:
        """What a mean over this process's class numbers weighs beside the `weight` of its examples (`Batch`): processes
        may have other shares of the labels that count than of the examples."""
        if self.part.count == 1 or labels.is_floating_point():
            return 1.0
        own = counted_labels(labels) if weight else 0
        each = self.mean(own)
        return own / each / weight if own else 0.0

    def mean(self, value: float) -> float:
        """The mean over processes."""
        if self.part.count == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor([value], dtype=torch.float64, device=self.device), "mean"))


def make_engine(options: TrainingOptions) -> Engine:
    """Accelerate for these options. Raises OptionError where it is not installed, or the device lacks the precision."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import is_initialized
    except ImportError as error:
        raise OptionError("training needs the package accelerate", hint="pip install 'fxpress[train]'") from error
    # An objective may leave a weight unused, for which the other processes would wait.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    try:
        accelerator = Accelerator(
            cpu=options.device == "cpu" or not torch.accelerator.is_available(),  # else it sees no processes on CPUs
            mixed_precision=None if is_initialized() else "no",
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        raise OptionError(
            f"Accelerate cannot start: {first_line(error)}", hint="one process trains on one device: start a new one"
        ) from error
    if accelerator.mixed_precision != "no":
        raise OptionError(
            f"this process started Accelerate with mixed_precision={accelerator.mixed_precision!r}",
            hint="start it without, and give TrainingOptions(precision=...)",
        )
    accelerator.gradient_accumulation_steps = 1  # it would divide the loss by what the environment says
    check_precision(options.precision, accelerator.device)
    return Engine(accelerator, options.precision)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise OptionError where the device has no instructions for it: it would only be slow."""
    if device.type == "cuda":
        able = precision != "bfloat16" or torch.cuda.is_bf16_supported()
    else:
        able = precision == "float32" or (precision == "bfloat16" and has_bfloat16())
    if not able:
        raise OptionError(f"this {device.type} does not compute in {precision}", hint="use precision='float32'")


def move(program: Program, device: torch.device) -> None:
    """Put a program on a device, in place: its tensors, and the devices that its nodes name."""
    program.graph_module.to(device)
    for node in program.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda a: _moved(a, device))
    program.graph_module.recompile()


def _moved(argument: Any, device: torch.device) -> Any:
    return device if isinstance(argument, torch.device) else argument
