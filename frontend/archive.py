"""Programs on disk: the `.pt2` archive of `torch.export`, with fxpress' own description as an extra JSON file.

The graph is written as JSON and the weights as raw tensors; reading executes nothing. Writing is atomic.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import CaptureError, FxpressError, OutputError, first_line
from .fake_run import recurrent_at_once
from .operators import declare_operators
from .program import Program, StageRecord, TensorInfo, parse_metadata
from .train_modes import UNTRAINED, training_notes

_EXTRA = "fxpress.json"


def save_program(program: Program, path: Path) -> None:
    """Export the program's graph again and write it to `path` in one step."""
    exported = export_again(program)
    described = {**program.metadata(), UNTRAINED: training_notes(program)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".pt2", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose a folder you may write to") from error
    try:
        torch.export.save(exported, temporary, extra_files={_EXTRA: json.dumps(described)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_program(path: Path) -> Program:
    """Read a `.pt2` archive into a Program. A foreign one is prepared as a fresh capture would be."""
    from .capture import program_from_exported, quiet

    if not path.is_file():
        raise FxpressError(f"no such file: {path}", hint="give the path of a .pt2 archive")
    declare_operators()  # quantized programs use them
    extra: dict[str, Any] = {_EXTRA: ""}
    try:
        with quiet():
            exported = torch.export.load(str(path), extra_files=extra)
    except Exception as error:
        raise CaptureError(
            f"{path} is not a readable .pt2 archive: {first_line(error)}",
            hint="write it with Program.save or torch.export.save, with the same torch version",
        ) from error
    data = parse_metadata(extra[_EXTRA])
    program = program_from_exported(exported, dim_names=_dim_names(data))
    program.graph_module.meta[UNTRAINED] = data.get(UNTRAINED, [])
    program.log = [StageRecord(**record) for record in data.get("log", [])]
    if data:
        program.inputs = tuple(_tensor_info(i) for i in data["inputs"])
        program.outputs = tuple(_tensor_info(o) for o in data["outputs"])
    return program


def export_again(program: Program) -> torch.export.ExportedProgram:
    """The program as an `ExportedProgram`, with the dims dynamic that are dynamic in it."""
    args, kwargs = pytree.tree_unflatten(list(program.example_inputs), program.input_spec)
    dims = {name: torch.export.Dim(name, min=1) for name in set(program.symbols.values())}
    shapes = _dynamic_shapes(program, dims, args, kwargs)
    with recurrent_at_once():
        return torch.export.export(program.graph_module, args, kwargs, dynamic_shapes=shapes, strict=False)



def _dynamic_shapes(program: Program, dims: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """The dynamic_shapes argument that makes the same dims dynamic again, in the order of forward's parameters."""
    tensors = iter(program.inputs)
    leaves = [
        _leaf_dims(next(tensors), dims) if isinstance(x, torch.Tensor) else None for x in program.example_inputs
    ]
    shaped_args, shaped_kwargs = pytree.tree_unflatten(leaves, program.input_spec)
    if not kwargs:
        return tuple(shaped_args)
    names = program.graph._codegen.pytree_info.orig_args
    return {**dict(zip(names, shaped_args)), **shaped_kwargs}


def _leaf_dims(info: TensorInfo, dims: dict[str, Any]) -> dict[int, Any]:
    return {i: dims[d] for i, d in enumerate(info.dims) if isinstance(d, str) and d in dims}


def _dim_names(data: dict[str, Any]) -> list[list[int | str]]:
    return [list(i["dims"]) for i in data.get("inputs", [])]


def _tensor_info(data: dict[str, Any]) -> TensorInfo:
    return TensorInfo(data["name"], data["dtype"], tuple(data["dims"]))
