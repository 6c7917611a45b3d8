"""Runs passes in order and checks, after each, that what it declares is true.

The argument program is never changed: the manager works on a copy. For every pass it keeps time, number of changes,
notes and peak memory. `dump` writes the readable graph after each pass and how the op counts changed. A failure writes
a reproducer (the program before the failing pass, the remaining pipeline, seed and versions).
"""

from __future__ import annotations

import json
import platform
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__
from ..errors import FxpressError, OutputError, PassError
from ..frontend.program import Program, StageRecord
from .base import VALUES, Change, Context, Pass
from .memory import peak_memory, return_memory
from .pipeline import parse_pipeline, print_pipeline
from .verify import check_interface, check_structure, check_values, fingerprint, follow_weights


@dataclass
class PassManager:
    """A pipeline ready to run. `passes` is a list of Pass objects or a pipeline text.

    `dump` is a folder for the graph after each pass, `repro` a file for the reproducer of a failure; `on_stage` is told
    the name of each pass before it starts. `check_numbers=False` leaves out the numeric check (rule 4). `first` is the
    number of passes that ran before this part of a pipeline, so that the parts dump into one folder. With
    `share_weights` the result may hold tensors of the argument, if no pass writes into weights: it must not be trained.
    """

    passes: Sequence[Pass] | str
    dump: Path | None = None
    repro: Path | None = None
    check_numbers: bool = True
    on_stage: Callable[[str], None] | None = None
    first: int = 0
    share_weights: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.passes, str):
            self.passes = parse_pipeline(self.passes)

    def run(self, program: Program, context: Context | None = None) -> Program:
        """Run all passes on a copy of `program` and return it; each adds a `StageRecord` to its log."""
        context = context or Context()
        program = program.copy(share_weights=self.share_weights and not any(p.writes_weights for p in self.passes))  # type: ignore[union-attr]
        stale = follow_weights(program)
        if self.dump and self.first == 0:
            write_dump(self.dump, 0, "input", program, Counter())
        assert not isinstance(self.passes, str)
        context.wanted = context.wanted.union(*(item.reads for item in self.passes))
        for i, item in enumerate(self.passes):
            if self.on_stage:
                self.on_stage(item.name)
            # Values are only compared for passes that promise them; the promise costs a copy and two runs.
            numbers = self.check_numbers and VALUES in item.preserves
            before = program.copy(share_weights=not item.writes_weights) if self.repro or numbers else None
            try:
                self._run_one(i, item, program, context, before if numbers else None, stale and i == 0)
            except Exception as error:
                self._on_failure(i, before, context, error)
                raise
        return program

    def _run_one(
        self, i: int, item: Pass, program: Program, context: Context, before: Program | None, stale: bool
    ) -> None:
        """Run one pass and check it (where it left everything as it was, only if that was `stale`); its numbers against
        `before`, where that is given."""
        ops_before, mark = op_counts(program), fingerprint(program)
        shell = Program(program.graph_module, program.example_inputs, program.inputs, program.outputs)
        start = time.perf_counter()
        with torch.random.fork_rng(), peak_memory() as memory:
            torch.manual_seed(context.seed)
            change = item.run(program, context)
        seconds = time.perf_counter() - start
        if not isinstance(change, Change):
            raise PassError(
                f"pass {item.name!r} returned {type(change).__name__}", hint="return fxpress.Change(count, notes)"
            )
        changed = bool(change.count) or fingerprint(program) != mark
        if stale or changed:
            check_structure(program, item.name)
            check_interface(item, shell, program)
        if before is not None and changed:
            check_values(item, before, program)
        return_memory()
        program.log.append(StageRecord(item.name, seconds, change.count, change.notes, memory.megabytes))
        if self.dump:
            write_dump(self.dump, self.first + i + 1, item.name, program, ops_before)

    def _on_failure(self, i: int, before: Program | None, context: Context, error: Exception) -> None:
        """Name the pass and write the reproducer. What fails here must not hide the error itself."""
        if not isinstance(error, FxpressError):  # those name it themselves; of others the traceback is worth most
            error.add_note(f"in pass {self.passes[i].name!r}, number {self.first + i + 1} of the pipeline")  # type: ignore[union-attr]
        users_mistake = isinstance(error, FxpressError) and not isinstance(error, PassError)
        if before is None or self.repro is None or users_mistake:
            return
        try:
            write_reproducer(self.repro, before, print_pipeline(self.passes[i:]), context.seed)  # type: ignore[arg-type]
            replay = f"fxpress rerun {self.repro}, with --plugin where a pass is yours"
            error.add_note(f"reproducer: {self.repro} (replay with: {replay})")
        except Exception as second:
            error.add_note(f"no reproducer could be written: {second}")


REPRODUCER = "crash.repro"  # its name in the folder of a dump


def run_passes(program: Program, passes: Sequence[Pass] | str, context: Context | None = None) -> Program:
    """Run passes (objects or a pipeline text) on a copy of `program`."""
    return PassManager(passes).run(program, context)


def op_counts(program: Program) -> Counter[str]:
    """How often each op occurs."""
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def write_dump(folder: Path, index: int, name: str, program: Program, before: Counter[str]) -> None:
    """`NN-name.txt`: op-count differences, then the graph."""
    now = op_counts(program)
    changed = {k: (before[k], now[k]) for k in sorted(before | now) if before[k] != now[k]}
    head = [f"# after {name}", *(f"#   {k}: {a} -> {b}" for k, (a, b) in changed.items()), ""]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}-{name}.txt").write_text("\n".join(head) + program.text() + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot dump to {folder}: {error.strerror}", hint="choose another folder") from error


def write_reproducer(path: Path, program: Program, pipeline: str, seed: int) -> None:
    """A zip with the program as it was when the pass failed and what remained to run. Replay: `fxpress rerun`."""
    archive = path.with_suffix(".pt2.tmp")
    program.save(archive)
    facts = {
        "pipeline": pipeline,
        "seed": seed,
        "fxpress": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.write(archive, "program.pt2")
        bundle.writestr("repro.json", json.dumps(facts, indent=1))
    archive.unlink()
