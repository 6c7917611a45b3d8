"""The Python interface: `compile` and its parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from .backends.onnx.lower import lower
from .backends.targets import load_target
from .compilation.options import (
    check_dump,
    check_origin,
    check_settings,
    checked_drop,
    checked_folder,
    checked_labels,
    checked_preprocess,
    checked_search,
    checked_seed,
    checked_threads,
    fitting_labels,
    journal_beside,
    started_processes,
)
from .compilation.settings import Progress, Settings, Stages, quantizes
from .compilation.steps import FLOAT_PIPELINE, compile_program, latency_clock
from .errors import DataError, OptionError
from .frontend.batches import Batches, as_batches
from .frontend.capture import capture, notes_of
from .frontend.preprocess import Preprocess
from .frontend.program import Program, require_program
from .frontend.weights import check_program_finite
from .passes.base import Context
from .passes.manager import PassManager
from .passes.pipeline import make_pass, parse_pipeline
from .passes.prune import planning
from .passes.prune.plan import PruningPlan
from .passes.quantize.passes import Ranges
from .recipe import DEFAULT, resolve_passes
from .runtime.artifact import Artifact, check_output
from .runtime.evaluate import Evaluate
from .runtime.latency import MeasuredLatencies

_TARGET = "ort-x86"


def compile(
    module: torch.nn.Module | Program,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    target: str = "ort-x86",
    prune: str | float | Mapping[str, Any] | None = None,
    recipe: str = DEFAULT,
    pipeline: str | None = None,
    training: Any = None,
    evaluate: Evaluate | None = None,
    max_drop: str | float | None = None,
    search_seconds: float | None = None,
    search_trials: int | None = None,
    journal: str | Path | None = None,
    tune: bool = False,
    tune_seconds: float = 60.0,
    allow_slower: bool = False,
    output: str | Path | None = None,
    seed: int = 0,
    threads: int = 1,
    name: str | None = None,
    preprocess: Preprocess | str | None = None,
    labels: Iterable[str] = (),
    reference: Program | None = None,
    plan: PruningPlan | None = None,
    dump: str | Path | None = None,
    progress: Progress | None = None,
    distributed: bool = False,
) -> Artifact:
    """From a trained model to a verified ONNX file with a report.

    `args` are example inputs, batch first (not for a Program, which has its own). `calibration` is any iterable of
    batches that can be read again: tensors, tuples or dicts of inputs; labels in them are ignored. `prune` is the share
    of MACs to keep (0.5), or options as text ("params=0.6,importance=l1"). `recipe` is a name or a TOML file,
    `pipeline` replaces it. `training` are data for recipes that train, all that `fxpress.train` takes,
    with labels where the recipe reads them.
    `evaluate(run) -> float` judges PyTorch and ONNX Runtime alike; `max_drop` ("1%", 0.01) is
    how far it may fall: if it falls further, other rules for ranges and weights are tried, then the fewest MACs are
    left in float that keep the allowance (`search_seconds`, `search_trials`: for so long at most; the trials are
    written to `journal`, by default `output` + ".journal", from which a killed search goes on). If that fails too, the
    best so far is kept and marked (`artifact.kept` is False).

    `tune` measures on this machine which ops are faster in float, for about `tune_seconds`, and leaves those in float.
    Without it, too, a model that turns out slower than the float model is tuned, and stays in float where that does not
    help; `allow_slower` keeps it as it is. (Not where the target is for another processor, which a note then says.)

    `reference` is the float model that the report compares with, for a Program that was already changed (pruned and
    fine-tuned, with its `plan`); otherwise it is the captured model itself. `preprocess` and `labels` are recorded for
    the bundle. `output` is the folder to write, `dump` one for the graph after each pass.

    `distributed`: the processes that `torchrun` started share the calibration. Each must make the same call; each gets
    the artifact, and the first one writes it. Recipes that train need it there: a training uses all processes. Not with
    `max_drop`, whose search goes by the clock.

    Raises FxpressError subclasses for everything that a user can mend.
    """
    processes = started_processes(distributed)
    if processes is not None and max_drop is not None:
        raise OptionError("the search under max_drop is for one process", hint="leave max_drop or distributed out")
    output, dump = checked_folder("output", output), checked_folder("dump", dump)
    check_dump(dump, output)
    if processes is not None and processes.rank > 0:
        output = dump = progress = None
    settings = Settings(
        name=name or _name_of(module),
        target=load_target(target),
        passes=resolve_passes(recipe, pipeline, prune),
        seed=checked_seed(seed),
        threads=checked_threads(threads),
        max_drop=checked_drop(max_drop, evaluate),
        search=checked_search(max_drop, search_seconds, search_trials, journal),
        journal=journal_beside(journal, output),
        tune=tune,
        tune_seconds=tune_seconds,
        allow_slower=allow_slower,
        preprocess=checked_preprocess(preprocess),
        labels=checked_labels(labels),
        dump=dump,
        progress=progress,
        processes=processes,
        training=training,
    )
    check_settings(settings)
    check_origin(reference, plan)
    if calibration is None and quantizes(settings.passes):
        raise DataError("quantization needs calibration data", hint="give calibration (--data), or the recipe float")
    if output is not None:
        check_output(output)
    stages = Stages(progress)
    with stages.step("capture") as record:
        program = as_program(module, args, kwargs, share_weights=True)
        record.notes += notes_of(program)
        check_program_finite(program)
        settings = dataclasses.replace(settings, labels=fitting_labels(settings.labels, program, record.notes))
    batches = _checked_calibration(program, calibration, stages)
    artifact = compile_program(program, reference or program, settings, stages, batches, evaluate, plan)
    if output is not None:
        artifact.save(output)
    return artifact


@functools.wraps(planning.plan_pruning)
def plan_pruning(program: Program, **options: Any) -> PruningPlan:
    if options.get("latency") is not None and options.get("latencies") is None:
        options["latencies"] = op_latencies()
    return planning.plan_pruning(program, **options)


def op_latencies(
    recipe: str = "float", target: str = _TARGET, threads: int = 1, progress: Progress | None = None
) -> MeasuredLatencies:
    """What `plan_pruning(latency=..., latencies=...)` measures with: ONNX Runtime on this machine, for models that
    `recipe` turns into what is run ("int8": the latency of the quantized model). Kernel times are kept in the user's
    cache folder. Without it, plan_pruning measures the float model with one thread."""
    return latency_clock(resolve_passes(recipe), load_target(target), checked_threads(threads), progress)


def quantize(
    program: Program,
    calibration: Iterable[Any],
    target: str = "ort-x86",
    ranges: Ranges = "auto",
    seed: int = 0,
    distributed: bool = False,
) -> Program:
    """A quantized copy of `program`, which still runs in PyTorch. What is not fused yet is fused before: a BatchNorm or
    an activation on its own would cost conversions from and to integers around it.

    `distributed`: the processes that `torchrun` started share the calibration; each must call this with the same data,
    and each returns the same program.

    Raises DataError for calibration data that do not fit, QuantizationError, OptionError.
    """
    require_program(program)
    context = Context(target=load_target(target), calibration=as_batches(program, calibration), seed=seed)
    context.processes = started_processes(distributed)
    passes = [*parse_pipeline(FLOAT_PIPELINE), make_pass("quantize", {"ranges": ranges})]
    return PassManager(passes).run(program, context)


def to_onnx(program: Program, target: str = "ort-x86", opset: int = 21) -> onnx.ModelProto:
    """A program, float or quantized, as an ONNX model. Raises LoweringError for what cannot be written."""
    require_program(program)
    load_target(target)
    return lower(program, opset=opset)


def as_program(
    module: torch.nn.Module | Program,
    args: tuple[Any, ...] | torch.Tensor | None,
    kwargs: dict[str, Any] | None = None,
    share_weights: bool = False,
) -> Program:
    """Capture a module; a Program is taken as it is, and example inputs beside it are refused."""
    if isinstance(module, Program):
        if args is not None or kwargs is not None:
            raise OptionError("example inputs have no effect on a Program, which has its own", hint="leave them out")
        return module
    if args is None:
        raise OptionError("a module needs example inputs", hint="for example args=(torch.randn(2, 3, 224, 224),)")
    return capture(module, args, kwargs, share_weights=share_weights)


def _checked_calibration(program: Program, calibration: Iterable[Any] | None, stages: Stages) -> Batches | None:
    if calibration is None:
        return None
    with stages.step("data") as record:
        batches = as_batches(program, calibration)
        record.notes += batches.notes
    return batches


def _name_of(module: Any) -> str:
    if isinstance(module, Program):
        return str(module.graph_module.meta.get("fxpress_model", "program"))
    return type(module).__name__
