"""How long ops take in ONNX Runtime: a table of measured kernel times, kept on disk, and whole models compared.

A small program is compiled as the model will be, run in ONNX Runtime with profiling, and the times of its kernels are
added up: the mean of the faster half of the runs, which a busy machine disturbs least. What only stands at the borders
because the program was cut out of a model is left out: changes of memory layout, quantization of its inputs.

The table is a JSON file in the user's cache folder, one for each version of ONNX Runtime, processor and number of
threads. A file that cannot be read is measured anew; it is replaced in one step, with what other processes added.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..backends.onnx.lower import lower
from ..errors import QuantizationError
from ..frontend.program import Program
from ..passes.base import Context, Pass
from ..passes.manager import PassManager
from ..passes.pipeline import print_pipeline
from ..passes.quantize.spec import Target
from .benchmark import compare_on_example
from .feed import example_tensors
from .report.environment import installed, processor_kind
from .session import Session, make_session

_FORMAT = "fxpress-latency-table-2"  # another one where the same figures would be measured otherwise
# Kernels that a cut-out program has at its borders and the model, within, has not.
_BORDER = frozenset({"ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear"})
_KERNEL = "_kernel_time"
_WARM_UP = 3
_FOREIGN_BYTES = 4 << 20
_SAVE_EVERY = 20.0  # seconds

Progress = Callable[[str, int, int | None], None]


class MeasuredLatencies:
    """The clock of ONNX Runtime on this machine, for models that `passes` will turn into what is run.

    `passes` are those that follow pruning (BatchNorm fusion, quantization); ranges are taken from example inputs,
    since they do not change what kernels do. `effort` is the time in seconds for which each small program is run,
    `trials` how often whole models are compared, each time for `seconds`. `cache` is the folder of the table; None
    keeps it in memory.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        target: Target | None = None,
        *,
        threads: int = 1,
        cache: Path | None = None,
        effort: float = 0.02,
        seconds: float = 1.5,
        trials: int = 3,
        progress: Progress | None = None,
    ) -> None:
        self.passes = list(passes)
        self.target = target
        self.threads = threads
        self.effort, self.whole_seconds, self.trials = effort, seconds, trials
        self.progress = progress
        self.measured = 0
        self._cache = cache
        self._form = f"{target.name if target else ''}: {print_pipeline(self.passes)}"
        self._original: tuple[Program, bytes] | None = None

    @property
    def round_to(self) -> int:
        """The channel count multiple that the target's kernels like."""
        return self.target.round_to if self.target else 1

    @cached_property
    def table(self) -> LatencyTable:
        """What is known, read when it is first asked."""
        return LatencyTable(self._cache, environment_key(self.threads))

    def seconds(self, key: str, make: Callable[[], Program]) -> float:
        """The kernel time of the program that `make` builds, from the table where it is known."""
        full = f"{self._form} | {key}"
        known = self.table.get(full)
        if known is None:
            known = kernel_seconds(self._compiled_alone(make()), self.effort, self.threads)
            self.table.put(full, known)
            self.measured += 1
        return known

    def ratio(self, original: Program, pruned: Program) -> float:
        """The median over several trials, with fresh sessions, of the ratio of interleaved runs on one example.

        One thread is judged by its processor time: what else runs on the machine now is no part of the plan.
        """
        models = (self.compiled(pruned), self._compiled_original(original))
        ratios = []
        for trial in range(self.trials):
            self.tell(trial, self.trials, "timing the whole model")
            first, second = (make_session(m, threads=self.threads) for m in models)
            ratios.append(compare_on_example(first, second, original, self.threads, self.whole_seconds).ratio)
        return statistics.median(ratios)

    def save(self) -> None:
        """Write the table, if there is anything new in it."""
        self.table.save()

    def tell(self, done: int, total: int, what: str = "timing ops") -> None:
        """Show progress."""
        if self.progress:
            self.progress(what, done, total)

    def compiled(self, program: Program) -> bytes:
        """A program in the form in which it will be run, as ONNX."""
        return self._lowered(program, self.passes)

    def _compiled_original(self, program: Program) -> bytes:
        if self._original is None or self._original[0] is not program:
            self._original = (program, self.compiled(program))
        return self._original[1]

    def _compiled_alone(self, program: Program) -> bytes:
        """A part of a model; one with nothing to quantize stays in float, as it will within the model."""
        try:
            return self.compiled(program)
        except QuantizationError:
            return self._lowered(program, [p for p in self.passes if p.name != "quantize"])

    def _lowered(self, program: Program, passes: Sequence[Pass]) -> bytes:
        context = Context(self.target, [tuple(example_tensors(program))])
        return lower(PassManager(passes, check_numbers=False).run(program, context)).SerializeToString()


