"""`fxpress eval` and `fxpress bench`: a compiled model judged anew, on this machine and on the user's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArtifactError, DataError, FxpressError, OptionError
from ..runtime.artifact import read_models
from ..runtime.benchmark import Timing, compare_latency
from ..runtime.manifest import MODEL, Manifest
from ..runtime.report.words import metric_words, milliseconds, speed
from ..runtime.session import Session, make_session
from .screen import emit_json, say, show_table

if TYPE_CHECKING:
    from ..frontend.tensor_info import TensorInfo


def evaluate_artifact(folder: Path, data: str, preprocess: str | None, threads: int, as_json: bool) -> int:
    """Top-1 and latency, float against compiled. Pictures pass through the artifact's own preprocess."""
    from ..frontend.data import Loading, open_data
    from ..frontend.preprocess import load_preprocess
    from ..runtime.evaluate import Top1, file_runner, measure

    manifest = Manifest.read(folder)
    if preprocess and manifest.preprocess:
        raise OptionError(
            f"{folder} was compiled with the preprocess {manifest.preprocess.name}; another judges another model",
            hint="leave --preprocess out",
        )
    asked = load_preprocess(preprocess) if preprocess else None
    judged = open_data(data, Loading(asked, manifest.preprocess))
    sessions = [make_session(m, threads=threads) for m in read_models(folder)]
    metrics = [measure(Top1(judged), file_runner(manifest.inputs, s)) for s in sessions]
    timing = compare_latency(sessions[0], sessions[1], single_inputs(manifest.inputs))
    rows = [
        (metrics[0].name, *metric_words(metrics[0].value, metrics[1].value)),
        ("latency", milliseconds(timing.first_ms), milliseconds(timing.second_ms), speed(timing.ratio)),
    ]
    show_table(
        f"{manifest.model} on {metrics[0].count} examples", ("", "float", "compiled", "change"), rows, right=(1, 2, 3)
    )
    if as_json:
        emit_json({
            "metric": {"name": metrics[0].name, "count": metrics[0].count},
            "float": {"metric": metrics[0].value, "latency_ms": timing.first_ms},
            "compiled": {"metric": metrics[1].value, "latency_ms": timing.second_ms},
            "speedup": timing.ratio,
        })  # fmt: skip
    return 0


def bench_artifact(folder: Path, against: Path | None, seconds: float, threads: int, as_json: bool) -> int:
    """Interleaved medians of the compiled model against float, or against another ONNX file."""
    if seconds <= 0:
        raise OptionError(f"--seconds is {seconds:g}", hint="give a positive number")
    manifest = Manifest.read(folder)
    other_name = str(against) if against else "float"
    if against is None:
        other, compiled = (make_session(m, threads=threads) for m in read_models(folder))
    else:
        other, compiled = other_model(against, threads), make_session(manifest.verify(folder, MODEL), threads=threads)
    check_same_inputs(other, compiled, other_name)
    timing = compare_latency(other, compiled, single_inputs(manifest.inputs), seconds=seconds)
    rows = [
        (other_name, milliseconds(timing.first_ms), ""),
        ("compiled", milliseconds(timing.second_ms), speed(timing.ratio)),
    ]
    show_table(f"{manifest.model}, batch 1", ("", "median", ""), rows, right=(1,))
    say(f"{timing.runs} interleaved pairs, {threads} thread{'s' * (threads != 1)}")
    if as_json:
        emit_json(_timing(timing, other_name))
    return 0


def _timing(timing: Timing, other: str) -> dict[str, Any]:
    return {
        "against": other,
        "other_ms": timing.first_ms,
        "compiled_ms": timing.second_ms,
        "speedup": timing.ratio,
        "runs": timing.runs,
    }


def other_model(path: Path, threads: int) -> Session:
    """A session for any ONNX file. Raises ArtifactError."""
    if not path.is_file():
        raise ArtifactError(f"no such file: {path}", hint="give the path of an .onnx file")
    try:
        return make_session(path, threads=threads)
    except FxpressError as error:
        raise ArtifactError(f"{path}: {error.message}", hint="give an .onnx file that ONNX Runtime can load") from error


def check_same_inputs(first: Session, second: Session, name: str) -> None:
    """Raise ArtifactError unless both take the same number and dtypes of inputs."""
    if first.input_dtypes != second.input_dtypes:
        raise ArtifactError(
            f"{name} takes inputs {', '.join(first.input_dtypes)}, the compiled model {', '.join(second.input_dtypes)}",
            hint="compare models of the same interface",
        )


def single_inputs(infos: tuple[TensorInfo, ...]) -> tuple[np.ndarray, ...]:
    """One example for timing: normal numbers, zeros for integers; every symbolic dim is 1."""
    generator = np.random.default_rng(0)
    arrays = []
    for info in infos:
        shape = tuple(d if isinstance(d, int) else 1 for d in info.dims)
        if info.dtype not in ("float32", "float64", "float16"):
            arrays.append(np.zeros(shape, info.dtype))
        else:
            arrays.append(generator.standard_normal(shape).astype(info.dtype))
    if not arrays:
        raise DataError("the model takes no inputs", hint="there is nothing to measure")
    return tuple(arrays)
