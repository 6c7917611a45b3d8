"""`fxpress compile`: from what was typed to one call of `api.compile`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from .screen import emit_json, progress_display, say, show_report, warn

if TYPE_CHECKING:
    from ..frontend.data import Data, Loading
    from ..frontend.preprocess import Preprocess
    from ..frontend.sources import Source

MISSED = 2


@dataclass(frozen=True)
class Request:
    """Everything that `fxpress compile` was given, as typed."""

    model: str
    data: str | None = None
    eval_data: str | None = None
    train_data: str | None = None
    weights: Path | None = None
    input_size: str | None = None
    preprocess: str | None = None
    samples: int | None = None
    target: str = "ort-x86"
    prune: str | None = None
    recipe: str | None = None
    pipeline: str | None = None
    max_drop: str | None = None
    search_seconds: float | None = None
    search_trials: int | None = None
    journal: Path | None = None
    tune: bool = False
    allow_slower: bool = False
    seed: int = 0
    threads: int = 1
    dump: Path | None = None
    output: Path = Path("out")
    distributed: bool = False


def compile_model(request: Request, as_json: bool) -> int:
    """Run a request; 0: compiled and verified, 2: compiled, but a promise was missed."""
    from ..api import compile
    from ..recipe import DEFAULT
    from ..runtime.artifact import check_output
    from ..runtime.evaluate import Top1

    start = time.perf_counter()
    check_output(request.output)
    source = resolve_source(request.model, request.weights, request.seed)
    loading = resolve_loading(source, request)
    data = resolve_data(request.data, dataclasses.replace(loading, samples=request.samples))
    judged = resolve_judge(request, loading)
    args, kwargs = resolve_example(source, request.input_size, data, request.seed)
    with progress_display() as progress:
        artifact = compile(
            source.module,
            args,
            kwargs,
            calibration=data,
            target=request.target,
            prune=request.prune,
            recipe=request.recipe or DEFAULT,
            pipeline=request.pipeline,
            training=resolve_data(request.train_data, loading),
            evaluate=Top1(judged) if judged is not None else None,
            max_drop=request.max_drop,
            search_seconds=request.search_seconds,
            search_trials=request.search_trials,
            journal=request.journal,
            tune=request.tune,
            allow_slower=request.allow_slower,
            output=request.output,
            seed=request.seed,
            threads=request.threads,
            name=source.name,
            preprocess=used_preprocess(data, judged, loading),
            labels=next((d.classes for d in (judged, data) if d is not None and d.classes), ()),
            dump=request.dump,
            progress=progress,
            distributed=request.distributed,
        )
    if request.distributed and os.environ.get("RANK", "0") != "0":
        return 0 if artifact.kept else MISSED  # the first process speaks for all
    show_report(artifact.report)
    say(f"compiled in {time.perf_counter() - start:.1f} s: {request.output / 'report.html'}")
    if as_json:
        emit_json(artifact.report)
    return 0 if artifact.kept else MISSED


def resolve_source(model: str, weights: Path | None, seed: int) -> Source:
    """The model, with its weights in place."""
    from ..frontend.program import Program
    from ..frontend.sources import load_source
    from ..frontend.weights import load_weights

    source = load_source(model, seed)
    if weights is not None:
        if isinstance(source.module, Program):
            raise OptionError("--weights has no effect on a .pt2 archive, which holds its own", hint="leave it out")
        for note in load_weights(source.module, weights):
            say(note)
    elif source.random_weights:
        warn(f"{model} has random weights (nothing is downloaded): accuracy means nothing; give --weights FILE")
    return source


def resolve_loading(source: Source, request: Request) -> Loading:
    """How pictures become inputs: what was asked for, else what the model brings, at the size that was asked for."""
    from ..frontend.data import Loading
    from ..frontend.preprocess import load_preprocess

    if request.samples is not None and request.data is None:
        raise OptionError("--samples has no effect without --data", hint="leave it out, or give data")
    asked = load_preprocess(request.preprocess) if request.preprocess else None
    if asked is not None and request.data is None and request.eval_data is None:
        raise OptionError("--preprocess has no effect without --data or --eval", hint="leave it out, or give data")
    fallback = source.preprocess
    if fallback is not None and request.input_size:
        fallback = _resized(fallback, parse_size(request.input_size))
    return Loading(asked, fallback)


def resolve_data(text: str | None, loading: Loading) -> Data | None:
    """DATA, where it was given."""
    from ..frontend.data import open_data

    return open_data(text, loading) if text else None


def resolve_judge(request: Request, loading: Loading) -> Data | None:
    """The labelled data of --eval."""
    judged = resolve_data(request.eval_data, loading)
    if judged is not None and judged.labelled is False:
        raise OptionError(f"{judged.name} has no labels, so --eval has no effect", hint="give labelled data")
    if judged is not None and request.eval_data == request.data:
        warn("--data and --eval are the same: the metric is judged on what calibrated the model")
    return judged


def used_preprocess(data: Data | None, judged: Data | None, loading: Loading) -> Preprocess | None:
    """What pictures passed through; a model compiled without pictures still records what its source says."""
    applied = [d.preprocess for d in (data, judged) if d is not None and d.preprocess is not None]
    return applied[0] if applied else loading.fallback


def resolve_example(
    source: Source, size: str | None, data: Data | None, seed: int
) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """Example inputs (args, kwargs): the source's own, of the size that was asked for, the first batch of the data,
    or of the size that the source is known for. Raises OptionError where nothing tells."""
    from ..frontend.program import Program

    if source.example is not None:
        if size is not None:
            raise OptionError(f"--input has no effect: {source.name} brings its example inputs", hint="leave it out")
        return (None, None) if isinstance(source.module, Program) else (source.example, None)
    if size is not None:
        return (_random(parse_size(size), seed),), None
    if data is not None:
        return example_of(next(iter(data), None), data.name)
    if source.input_shape is not None:
        return (_random(source.input_shape, seed),), None
    raise OptionError(
        f"nothing says what inputs {source.name} takes",
        hint="add --input 3x224x224, give --data, or let your callable return (module, example_args)",
    )


def example_of(item: Any, name: str) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """(args, kwargs) from the first batch of data, its labels left out."""
    import torch

    from ..errors import DataError
    from ..frontend.batches import LABEL_NAMES

    if item is None:
        raise DataError(f"{name} holds no examples", hint="give at least one batch")
    if isinstance(item, Mapping):
        return (), {k: torch.as_tensor(v) for k, v in item.items() if k not in LABEL_NAMES}
    if not isinstance(item, (tuple, list)):
        return (torch.as_tensor(item),), None
    inputs = item[0] if len(item) == 2 and _is_labels(item[1]) else item
    inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return tuple(torch.as_tensor(x) for x in inputs), None


def _is_labels(value: Any) -> bool:
    import torch

    labels = torch.as_tensor(value)
    return labels.ndim <= 1 and not labels.is_floating_point()


def parse_size(text: str) -> tuple[int, ...]:
    """ "3x224x224" -> (3, 224, 224). Raises OptionError."""
    parts = text.lower().split("x")
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise OptionError(f"--input is {text!r}", hint="write the size of one example without the batch: 3x224x224")
    return tuple(map(int, parts))


def _resized(preprocess: Preprocess, size: tuple[int, ...]) -> Preprocess:
    """The same preparation for another input size, with the same margin around the crop."""
    if len(size) != 3 or preprocess.crop is None or size[1:] == preprocess.crop:
        return preprocess
    (old_height, old_width), (height, width) = preprocess.crop, size[1:]
    resize = preprocess.resize
    if isinstance(resize, int):
        resize = round(resize * min(height, width) / min(old_height, old_width))
    elif resize is not None:
        resize = (round(resize[0] * height / old_height), round(resize[1] * width / old_width))
    return dataclasses.replace(
        preprocess, name=f"{preprocess.name}-{height}x{width}", resize=resize, crop=(height, width)
    )


def _random(size: tuple[int, ...], seed: int) -> Any:
    import torch

    return torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))
