"""`fxpress demo`: runs the demonstration and shows what came of it."""

from __future__ import annotations

import time
from pathlib import Path

from ..demo import run_demo
from .screen import emit_json, progress_display, say, show_report

MISSED = 2


def run(output: Path, seed: int, threads: int, as_json: bool) -> int:
    """0: compiled and verified; 2: a promise was missed."""
    start = time.perf_counter()
    with progress_display() as progress:
        artifact = run_demo(output, seed, threads, progress)
    show_report(artifact.report)
    say(f"done in {time.perf_counter() - start:.1f} s: {output / 'report.html'}")
    if as_json:
        emit_json(artifact.report)
    return 0 if artifact.kept else MISSED
