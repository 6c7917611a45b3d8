"""Does ONNX Runtime compute what PyTorch computes? `check_parity` compares whole programs at several batch sizes.

Layers one by one are judged in layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import fx

from ..errors import VerificationError
from ..frontend.batch_dim import count_examples
from ..frontend.program import Program
from .cut import quantized_sites
from .feed import example_tensors, has_dynamic_batch, leaves, random_inputs, take
from .session import Session, make_session

FLOAT_BOUND = 1e-4
# PyTorch rounds every float16 result (to 2^-11 of it); ONNX Runtime on x86 keeps float32 between many of them.
HALF_BOUND = 1e-2
# Where a value is quantized as it comes (an LSTM's state too), its last bit may decide between two of 255 steps.
DYNAMIC_BOUND = 1e-2
_LEVELS = 255  # steps in the range of a float output, where no scale says how large a step is


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from PyTorch, over all batches and inputs.

    `max_relative`: max |a - b| / max |b| of the worst output; `max_abs`: max |a - b|. `output_within_1_step`: the share
    of output values of a quantized program that differ by at most one step (its output scale, or 1/255 of the output's
    range where the output is float); 1.0 for a float program within the bound. `smallest_reference`: the least
    max |b| of any output (an output of zeros would make agreement say nothing). `squeezed`: eager PyTorch dropped a
    batch of one that the file keeps. `bound`: how large `max_relative` may be in a program that is not quantized.
    """

    batches: tuple[int, ...]
    max_relative: float
    max_abs: float
    output_within_1_step: float
    smallest_reference: float
    quantized: bool
    squeezed: bool = False
    bound: float = FLOAT_BOUND

    @property
    def kept(self) -> bool:
        """Is a float program within the bound? (A quantized one is judged layer by layer.)"""
        return self.quantized or self.max_relative <= self.bound


# -- whole programs -------------------------------------------------------------------------------------------------


def check_parity(
    program: Program,
    model: onnx.ModelProto | bytes | str | Path | Session,
    batches: Sequence[int] = (1, 2, 5),
    real_inputs: Sequence[torch.Tensor] | None = None,
    seed: int = 0,
) -> Parity:
    """Run PyTorch and ONNX Runtime on random inputs like the example inputs; where `real_inputs` are given, only every
    second batch size (of three the second) is run on random ones, the others on those.

    `real_inputs` are the flat input tensors of a batch of examples; as many as each batch needs are taken, repeated if
    there are too few. A program with a fixed batch is checked at its own batch only, on both.
    """
    session = model if isinstance(model, Session) else make_session(model)
    own = count_examples(program.inputs, example_tensors(program))
    sizes = tuple(batches) if has_dynamic_batch(program) else (own,)
    generator = torch.Generator().manual_seed(seed)
    sites = quantized_sites(program)
    quantized = bool(sites) or any(map(is_dynamic, program.graph.nodes))
    tally = _Tally(_output_steps(program, quantized), float_bound(program))
    for i, batch in enumerate(sizes):
        if real_inputs is None or i % 2 or len(sizes) == 1:
            tally.compare(program, session, random_inputs(program, batch, generator))
        if real_inputs is not None and i % 2 == 0:
            tally.compare(program, session, take(program, real_inputs, batch))
    return tally.parity(sizes, quantized)


def is_dynamic(node: fx.Node) -> bool:
    """Does a node quantize its input as it runs?"""
    return str(node.target).startswith("fxpress.dynamic")


def float_bound(program: Program) -> float:
    """How far PyTorch and ONNX Runtime may differ, relative to the largest output value, where nothing is quantized."""
    values = (n.meta.get("val") for n in program.graph.nodes)
    return HALF_BOUND if any(isinstance(v, torch.Tensor) and v.dtype is torch.float16 for v in values) else FLOAT_BOUND


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _output_steps(program: Program, quantized: bool) -> list[float | None]:
    """For each output its step: 0 for a float program, the scale of a dequantized tensor, else None."""
    if not quantized:
        return [0.0] * len(program.outputs)
    return [_step_of(node) for node in program.output_nodes()]