def at_border(op: str, node: str) -> bool:
    """Does a kernel only stand at the borders of a cut-out program?"""
    return op in _BORDER


def kernel_seconds(
    model: bytes, effort: float, threads: int = 1, ignored: Callable[[str, str], bool] = at_border
) -> float:
    """How long the kernels of an ONNX model with fixed shapes take. Runs for about `effort` s.

    `ignored(op, node name)` says which kernels are left out: those at the borders.
    """
    runs = profile(model, effort, threads)
    return _faster_half([sum(s for op, node, s in run if not ignored(op, node)) for run in runs])


def profile(model: bytes, effort: float, threads: int = 1) -> list[list[tuple[str, str, float]]]:
    """The kernels (op, node, seconds) of each run of an ONNX model with fixed shapes, as they followed each other."""
    with tempfile.TemporaryDirectory() as folder:
        session = make_session(model, threads=threads, profile=Path(folder) / "profile")
        inputs = tuple(_some_input(session, i) for i in range(len(session.input_names)))
        others = np.zeros(_FOREIGN_BYTES // 4, dtype=np.float32)
        session.run(*inputs)
        start = time.perf_counter()
        session.run(*inputs)
        once = max(time.perf_counter() - start, 1e-6)
        for _ in range(_WARM_UP - 2 + int(np.clip(effort / once, 8, 50))):
            others += 1  # within a model, the other layers have filled the caches in between
            session.run(*inputs)
        events = json.loads(Path(session.inner.end_profiling()).read_text())
    return _runs(events)[_WARM_UP:]


def _some_input(session: Session, index: int) -> np.ndarray:
    shape, dtype = session.input_shapes[index], session.input_dtypes[index]
    if dtype.startswith("float"):
        return np.random.default_rng(index).standard_normal(shape).astype(dtype)
    return np.full(shape, dtype == "bool", dtype=dtype)


def _runs(events: list[dict[str, Any]]) -> list[list[tuple[str, str, float]]]:
    """The kernels of each run in a profile of ONNX Runtime."""
    runs: list[list[tuple[str, str, float]]] = [[]]
    for event in events:
        name = str(event.get("name"))
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            runs[-1].append((event["args"]["op_name"], name.removesuffix(_KERNEL), event["dur"] * 1e-6))
        elif name == "model_run":
            runs.append([])
    return runs[:-1]


def _faster_half(times: list[float]) -> float:
    times = sorted(times)
    return statistics.fmean(times[: max(len(times) // 2, 1)])


# -- the table on disk --------------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where measured latencies are kept: `$XDG_CACHE_HOME/fxpress/latency`, or under `~/.cache`; None for a user who
    has no home, as in some containers."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fxpress" / "latency"
    except RuntimeError:
        return None


def environment_key(threads: int) -> str:
    """What a kernel's time depends on beside the kernel: how it is written and loaded goes with the version."""
    return f"fxpress {__version__}, onnxruntime {installed('onnxruntime')}, {processor_kind()}, {threads} thread(s)"


class LatencyTable:
    """Text -> seconds, in a JSON file of `folder` that belongs to `environment`; in memory only without a folder."""

    def __init__(self, folder: Path | None, environment: str) -> None:
        self.environment = environment
        self.path = folder / f"{_digest(environment)}.json" if folder else None
        self._new: dict[str, float] = {}
        self._known = self._read()
        self._saved = time.monotonic()

    def get(self, text: str) -> float | None:
        """The seconds that are known for `text`, or None."""
        return self._known.get(_digest(text))

    def put(self, text: str, seconds: float) -> None:
        """Remember; what was measured is written from time to time, so that an interrupted run is not lost."""
        self._known[_digest(text)] = self._new[_digest(text)] = seconds
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what is new, beside what other processes wrote. A cache that cannot be written is not an error."""
        if self.path is None or not self._new:
            return
        content = {"format": _FORMAT, "environment": self.environment, "seconds": {**self._read(), **self._new}}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".latency-", dir=self.path.parent)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file)
                os.replace(temporary, self.path)
            finally:
                Path(temporary).unlink(missing_ok=True)
            self._new = {}
        self._saved = time.monotonic()

    def _read(self) -> dict[str, float]:
        """What the file holds; nothing where it is absent, damaged or of another environment."""
        if self.path is None:
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT or data["environment"] != self.environment:
                return {}
            return {k: v for k, v in data["seconds"].items() if isinstance(v, float) and 0 <= v < 1e6}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
