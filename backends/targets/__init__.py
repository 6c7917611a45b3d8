"""Targets: one table per runtime and kind of processor."""

from __future__ import annotations

import difflib
import importlib

from ...errors import OptionError
from ...passes.quantize.spec import Target

# Target name -> the module here that holds its table as TARGET.
MODULES = {
    "ort-x86": "ort_x86",
    "ort-x86-avx2": "ort_x86_avx2",
    "ort-arm": "ort_arm",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "qnn": "qnn",
}


def target_names() -> list[str]:
    """The names of all targets."""
    return sorted(MODULES)


def load_target(name: str) -> Target:
    """The table of a target. Raises OptionError for an unknown name."""
    if not isinstance(name, str):
        raise OptionError(f"target is a {type(name).__name__}", hint=f"targets: {', '.join(target_names())}")
    if name not in MODULES:
        close = difflib.get_close_matches(name, MODULES, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise OptionError(f"unknown target {name!r}", hint=f"{guess}targets: {', '.join(target_names())}")
    return importlib.import_module(f".{MODULES[name]}", __package__).TARGET
