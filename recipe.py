"""Recipes: named pipelines, built in or in a TOML file, and how a pruning request joins them.

# my-recipe.toml
summary = "INT8 after cutting the MACs by half"
pipeline = "cleanup,prune{macs=0.5},fuse-batchnorm,quantize{ranges=mse}"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from .passes.base import Pass


@dataclass(frozen=True)
class Recipe:
    """A named pipeline text."""

    name: str
    summary: str
    pipeline: str


# How a network learns from the one that it was made from (docs/training.md): all recipes that train do it this way.
_LEARN = "labels=0,match=1,optimizer=muon,batch_size=50,warmup=0.05"
_PRUNE = "cleanup,prune{macs=0.5,importance=hessian},recover"
_DISTIL = f"distil{{epochs=3,learning_rate=0.005,soft=0,{_LEARN}}}"

RECIPES = {
    r.name: r
    for r in (
        Recipe(
            "int8",
            "fuse BatchNorm, smooth outliers of transformers, quantize to INT8 by the target's table",
            "cleanup,canonicalize,fuse-batchnorm,smooth,quantize",
        ),
        Recipe(
            "int8-accurate",
            "INT8 with every accuracy pass, each kept where it helps: slower to compile",
            "cleanup,canonicalize,fuse-batchnorm,equalize,smooth,quantize,learn-rounding,correct-bias",
        ),
        Recipe(
            "int8-dynamic",
            "int8 weights of linear and LSTM layers, inputs quantized as they come: no calibration data",
            "cleanup,canonicalize,fuse-batchnorm,quantize-dynamic",
        ),
        Recipe(
            "fp16",
            "fuse BatchNorm, float16 where that is safe: half the size (no faster on x86)",
            "cleanup,canonicalize,fuse-batchnorm,to-half",
        ),
        Recipe(
            "int8-qat",
            "INT8 by quantization-aware training: one epoch of following the float model",
            f"cleanup,canonicalize,fuse-batchnorm{{keep=true}},qat{{learning_rate=0.0005,freeze=0,{_LEARN}}}",
        ),
        Recipe(
            "prune-int8",
            "half of the MACs, recovered without labels, then INT8",
            f"{_PRUNE},canonicalize,fuse-batchnorm,smooth,quantize",
        ),
        Recipe(
            "prune-distil-int8",
            "half of the MACs, three epochs of following the whole, then INT8",
            f"{_PRUNE},{_DISTIL},canonicalize,fuse-batchnorm,smooth,quantize",
        ),
        Recipe(
            "prune-distil-qat",
            "half of the MACs, three epochs of following the whole, then INT8 by one epoch that simulates it",
            f"{_PRUNE},{_DISTIL},canonicalize,fuse-batchnorm{{keep=true}},qat{{learning_rate=0.0015,freeze=0,{_LEARN}}}",
        ),
        Recipe("float", "fuse BatchNorm, stay in float", "cleanup,canonicalize,fuse-batchnorm"),
    )
}
DEFAULT = "int8"
# Pruning goes before fusion, since BatchNorm's scales help to judge channels; it follows cleanup.
_PRUNE_AFTER = "cleanup"


def load_recipe(text: str) -> Recipe:
    """A built-in recipe by name, or a TOML file. Raises OptionError."""
    if text in RECIPES:
        return RECIPES[text]
    path = Path(text)
    if path.suffix != ".toml":
        raise OptionError(
            f"unknown recipe {text!r}", hint=f"{did_you_mean(text, RECIPES, 'recipes')}, or give a FILE.toml"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read the recipe {text}: {error.strerror}", hint="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{text} is not valid TOML: {error}", hint='write: pipeline = "cleanup,fuse-batchnorm"'
        ) from error
    unknown = [k for k in values if k not in ("summary", "pipeline")]
    if unknown or not all(isinstance(v, str) for v in values.values()) or "pipeline" not in values:
        raise OptionError(
            f"{text} must hold the text `pipeline`, and may hold `summary`"
            + (f"; it holds {', '.join(map(repr, unknown))}" if unknown else ""),
            hint='write: pipeline = "cleanup,fuse-batchnorm,quantize"',
        )
    return Recipe(path.stem, values.get("summary", ""), values["pipeline"])


def resolve_passes(
    recipe: str = DEFAULT, pipeline: str | None = None, prune: str | float | Mapping[str, Any] | None = None
) -> list[Pass]:
    """The passes to run. A pipeline replaces the recipe; `prune` joins a recipe after its cleanup, or takes the
    place of the pruning that it has.

    Raises OptionError where two of the three contradict each other, PipelineError for bad text.
    """
    from .passes.pipeline import parse_pipeline

    if pipeline is None:
        passes = parse_pipeline(load_recipe(recipe).pipeline)
    elif recipe != DEFAULT:
        raise OptionError(f"recipe {recipe!r} has no effect beside a pipeline", hint="give one of the two")
    else:
        passes = parse_pipeline(pipeline)
    if prune is None:
        return passes
    if pipeline is None and any(p.name == "prune" for p in passes):
        return [prune_pass(prune) if p.name == "prune" else p for p in passes]
    if pipeline is not None:
        raise OptionError("prune is asked for beside a pipeline", hint="write it into the pipeline: prune{macs=0.5}")
    place = next((i + 1 for i, p in enumerate(passes) if p.name == _PRUNE_AFTER), 0)
    return [*passes[:place], prune_pass(prune), *passes[place:]]


def prune_pass(request: str | float | Mapping[str, Any]) -> Pass:
    """The prune pass from a share of MACs (0.5), from text ("macs=0.5,importance=l2") or from a mapping."""
    from .passes.pipeline import make_pass, parse_pipeline

    if isinstance(request, Mapping):
        options = dict(request)
        if isinstance(options.get("ratios"), Mapping):  # as text writes them
            options["ratios"] = [f"{glob}:{share}" for glob, share in options["ratios"].items()]
        return make_pass("prune", options)
    if isinstance(request, (int, float)) and not isinstance(request, bool):
        return make_pass("prune", {"macs": float(request)})
    if not isinstance(request, str) or not request.strip():
        raise OptionError(f"prune is {request!r}", hint="for example prune='macs=0.5', which keeps half of the MACs")
    if "{" in request or "}" in request:
        raise OptionError(f"prune is {request!r}", hint="give its options only: macs=0.5,importance=l2")
    passes = parse_pipeline(f"prune{{{request}}}")
    return passes[0]


def parse_drop(text: str | float) -> float:
    """The allowed drop of a metric: "1%" and 0.01 are one hundredth. Raises OptionError."""
    try:
        value = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except (TypeError, ValueError) as error:
        raise OptionError(f"max-drop is {text!r}", hint="write 1% or 0.01") from error
    if isinstance(text, str) and not text.endswith("%") and value >= 1:
        raise OptionError(f"max-drop is {text!r}, which is {value:.0%}", hint="write 1% or 0.01")
    if not 0 <= value < float("inf"):
        raise OptionError(f"max-drop is {text!r}", hint="give a drop of zero or more, such as 1%")
    return value
