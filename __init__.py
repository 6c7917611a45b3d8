"""fxpress: a compiler that makes trained PyTorch models small and fast for deployment.

Importing this package imports neither torch nor onnxruntime; the names below load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import FxpressError

if TYPE_CHECKING:
    from .frontend.capture import capture
    from .frontend.program import Program
    from .passes.base import Change, Context, Pass, register_pass

# Public name -> the module that defines it.
_LAZY = {
    "capture": ".frontend.capture",
    "Program": ".frontend.program",
    "Change": ".passes.base",
    "Context": ".passes.base",
    "Pass": ".passes.base",
    "register_pass": ".passes.base",
}

__all__ = ["FxpressError", "__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
