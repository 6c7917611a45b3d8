"""The passes that come with fxpress, and those that installed packages add by entry point."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points

# Every module here registers one or more passes when imported.
MODULES = (
    "cleanup",
    "fuse_batchnorm",
    "canonicalize",
    "prune.passes",
    "prune.recovery.recover",
    "quantize.passes",
    "to_half",
    "quantize.dynamic",
    "quantize.accuracy.equalize",
    "quantize.accuracy.smooth",
    "quantize.accuracy.correct_bias",
    "quantize.fake_quant",
    "quantize.fold_fake_quant",
    ".training.passes",  # of a layer above, which nothing here imports otherwise
    "quantize.accuracy.learn_rounding",
)
ENTRY_POINTS = "fxpress.passes"


@functools.cache
def load_builtin() -> None:
    """Import the modules that define passes, then the `fxpress.passes` entry points of installed packages."""
    for module in MODULES:
        importlib.import_module(f".{module}", __package__)
    for point in entry_points(group=ENTRY_POINTS):
        point.load()
