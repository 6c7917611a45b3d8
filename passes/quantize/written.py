"""Forms that only the written file has: the program that is simulated stays as it is.

A pass marks a node when a target is folded for (`mark`), and what writes the program as ONNX asks for the program with
the marks carried out (`as_written`). What they change is not seen from outside, and no number changes by it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ...frontend.program import Program
from .columns import rewrite_columns
from .wide_depthwise import widen_depthwise

COLUMNS, CHANNELS = "columns", "channels"
_REWRITES = {COLUMNS: rewrite_columns, CHANNELS: widen_depthwise}


def mark(node: fx.Node, form: str, number: int) -> None:
    """Ask for a form of a node in the file."""
    node.meta["custom"] = {**node.meta.get("custom", {}), form: number}


def as_written(program: Program) -> Program:
    """The same program with the marks carried out; itself where there are none."""
    if not any(_marks(n) for n in program.graph.nodes):
        return program
    written = program.copy(share_weights=True)
    for node in list(written.graph.nodes):
        for form, number in _marks(node).items():
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != form}
            _REWRITES[form](written, node, number)
    return written


def _marks(node: fx.Node) -> dict[str, Any]:
    custom = node.meta.get("custom") or {}
    return {form: custom[form] for form in _REWRITES if form in custom}
