"""The options of a compilation, checked before anything is run.

What contradicts itself, or would have no effect, is an error that says so: nobody should wait for a result that is not
what was asked for.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError, OptionError
from ..frontend.preprocess import Preprocess, load_preprocess
from ..frontend.program import Program, require_program
from ..passes.prune.plan import PruningPlan
from ..passes.quantize.placement.fallback import Budget
from ..recipe import parse_drop
from ..runtime.evaluate import Evaluate
from ..training.distributed import TorchProcesses, join_processes, started_count
from .placing import runs_here, without_vnni
from .settings import Settings, has_integers, quantizes, reads_labels, trains

# -- one option ------------------------------------------------------------------------------------------------------


def checked_threads(threads: int) -> int:
    """A number of threads that there can be."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise OptionError(f"threads is {threads!r}", hint="give a whole number of 1 or more")
    return threads


def checked_seed(seed: int) -> int:
    """A seed that every generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**63:
        raise OptionError(f"seed is {seed!r}", hint="give a whole number from 0 on")
    return int(seed)


def checked_drop(max_drop: str | float | None, evaluate: Evaluate | None) -> float | None:
    """The share that a metric may fall, from "1%" or 0.01; it needs a metric."""
    if max_drop is None:
        return None
    if evaluate is None:
        raise OptionError(
            "max_drop has no effect without a metric", hint="give evaluate (on the command line: --eval DATA)"
        )
    return parse_drop(max_drop)


def checked_folder(option: str, path: str | Path | None) -> Path | None:
    """The path of a folder to write."""
    if path is not None and not isinstance(path, (str, Path)):
        raise OptionError(f"{option} is a {type(path).__name__}", hint="give the path of a folder")
    return Path(path) if path else None


def check_dump(dump: Path | None, output: Path | None) -> None:
    """Raise OptionError for a dump inside the output, which is replaced whole."""
    if dump is not None and output is not None and output.resolve() in (dump.resolve(), *dump.resolve().parents):
        raise OptionError(f"dump {dump} lies in the output {output}", hint="give a folder beside it")


def checked_preprocess(preprocess: Preprocess | str | None) -> Preprocess | None:
    """A preprocess, by its name or file too."""
    if isinstance(preprocess, str):
        return load_preprocess(preprocess)
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        raise OptionError(f"preprocess is a {type(preprocess).__name__}", hint="give a Preprocess, or a name: imagenet")
    return preprocess


def checked_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The names of classes."""
    names = () if isinstance(labels, str) or not isinstance(labels, Iterable) else tuple(labels)
    if (labels and not names) or not all(isinstance(n, str) for n in names):
        raise OptionError(f"labels are {labels!r}", hint='give the names of the classes: ["cat", "dog"]')
    return names


def check_origin(reference: Program | None, plan: PruningPlan | None) -> None:
    """Raise OptionError unless these are what a program may have been made from."""
    if reference is not None:
        require_program(reference, "reference must be")
    if plan is not None and not isinstance(plan, PruningPlan):
        raise OptionError(f"plan is a {type(plan).__name__}", hint="give the PruningPlan that the program was made by")


def fitting_labels(labels: tuple[str, ...], program: Program, notes: list[str]) -> tuple[str, ...]:
    """The names of classes, none where there are not as many as the model has classes (the folders of calibration
    pictures may be few of them), with a note."""
    dims = program.outputs[0].dims if len(program.outputs) == 1 else ()
    if labels and len(dims) == 2 and isinstance(dims[1], int) and dims[1] != len(labels):
        notes.append(f"the data name {len(labels)} classes and the model has {dims[1]}: the names are not recorded")
        return ()
    return labels


def checked_search(
    max_drop: str | float | None, seconds: float | None, trials: int | None, journal: str | Path | None
) -> Budget:
    """How long the search under `max_drop` may take."""
    given = {"seconds": seconds, "trials": trials}
    if max_drop is None and (journal is not None or any(v is not None for v in given.values())):
        raise OptionError(
            "search_seconds, search_trials and journal have no effect without max_drop",
            hint="give max_drop, or leave them out",
        )
    return Budget(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def journal_beside(journal: str | Path | None, output: str | Path | None) -> Path | None:
    """The journal beside the output, where none is named: the folder itself is written in one step at the end."""
    if journal is not None:
        return Path(journal)
    return Path(output).with_name(Path(output).name + ".journal") if output is not None else None


def started_processes(distributed: bool) -> TorchProcesses | None:
    """The processes that share the work, None where there is one. Raises OptionError where none were started."""
    if not distributed:
        return None
    processes = join_processes()
    if processes is None:
        raise OptionError(
            "distributed has no effect on one process", hint="start several: torchrun --nproc-per-node 2 script.py"
        )
    return processes


# -- options together ------------------------------------------------------------------------------------------------


def check_settings(settings: Settings) -> None:
    """Raises DataError or OptionError where options do not go together."""
    _check_training(settings)
    _check_tuning(settings)


def _check_training(settings: Settings) -> None:
    """Passes that train need data, with labels where they read them, and others have no use for them."""
    kind, given = ("labelled data", "(inputs, labels)") if reads_labels(settings.passes) else ("data", "inputs")
    if trains(settings.passes) and settings.training is None:
        raise DataError(f"the recipe trains on {kind}", hint=f"give training={given} (--train-data DATA)")
    if getattr(settings.training, "labelled", None) is False and reads_labels(settings.passes):
        raise DataError(f"{settings.training.name} has no labels, and the recipe reads them", hint="give labelled data")
    if settings.processes is None and trains(settings.passes) and started_count() > 1:
        raise OptionError(
            "the recipe trains on all processes that torchrun started, and each would calibrate and write by itself",
            hint="give distributed=True",
        )
    if settings.training is not None and not trains(settings.passes):
        raise OptionError(
            "training data have no effect: nothing in the pipeline trains",
            hint="use a recipe such as int8-qat, or the pass finetune",
        )


def _check_tuning(settings: Settings) -> None:
    """Tuning asks the runtime here; it has no effect where nothing is quantized, or on what runs elsewhere."""
    if not 0 < settings.tune_seconds < float("inf"):
        raise OptionError(f"tune_seconds is {settings.tune_seconds!r}", hint="give a number of seconds above 0")
    wanted = (("tune", settings.tune, quantizes), ("allow_slower", settings.allow_slower, has_integers))
    for name, given, has_use in wanted:
        if given and not has_use(settings.passes):
            raise OptionError(f"{name} has no effect: the pipeline does not quantize", hint="leave it out")
    if settings.tune and settings.processes is not None:
        raise OptionError(
            "tune does not work beside distributed: processes would measure differently",
            hint="tune on one process, then give the pipeline that its report states",
        )
    if settings.tune and any(p.name == "qat" for p in settings.passes):
        raise OptionError(
            "tune does not work with qat: each placement would be trained",
            hint="tune the recipe int8, then give the keep_float that its report states to qat",
        )
    if settings.tune and not runs_here(settings.target):
        why = without_vnni(settings.target) or f"its models run elsewhere ({settings.target.run})"
        raise OptionError(
            f"tune has no effect on target {settings.target.name}: {why}",
            hint="leave it out: a measurement here says nothing about it",
        )
