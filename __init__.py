"""fxpress: a compiler that makes trained PyTorch models small and fast for deployment.

Importing this package imports neither torch nor onnxruntime; the names below load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import FxpressError

if TYPE_CHECKING:
    from .api import compile as compile
    from .api import op_latencies as op_latencies
    from .api import plan_pruning as plan_pruning
    from .api import quantize as quantize
    from .api import to_onnx as to_onnx
    from .frontend.capture import capture as capture
    from .frontend.preprocess import Preprocess as Preprocess
    from .frontend.program import Program as Program
    from .passes.base import Change as Change
    from .passes.base import Context as Context
    from .passes.base import Pass as Pass
    from .passes.base import register_pass as register_pass
    from .passes.manager import run_passes as run_passes
    from .passes.prune.importance.registry import register_importance as register_importance
    from .passes.prune.plan import PruningPlan as PruningPlan
    from .passes.prune.recovery.recover import recover as recover
    from .passes.prune.recovery.schedule import prune_and_recover as prune_and_recover
    from .runtime.artifact import Artifact as Artifact
    from .runtime.bundle import load as load
    from .training.iterative import prune_and_finetune as prune_and_finetune
    from .training.loop import finetune as finetune
    from .training.loop import train as train
    from .training.options import SGD as SGD
    from .training.options import AdamW as AdamW
    from .training.options import Muon as Muon
    from .training.options import TrainingOptions as TrainingOptions
    from .training.qat import train_quantized as train_quantized

# Public name -> the module that defines it.
_LAZY = {
    "AdamW": ".training.options",
    "Artifact": ".runtime.artifact",
    "Change": ".passes.base",
    "Context": ".passes.base",
    "Muon": ".training.options",
    "Pass": ".passes.base",
    "Preprocess": ".frontend.preprocess",
    "Program": ".frontend.program",
    "PruningPlan": ".passes.prune.plan",
    "SGD": ".training.options",
    "TrainingOptions": ".training.options",
    "capture": ".frontend.capture",
    "compile": ".api",
    "finetune": ".training.loop",
    "load": ".runtime.bundle",
    "op_latencies": ".api",
    "plan_pruning": ".api",
    "prune_and_finetune": ".training.iterative",
    "prune_and_recover": ".passes.prune.recovery.schedule",
    "quantize": ".api",
    "recover": ".passes.prune.recovery.recover",
    "register_importance": ".passes.prune.importance.registry",
    "register_pass": ".passes.base",
    "run_passes": ".passes.manager",
    "to_onnx": ".api",
    "train": ".training.loop",
    "train_quantized": ".training.qat",
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
