"""What a compilation is asked for, how its steps are recorded, and what it made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..frontend.preprocess import Preprocess
from ..frontend.program import Program, StageRecord
from ..passes.base import Pass, Processes
from ..passes.memory import peak_memory, return_memory
from ..passes.prune.plan import PruningPlan
from ..passes.quantize.placement.fallback import Budget
from ..passes.quantize.spec import Target
from .placing import runs_here

DYNAMIC = "quantize-dynamic"
# From the first of these on, layers are compared with the program as it was before.
QUANTIZERS = ("qat", "fake-quantize", "quantize", "annotate", "observe", "calibrate")
TRAINERS = ("finetune", "distil", "qat")

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Settings:
    """What a user decided, resolved."""

    name: str
    target: Target
    passes: Sequence[Pass]
    seed: int = 0
    threads: int = 1
    max_drop: float | None = None
    search: Budget = field(default_factory=Budget)
    journal: Path | None = None
    tune: bool = False
    tune_seconds: float = 60.0
    allow_slower: bool = False
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] = ()
    dump: Path | None = None
    progress: Progress | None = None
    processes: Processes | None = None
    training: Any = None


@dataclass
class Stages:
    """Times every step and tells the progress display."""

    progress: Progress | None = None
    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[StageRecord]:
        """Measure a block as one stage; the block may add notes to the record."""
        self.tell(name)
        record, start = StageRecord(name), time.perf_counter()
        with peak_memory() as memory:
            yield record
        return_memory()
        record.seconds, record.peak_rss_mb = time.perf_counter() - start, memory.megabytes
        self.records.append(record)

    def tell(self, name: str) -> None:
        """Say what is being done now."""
        if self.progress:
            self.progress(name, 0, None)


@dataclass(frozen=True)
class Compiled:
    """The program at its stages: `floating` just before quantization (None where nothing is quantized), `final`.
    `passes` are those that were run."""

    floating: Program | None
    final: Program
    plan: PruningPlan | None
    passes: tuple[Pass, ...] = ()


# -- what a pipeline does -------------------------------------------------------------------------------------------


def first_quantizer(passes: Sequence[Pass]) -> int:
    """Where quantization begins in a pipeline; its length where it does not."""
    return next((i for i, p in enumerate(passes) if p.name in QUANTIZERS), len(passes))


def trains(passes: Sequence[Pass]) -> bool:
    """Does a pipeline train on data?"""
    return any(p.name in TRAINERS for p in passes)


def reads_labels(passes: Sequence[Pass]) -> bool:
    """Does a pipeline train on what the labels of its data say?"""
    return any(getattr(p, "reads_labels", False) for p in passes)


def quantizes(passes: Sequence[Pass]) -> bool:
    """Does a pipeline quantize?"""
    return first_quantizer(passes) < len(passes)


def first_dynamic(passes: Sequence[Pass]) -> int:
    """Where a pipeline begins to quantize what is quantized as it runs; its length where it does not."""
    return next((i for i, p in enumerate(passes) if p.name == DYNAMIC), len(passes))


def has_integers(passes: Sequence[Pass]) -> bool:
    """Does a pipeline make integers, by calibration or as they run?"""
    return quantizes(passes) or first_dynamic(passes) < len(passes)


def judges_speed(settings: Settings) -> bool:
    """Is it promised that the model is not slower than float? Only what runs here can be timed."""
    return has_integers(settings.passes) and not settings.allow_slower and runs_here(settings.target)
