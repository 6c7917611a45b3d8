"""The steps of one compilation, each a function; `api.compile` is what users call.

    passes -> lower -> verify -> evaluate -> benchmark -> report

The float model that everything is compared with is the one that was captured, unpruned; as an ONNX file it is written
after cleanup and BatchNorm fusion, so that its latency is the best that float offers.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import onnx

from ..errors import OptionError
from ..frontend.batches import Batches
from ..frontend.cost import count_macs
from ..frontend.program import Program
from ..passes.base import VALUES, Context, Pass
from ..passes.manager import REPRODUCER, PassManager
from ..passes.memory import return_memory
from ..passes.pipeline import make_pass, parse_pipeline, print_pipeline
from ..passes.prune.groups import find_pinned
from ..passes.prune.plan import PruningPlan
from ..passes.prune.rules.table import analyze
from ..passes.quantize.spec import Target
from ..runtime.artifact import Artifact
from ..runtime.elsewhere import judge_elsewhere
from ..runtime.evaluate import Evaluate, Metric
from ..runtime.latency import MeasuredLatencies, cache_folder
from ..runtime.manifest import Manifest
from ..runtime.model_file import ModelFile
from ..runtime.report.build import Figures, Findings, build_report
from ..runtime.report.environment import installed
from ..runtime.session import make_session
from ..runtime.verify import check_parity
from ..training.passes import QAT
from .allowance import (
    Allowance,
    Settled,
    allowance_of,
    drop_promise,
    judge_both,
    judge_float,
    runtime_judge,
    settle,
)
from .allowance_report import as_json, describe
from .judging import (
    judge_coverage,
    judge_layers,
    judged_inputs,
    output_sqnr,
    parity_batches,
    parity_promise,
    reference_promise,
)
from .placing import Placing, Timed, lower_and_time, speed_promise, speed_text, tuning_json
from .settings import Compiled, Progress, Settings, Stages, first_dynamic, first_quantizer, judges_speed, trains

FLOAT_PIPELINE = "cleanup,canonicalize,fuse-batchnorm"
# What has no part in how fast the result is.
_SPEEDLESS = (
    "prune", "verify-pruning", "recover", "finetune", "distil", "equalize", "smooth", "learn-rounding", "correct-bias",
)  # fmt: skip


def compile_program(
    program: Program,
    reference: Program,
    settings: Settings,
    stages: Stages,
    batches: Batches | None = None,
    evaluate: Evaluate | None = None,
    plan: PruningPlan | None = None,
) -> Artifact:
    """All steps from a captured program to an Artifact. `reference` is the float model to compare with."""
    real = judged_inputs(reference, batches)
    context = Context(settings.target, batches, evaluate, settings.seed, settings.progress)
    placing = Placing(context, real, settings.threads, settings.tune_seconds, judges_speed(settings))
    compiled = transform(program, settings, stages, batches, evaluate, placing if settings.tune else None)
    settings = dataclasses.replace(settings, passes=compiled.passes)
    compiled, settings, settled = settle_drop(compiled, program, reference, settings, stages, batches, evaluate)
    known = settled.metrics if settled else None
    allowed = allowance_of(settled, settings.max_drop, evaluate, settings.threads)
    fast, timed = lower_and_keep_speed(compiled, program, reference, settings, stages, context, placing, allowed)
    if fast is not compiled:
        compiled, known = fast, (known[0], None) if known else None
    float_model, model, session, timing = timed.float_model, timed.model, timed.session, timed.timing
    with stages.step("verify"):
        float_session = timed.float_session or make_session(float_model.source)
        timed = dataclasses.replace(timed, float_session=None)
        sizes = parity_batches(reference)
        reference_parity = check_parity(reference, float_session, sizes, real, settings.seed)
        del float_session  # as large as the model
        return_memory()
        parity = check_parity(compiled.final, session, sizes, real, settings.seed)
        return_memory()
        layer_parity, rows = judge_layers(compiled, real)
        sqnr = output_sqnr(reference, session, real)
    elsewhere = None
    if compiled.floating is not None and settings.target.runtime != "onnxruntime":
        with stages.step(settings.target.name) as record:
            elsewhere = judge_elsewhere(
                compiled.final, float_model.load(), model, real, settings.target, settings.threads
            )
            record.notes += elsewhere.notes if elsewhere else []
    with stages.step("evaluate"):
        metrics = judge_both(evaluate, reference, compiled.final, session, known)
    findings = Findings(
        name=settings.name,
        target=settings.target.name,
        pipeline=print_pipeline(compiled.passes),
        seed=settings.seed,
        threads=settings.threads,
        stages=stages.records,
        before=figures(reference, float_model.size_bytes, timing.first_ms, metrics[0]),
        after=figures(compiled.final, model.ByteSize(), timing.second_ms, metrics[1], compiled.floating),
        speedup=timing.ratio,
        metric=metrics[1],
        parity=parity,
        coverage=elsewhere.coverage if elsewhere else judge_coverage(model, compiled, settings),
        sqnr_db=sqnr,
        layer_parity=layer_parity,
        layers=rows,
        plan=compiled.plan or plan,
        pinned=find_pinned(analyze(reference)) if compiled.plan or plan else [],
        compressed=compressed_sizes(compiled.plan or plan, float_model, model),
        promises=[
            reference_promise(reference_parity),
            parity_promise(parity, layer_parity, settings.target),
            *(elsewhere.promises if elsewhere else []),
            *([speed_promise(timed)] if placing.promised else []),
            *drop_promise(metrics, settings.max_drop),
        ],
        fallback=as_json(settled.outcome) if settled and settled.outcome else None,
        tuning=tuning_json(placing.tuning),
    )
    report = build_report(findings)
    return Artifact(model, report, manifest_of(compiled.final, settings, report), float_model)


# -- passes -------------------------------------------------------------------------------------------------------


def transform(
    program: Program,
    settings: Settings,
    stages: Stages,
    batches: Batches | None,
    evaluate: Evaluate | None,
    placing: Placing | None = None,
) -> Compiled:
    """Run the pipeline, keeping the program as it was just before quantization. `placing` tunes what follows."""
    passes = list(settings.passes)
    clock = latency_clock(passes, settings.target, settings.threads, settings.progress)
    context = Context(settings.target, batches, evaluate, settings.seed, settings.progress, latencies=clock)
    context.processes, context.training = settings.processes, settings.training
    cut = first_quantizer(passes)
    known = len(program.log)

    def run(part: list[Pass], before: Program, first: int) -> Program:
        repro = settings.dump / REPRODUCER if settings.dump else None
        manager = PassManager(
            part, dump=settings.dump, repro=repro, on_stage=stages.tell, first=first, share_weights=True
        )
        return manager.run(before, context)

    floating = run(passes[:cut], program, 0)
    stages.records += floating.log[known:]
    known = len(floating.log)
    tail = passes[cut:]
    if placing is not None and tail:
        with stages.step("tune") as record:
            tail = placing.tuned(floating, tail, record)
    if not tail and only_prepares(passes[:cut]):
        passes = parse_pipeline(FLOAT_PIPELINE)
        cut, floating = len(passes), run(passes, program, 0)
    final = run(tail, floating, cut) if tail else floating
    refuse_unfolded(final)
    stages.records += final.log[known:]
    plan = context.results.get("prune")
    return Compiled(floating if tail else None, final, plan, (*passes[:cut], *tail))


def only_prepares(front: Sequence[Pass]) -> bool:
    """Is this what the recipe `float` does, and something for the sake of a quantization that follows?"""
    rest = [p for p in front if ".accuracy." not in type(p).__module__]
    return len(rest) < len(front) and print_pipeline(rest) == FLOAT_PIPELINE


def refuse_unfolded(program: Program) -> None:
    """Raise OptionError for a program that observes or simulates integers, and has none."""
    for node in program.graph.nodes:
        for op, missing in (("fxpress.observe", "fold"), ("fxpress.fake_quantize", "fold-fake-quantize")):
            if node.op == "call_function" and str(node.target).startswith(op):
                raise OptionError(
                    f"the pipeline ends before there are integers ({op} is left)", hint=f"add `{missing}` at its end"
                )


def lower_and_keep_speed(
    compiled: Compiled,
    program: Program,
    reference: Program,
    settings: Settings,
    stages: Stages,
    context: Context,
    placing: Placing,
    allowed: Callable[[Program], bool],
) -> tuple[Compiled, Timed]:
    """Lower and time the model; where it is slower than float, place it anew, so that its metric is still `allowed`."""
    with stages.step("lower"):
        float_program = float_form(compiled, program, reference)
        timed = lower_and_time(float_program, compiled.final, reference, settings.threads)
    alone = settings.processes is None and not trains(compiled.passes[first_quantizer(compiled.passes) :])
    if not placing.promised or not timed.slower or not alone:
        return compiled, timed
    if compiled.floating is None:
        return stay_in_float(compiled, program, reference, settings, stages, context, timed)
    floating, cut = compiled.floating, first_quantizer(compiled.passes)
    made = [compiled.final]
    front: Sequence[Pass] = compiled.passes[:cut]
    prepared = program is reference and only_prepares(front)

    def make(tail: list[Pass]) -> Timed:
        plain = float_program if prepared else floating
        made.append(PassManager(tail, on_stage=stages.tell).run(floating, context) if tail else plain)
        return lower_and_time(float_program, made[-1], reference, settings.threads)

    with stages.step("not-slower") as record:
        good = lambda: allowed(made[-1])  # noqa: E731
        tail, timed = placing.not_slower(floating, compiled.passes[cut:], timed, record, make, good)
    stages.records += made[-1].log[len(floating.log) :]
    front = parse_pipeline(FLOAT_PIPELINE) if prepared and not tail else front
    return Compiled(floating if tail else None, made[-1], compiled.plan, (*front, *tail)), timed


def stay_in_float(
    compiled: Compiled,
    program: Program,
    reference: Program,
    settings: Settings,
    stages: Stages,
    context: Context,
    timed: Timed,
) -> tuple[Compiled, Timed]:
    """The passes before those that quantize as it runs, where these make the model slower and nothing has to be trained
    anew for it."""
    front = compiled.passes[: first_dynamic(compiled.passes)]
    if trains(front) or any(p.name == "prune" for p in front):
        return compiled, timed
    with stages.step("not-slower") as record:
        record.notes.append(f"{speed_text(timed)}: slower than float; the model stays in float")
        record.changes = 1
        final = PassManager(front, share_weights=True).run(program, context)
        timed = lower_and_time(final, final, reference, settings.threads)
    return Compiled(None, final, compiled.plan, tuple(front)), timed


def float_form(compiled: Compiled, program: Program, reference: Program) -> Program:
    """The reference as float is fastest; the pipeline may have made just that on its way."""
    made = compiled.floating or compiled.final
    idle = {record.name for record in made.log if not record.changes}
    before = compiled.passes[: first_quantizer(compiled.passes)]
    done = [p for p in before if p.name not in idle or p.name in FLOAT_PIPELINE.split(",")]
    if program is reference and print_pipeline(done) == FLOAT_PIPELINE:
        return made
    return PassManager(FLOAT_PIPELINE, share_weights=True).run(reference)


def settle_drop(
    compiled: Compiled,
    program: Program,
    reference: Program,
    settings: Settings,
    stages: Stages,
    batches: Batches | None,
    evaluate: Evaluate | None,
) -> tuple[Compiled, Settings, Settled | None]:
    """Where the metric falls further than allowed, look for a pipeline that keeps it, and run that one.

    There is no search where quantization trains, since each trial would be a training."""
    if settings.max_drop is None or evaluate is None or trains(settings.passes[first_quantizer(settings.passes) :]):
        return compiled, settings, None
    context = Context(settings.target, batches, evaluate, settings.seed, settings.progress)
    context.training = settings.training
    context.processes = settings.processes
    cut = first_quantizer(settings.passes)
    with stages.step("max-drop") as record:
        allowance = Allowance(*judge_float(evaluate, reference), settings.max_drop, settings.search, settings.journal)
        judge = runtime_judge(evaluate, settings.threads)
        lossless = program is reference and all(VALUES in p.preserves for p in settings.passes[:cut])
        tail = settings.passes[cut:]
        settled = settle(compiled.floating, compiled.final, tail, context, allowance, judge, lossless)
        record.notes += describe(settled.outcome) if settled.outcome else []
    if settled.passes == list(settings.passes[cut:]) or compiled.floating is None:
        return compiled, settings, settled
    dump = settings.dump / "max-drop" if settings.dump else None
    again = dataclasses.replace(settings, passes=settled.passes, dump=dump)
    found = transform(compiled.floating, again, stages, batches, evaluate)
    passes = (*settings.passes[:cut], *settled.passes)
    found = dataclasses.replace(found, plan=compiled.plan, passes=passes)
    return found, dataclasses.replace(settings, passes=passes), settled


def latency_clock(
    passes: Sequence[Pass], target: Target, threads: int = 1, progress: Progress | None = None
) -> MeasuredLatencies:
    """What tells a latency budget how long a model takes in the form that the passes after pruning will give it (where
    there are none, as a float model)."""
    first = next((i for i, p in enumerate(passes) if p.name == "prune"), -1)
    follow = [_untrained(p) for p in passes[first + 1 :] if p.name not in _SPEEDLESS]
    return MeasuredLatencies(
        follow or parse_pipeline(FLOAT_PIPELINE), target, threads=threads, cache=cache_folder(), progress=progress
    )


def _untrained(item: Pass) -> Pass:
    """What makes a model as fast as `item` does, without training it."""
    return make_pass("quantize", {"keep_float": item.keep_float}) if isinstance(item, QAT) else item


# -- worth and cost -----------------------------------------------------------------------------------------------


def figures(
    program: Program,
    size_bytes: int,
    latency_ms: float,
    metric: Metric | None,
    floating: Program | None = None,
) -> Figures:
    """What one model costs and is worth.

    MACs are those of the network (`floating`, where it was quantized), without the zeros that a target's form of a
    layer may multiply besides.
    """
    return Figures(
        size_bytes=size_bytes,
        parameters=program.parameter_count,
        macs=count_macs(floating or program),
        latency_ms=latency_ms,
        metric=metric.value if metric else None,
    )


def compressed_sizes(
    plan: PruningPlan | None, float_model: ModelFile, model: onnx.ModelProto
) -> tuple[int, int] | None:
    """The bytes of both files after zlib, which is all that zeros among the weights are good for; None without them."""
    if plan is None or not plan.masks:
        return None
    before, after = (len(zlib.compress(m.SerializeToString())) for m in (float_model.load(), model))
    return before, after


def manifest_of(program: Program, settings: Settings, report: dict[str, Any]) -> Manifest:
    """What the shipped bundle must know."""
    return Manifest(
        model=settings.name,
        target=settings.target.name,
        inputs=program.inputs,
        outputs=program.outputs,
        preprocess=settings.preprocess,
        labels=settings.labels,
        kept=all(p["kept"] for p in report["promises"]),
        versions={k: str(report["environment"][k]) for k in ("fxpress", "torch", "onnx", "onnxruntime")}
        | {"numpy": installed("numpy")},
    )
