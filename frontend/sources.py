"""From what a user types as MODEL to a module: zoo names, a user's file or package, a `.pt2` archive; and its weights.

Nothing is downloaded and nothing is unpickled. A user's own `file.py:callable` runs the user's code; nothing else here
executes code that comes with data.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import FxpressError, SourceError, did_you_mean, first_line
from .preprocess import Preprocess, imagenet_like
from .program import Program

_FORMS = "torchvision:NAME, timm:NAME, FILE.py:CALLABLE, PACKAGE.MODULE:CALLABLE or FILE.pt2"
# What torchvision's compiled library would declare; its Python part refuses to be imported without these names.
_TORCHVISION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# Input sizes of the torchvision classifiers that do not take 224x224.
_TORCHVISION_SIZES = {"inception_v3": 299}


@dataclass
class Source:
    """A resolved model: its name, the module (or the Program of a `.pt2`), and what the source knows about inputs.

    `example` are example inputs, `input_shape` the size of one example (C, H, W) where only that is known,
    `random_weights` says that the values of the weights mean nothing (no weights were given).
    """

    name: str
    module: torch.nn.Module | Program
    example: tuple[Any, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    preprocess: Preprocess | None = None
    random_weights: bool = False


def load_source(text: str, seed: int = 0) -> Source:
    """Resolve MODEL. Weights that are not given are drawn with `seed`. Raises SourceError."""
    torch.manual_seed(seed)
    if text.endswith(".pt2"):
        return _from_archive(text)
    owner, colon, name = text.rpartition(":")
    if not colon or not owner or not name:
        raise SourceError(f"{text!r} is not a model", hint=f"write {_FORMS}")
    if owner == "torchvision":
        return _from_torchvision(name)
    if owner == "timm":
        return _from_timm(name)
    return _from_callable(text, load_callable(owner, name))


def _from_archive(text: str) -> Source:
    if not Path(text).is_file():
        raise SourceError(f"no such file: {text}", hint="write it with Program.save or torch.export.save")
    program = Program.load(text)
    return Source(Path(text).stem, program, example=program.example_inputs)


def _from_torchvision(name: str) -> Source:
    declare_torchvision_operators()
    models = _import_zoo("torchvision.models", "torchvision")
    known = models.list_models()
    if name not in known:
        raise SourceError(f"torchvision has no model {name!r}", hint=did_you_mean(name, known))
    # Without this argument several detectors and segmenters would download a backbone.
    extra = {"weights_backbone": None} if "weights_backbone" in _parameters(models.get_model_builder(name)) else {}
    size = _TORCHVISION_SIZES.get(name, 224)
    module = models.get_model(name, weights=None, **extra)
    classifier = name in set(models.list_models(module=models))
    return Source(
        name,
        module,
        input_shape=(3, size, size),
        preprocess=imagenet_like(size, size) if classifier else None,
        random_weights=True,
    )


def _from_timm(name: str) -> Source:
    declare_torchvision_operators()
    timm = _import_zoo("timm", "timm")
    if not timm.is_model(name.split(".")[0]):
        raise SourceError(f"timm has no model {name!r}", hint=did_you_mean(name, timm.list_models()))
    try:
        module = timm.create_model(name, pretrained=False)
    except Exception as error:
        raise SourceError(
            f"timm cannot make {name!r}: {first_line(error)}", hint="check the name with timm.list_models()"
        ) from error
    preprocess = _timm_preprocess(name, timm.data.resolve_model_data_config(module))
    return Source(name, module, input_shape=preprocess.example_shape(), preprocess=preprocess, random_weights=True)


def _timm_preprocess(name: str, config: dict[str, Any]) -> Preprocess:
    """timm's own evaluation transform, from the model's data configuration."""
    channels, height, width = config["input_size"]
    squash = config.get("crop_mode") == "squash"
    percent = float(config.get("crop_pct") or 1.0)
    interpolation = config.get("interpolation", "bicubic")
    return Preprocess(
        name=f"timm:{name}",
        resize=(int(height / percent), int(width / percent)) if squash else int(min(height, width) / percent),
        crop=(height, width),
        interpolation=interpolation if interpolation in ("nearest", "bilinear", "bicubic", "lanczos") else "bicubic",
        channels=channels,
        scale=1 / 255,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _import_zoo(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(
            f"{package} is not installed", hint="install the extra: pip install 'fxpress[zoo]'"
        ) from error


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare `torchvision::nms` and `qnms` where torchvision's compiled library does not load beside this torch.

    Call before importing torchvision or timm. Does nothing (and returns None) where the operators exist. The result is
    kept alive by the cache: torch forgets the declarations of a library that is collected.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
        return None
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
        except OSError:
            continue
    missing = {n: s for n, s in _TORCHVISION_SCHEMAS.items() if not hasattr(torch.ops.torchvision, n)}
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing.values():
        library.define(schema)
    return library


# -- a user's own code --------------------------------------------------------------------------------------------


def load_callable(owner: str, name: str) -> Any:
    """The object `name` in `FILE.py` or `PACKAGE.MODULE`. Runs that file's code. Raises SourceError."""
    module = load_file(Path(owner)) if owner.endswith(".py") else _import_module(owner)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
            raise SourceError(f"{owner} has no {name!r}", hint=did_you_mean(name, public))
        found = getattr(found, part)
    if not callable(found):
        raise SourceError(f"{name!r} in {owner} is a {type(found).__name__}", hint="name a function or a class")
    return found


def load_file(path: Path) -> ModuleType:
    """Import a user's .py file, anew where it has changed. Its folder is importable while it loads."""
    if not path.is_file():
        raise SourceError(f"no such file: {path}", hint="check the path; relative ones start at the current folder")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # By path alone, so that a changed file's passes take the place of its older ones.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"fxpress_user_{path.stem}_{place}".replace("-", "_")
    if name in sys.modules and getattr(sys.modules[name], "__digest__", None) == digest:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__digest__ = digest  # type: ignore[attr-defined]
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, FxpressError):
            raise
        raise SourceError(
            f"{path} fails when it is loaded: {type(error).__name__}: {first_line(error)}",
            where=_line_of(error, path),
            hint="run it with python yourself",
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(
            f"cannot import {name!r}: {first_line(error)}", hint=f"models are written {_FORMS}"
        ) from error
    except Exception as error:
        raise SourceError(
            f"importing {name!r} fails: {type(error).__name__}: {first_line(error)}",
            hint="import it with python yourself",
        ) from error


def _from_callable(text: str, make: Any) -> Source:
    """Call it: an `nn.Module`, or `(module, example_args)`."""
    try:
        made = make()
    except Exception as error:
        raise SourceError(
            f"{text} fails when it is called without arguments: {type(error).__name__}: {first_line(error)}",
            hint="name a function that takes no arguments and returns the model",
        ) from error
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, (torch.nn.Module, Program)):
        raise SourceError(
            f"{text} returns a {type(module).__name__}", hint="return an nn.Module, or (module, example_args)"
        )
    if isinstance(example, torch.Tensor):
        example = (example,)
    if example is not None and not isinstance(example, (tuple, list)):
        raise SourceError(
            f"{text} returns a model and a {type(example).__name__}", hint="return (module, (input, ...))"
        )
    if example is None and isinstance(module, Program):
        example = module.example_inputs
    return Source(text.rpartition(":")[2], module, example=tuple(example) if example is not None else None)


def _line_of(error: BaseException, path: Path) -> str | None:
    """The deepest line of a traceback within the user's file."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{path}:{line}" if line else str(path)


def _parameters(builder: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(builder).parameters)