def _step_of(node: fx.Node) -> float | None:
    """The scale behind an output, seen through ops that only move values."""
    while node.op == "call_function" and node.target is not torch.ops.fxpress.dequantize.default:
        if str(node.target) not in _MOVES or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return float(node.args[1]) if node.op == "call_function" else None  # type: ignore[arg-type]


_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "flatten.using_ints", "permute.default", "transpose.int", "squeeze.dim",
        "squeeze.dims", "squeeze.default", "unsqueeze.default", "select.int", "slice.Tensor", "contiguous.default",
    )
)  # fmt: skip


class _Tally:
    """Collects differences over batches and outputs."""

    def __init__(self, steps: list[float | None], bound: float = FLOAT_BOUND) -> None:
        self.steps, self.bound = steps, bound
        self.relative = self.absolute = 0.0
        self.smallest = math.inf
        self.near = self.count = 0
        self.squeezed = False

    def compare(self, program: Program, session: Session, inputs: tuple[torch.Tensor, ...]) -> None:
        expected = program.run_flat(leaves(program, inputs))
        actual = session.run(*map(to_numpy, inputs))
        if len(actual) != len(expected):
            raise VerificationError(f"PyTorch gives {len(expected)} outputs, ONNX Runtime {len(actual)}")
        for ours, theirs, step in zip(actual, map(to_numpy, expected), self.steps):
            self._one(ours, self._aligned(theirs, ours), step)

    def _aligned(self, theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
        """`x.squeeze()` drops a batch of one too, in PyTorch alone; the values are compared all the same."""
        same = ours.shape == theirs.shape
        if not same and [s for s in ours.shape if s != 1] == [s for s in theirs.shape if s != 1]:
            self.squeezed = True
            return theirs.reshape(ours.shape)
        return theirs

    def _one(self, ours: np.ndarray, theirs: np.ndarray, step: float | None) -> None:
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise VerificationError(
                f"PyTorch gives {theirs.dtype}{list(theirs.shape)}, ONNX Runtime {ours.dtype}{list(ours.shape)}",
                hint="this is a fault of the lowering: report it with the model",
            )
        absolute, largest = differences(ours, theirs)
        self.absolute, self.relative = max(self.absolute, absolute), max(self.relative, relative(absolute, largest))
        self.smallest = min(self.smallest, largest)
        self._count_steps(ours, theirs, step, largest)

    def _count_steps(self, ours: np.ndarray, theirs: np.ndarray, step: float | None, largest: float) -> None:
        if step is None:
            step = float(np.ptp(theirs.astype(np.float64))) / _LEVELS if theirs.size else 0.0
        allowed = step * 1.001 if step else self.bound * largest
        with np.errstate(invalid="ignore"):
            near = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)) <= allowed
        self.near += int((near | (ours == theirs)).sum())
        self.count += theirs.size

    def parity(self, batches: tuple[int, ...], quantized: bool) -> Parity:
        share = self.near / self.count if self.count else 1.0
        smallest = self.smallest if math.isfinite(self.smallest) else 0.0
        return Parity(batches, self.relative, self.absolute, share, smallest, quantized, self.squeezed, self.bound)


def differences(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(max |a - b|, max |b|). A NaN or infinity counts as an infinite difference unless both have it."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not a.size:
        return 0.0, 0.0
    odd = ~(np.isfinite(a) & np.isfinite(b))
    if odd.any():
        if not np.array_equal(a[odd], b[odd], equal_nan=True):
            return math.inf, 0.0
        a, b = np.where(odd, 0.0, a), np.where(odd, 0.0, b)
    return float(np.abs(a - b).max()), float(np.abs(b).max())


def relative(absolute: float, largest: float) -> float:
    """max |a - b| / max |b|; 0 where both are 0."""
    return 0.0 if absolute == 0 else absolute / max(largest, 1e-30)
