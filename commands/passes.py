"""`fxpress passes`, `targets`, `recipes`: what there is, from the code's own declarations; and `opt`, `rerun`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FxpressError, OptionError, OutputError
from .screen import emit_json, say, show_table

if TYPE_CHECKING:
    from ..frontend.program import Program
    from ..passes.base import Context, Pass
    from ..passes.manager import PassManager


def load_plugins(files: list[Path]) -> None:
    """Run the user's own files, which register passes or importances. Raises OptionError for one that does neither."""
    from ..frontend.sources import load_file
    from ..passes.base import registered_passes
    from ..passes.prune.importance.registry import criteria

    for file in files:
        before = {*registered_passes(), *criteria()}
        module = load_file(file)
        made = [*registered_passes().values(), *(c.function for c in criteria().values())]
        own = [c for c in made if c.__module__ == module.__name__]
        if not own and {*registered_passes(), *criteria()} == before:
            raise OptionError(
                f"--plugin {file} has no effect: it registers no pass",
                hint="put @fxpress.register_pass above a pass, or @fxpress.register_importance(name) above a function",
            )


def list_passes(as_json: bool) -> int:
    """Every pass with its options."""
    from ..passes.base import registered_passes

    rows = [
        {"name": n, "summary": c.summary(), "options": _options(c), "preserves": sorted(c.preserves)}
        for n, c in registered_passes().items()
    ]
    show_table(
        "passes",
        ("name", "what it does", "options"),
        [(r["name"], r["summary"], _options_text(r["options"])) for r in rows],
    )
    if as_json:
        emit_json(rows)
    return 0


def _options(cls: type[Pass]) -> dict[str, Any]:
    """Option -> default."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {f.name: f.default if f.default is not dataclasses.MISSING else None for f in fields}


def _options_text(options: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items())


def list_targets(as_json: bool) -> int:
    """Every target."""
    from ..backends.targets import load_target, target_names

    rows = [
        {
            "name": t.name,
            "summary": t.summary,
            "activations": ", ".join(dict.fromkeys(str(f) for f in t.activation_formats)),
            "weights": str(t.weight),
            "bias": str(t.bias or "float32"),
            "run": t.run,
            "rows": len(t.rows),
        }
        for t in map(load_target, target_names())
    ]
    titles = ("name", "what it is", "activations", "weights", "biases", "where it was run", "rows")
    show_table("targets", titles, [tuple(r.values()) for r in rows], right=(6,))
    if as_json:
        emit_json(rows)
    return 0


def list_recipes(as_json: bool) -> int:
    """Every built-in recipe."""
    from ..recipe import RECIPES

    rows = [dataclasses.asdict(r) for r in RECIPES.values()]
    show_table("recipes", ("name", "what it does", "pipeline"), [tuple(r.values()) for r in rows])
    if as_json:
        emit_json(rows)
    return 0


def optimize(
    source: Path, pipeline: str, output: Path, target: str, data: str | None, seed: int, dump: Path | None
) -> int:
    """Run passes on a saved Program."""
    from ..frontend.program import Program
    from ..passes.manager import REPRODUCER, PassManager

    if output.suffix != ".pt2":
        raise OutputError(f"{output} does not end in .pt2", hint="name a .pt2 file")
    program = Program.load(source)
    manager = PassManager(pipeline, dump=dump, repro=dump / REPRODUCER if dump else None)
    result = manager.run(program, _context(program, manager, target, data, seed))
    result.save(output)
    _show_stages(result, len(program.log))
    say(f"written: {output}")
    return 0


def rerun(crash: Path, target: str, data: str | None, dump: Path | None) -> int:
    """Replay a reproducer: the program as it was, the passes that remained, the same seed."""
    from ..frontend.program import Program
    from ..passes.manager import REPRODUCER, PassManager

    facts, archive = read_reproducer(crash)
    try:
        program = Program.load(archive)
    finally:
        archive.unlink()
    say(f"replaying {facts['pipeline']}")
    say(f"  seed {facts['seed']}, written by fxpress {facts['fxpress']} with torch {facts['torch']}")
    manager = PassManager(facts["pipeline"], dump=dump, repro=dump / REPRODUCER if dump else None)
    result = manager.run(program, _context(program, manager, target, data, facts["seed"]))
    _show_stages(result, len(program.log))
    say("the failure does not occur here")
    return 0


def read_reproducer(path: Path) -> tuple[dict[str, Any], Path]:
    """(facts, a temporary .pt2 with the program). Raises FxpressError for what is no reproducer."""
    try:
        with zipfile.ZipFile(path) as bundle:
            facts = json.loads(bundle.read("repro.json"))
            content = bundle.read("program.pt2")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise FxpressError(
            f"{path} is no reproducer: {error}", hint="a failure under --dump DIR writes DIR/crash.repro"
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".pt2", delete=False) as file:
        file.write(content)
    return facts, Path(file.name)


def _context(program: Program, manager: PassManager, target: str, data: str | None, seed: int) -> Context:
    from ..backends.targets import load_target
    from ..compilation.steps import latency_clock
    from ..frontend.batches import as_batches
    from ..frontend.data import open_data
    from ..passes.base import Context

    batches = as_batches(program, open_data(data)) if data else None
    table = load_target(target)
    clock = latency_clock([p for p in manager.passes if not isinstance(p, str)], table)
    return Context(target=table, calibration=batches, seed=seed, latencies=clock)


def _show_stages(program: Program, known: int) -> None:
    rows = [(s.name, f"{s.seconds:.2f}", s.changes, "\n".join(s.notes[:5])) for s in program.log[known:]]
    show_table("", ("pass", "seconds", "changes", "notes"), rows, right=(1, 2))
