"""What the command line shows: messages, tables and one progress display, on stderr; machine output on stdout.

The progress display is only drawn on a terminal; tables keep their whole width where stderr is a file or a pipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import FxpressError
from ..runtime.report.words import comparison, percent

Progress = Callable[[str, int, int | None], None]
_PIPE_WIDTH = 160


def console() -> Console:
    """The console for people: stderr."""
    wide = None if sys.stderr.isatty() else _PIPE_WIDTH
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), width=wide)


def say(text: str) -> None:
    """One line for people."""
    console().print(escape(text))


def warn(text: str) -> None:
    """One line for people, marked."""
    console().print(f"[yellow]warning:[/] {escape(text)}")


def show_error(error: FxpressError) -> None:
    """What happened, where, and the hint. Notes (a reproducer's path) follow."""
    screen = console()
    screen.print(f"[bold red]error:[/] {escape(error.message)}")
    if error.where:
        screen.print(f"  [dim]at[/] {escape(error.where)}")
    if error.hint:
        screen.print(f"  [cyan]hint:[/] {escape(error.hint)}")
    for note in getattr(error, "__notes__", []):
        screen.print(f"  [dim]note:[/] {escape(note)}")


def emit_json(value: Any) -> None:
    """Machine output: one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> None:
    """A table for people; `right` are the columns of figures."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console().print(table)


def show_report(report: dict[str, Any]) -> None:
    """The headline of a report: float against compiled, coverage, promises."""
    rows = [(r.label, r.before, r.after, r.change) for r in comparison(report)]
    show_table(report["model"]["name"], ("", "float", "compiled", "change"), rows, right=(1, 2, 3))
    coverage = report["coverage"]
    islands = len(coverage["float_islands"])
    left = f"; {islands} float island{'s' * (islands != 1)}, see the report" if islands else ""
    say(f"{percent(coverage['integer_macs'])} of the MACs in integer kernels{left}")
    for key, where in (("kept_float", "float"), ("kept_int16", "16 bits")):
        if kept := (report.get("fallback") or {}).get(key):
            say(f"in {where} so that the metric falls no further than allowed: {', '.join(kept)}")
    for effect in (report["pruning"] or {}).get("effects", ()):
        say(effect)
    for promise in report["promises"]:
        mark = "[green]kept[/]" if promise["kept"] else "[bold red]MISSED[/]"
        console().print(f"{mark} {promise['name']}: {escape(promise['detail'])}")


@contextmanager
def progress_display() -> Iterator[Progress | None]:
    """A callback (stage, done, total) that draws one bar with an estimate; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Display

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Display(*columns, console=console(), transient=True) as display:

        def update(stage: str, done: int, total: int | None) -> None:
            if not display.tasks or display.tasks[0].description != stage:
                for old in display.task_ids:
                    display.remove_task(old)
                display.add_task(stage, total=total)  # a new task, so that the estimate starts anew
            display.update(display.task_ids[0], completed=done, total=total)

        yield update
