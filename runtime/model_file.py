"""A model that waits in a file, so that its weights are in memory only while someone looks at them.

The file is the model with its weights beside it (ONNX external data), which ONNX Runtime maps instead of copying. It
lies in a folder of its own that goes away with the object.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from ..backends.onnx.lower import build, lower
from ..frontend.program import Program
from .atomic import alive

_NAME, _WEIGHTS = "model.onnx", "weights"
_PREFIX = "fxpress-"
_LEFT_SECONDS = 24 * 3600
_PROTOBUF_END = 2**31
_IN_MEMORY = 16_000_000  # bytes of weights up to which a file is not worth its while


class ModelFile:
    """A lowered program. `size_bytes` is what it takes as one file.

    Small models, and those for which no file can be written, are kept in memory.
    """

    def __init__(self, program: Program) -> None:
        self._kept: onnx.ModelProto | None = None
        self._path = Path()
        weights = sum(t.nbytes for t in program.state_dict().values())
        if weights <= _IN_MEMORY or not self._write(program):
            self._kept = lower(program)
        self.size_bytes = self._kept.ByteSize() if self._kept is not None else size_of(single_file(self._skeleton()))

    @property
    def source(self) -> Path | onnx.ModelProto:
        """What a session is made of."""
        return self._kept if self._kept is not None else self._path

    def load(self) -> onnx.ModelProto:
        """The model with its weights."""
        if self._kept is not None:
            return self._kept
        model = onnx.load(self._path)
        for tensor in model.graph.initializer:
            tensor.ClearField("data_location")  # loading says where it is now, which is where it always is
        return model

    def save(self, path: Path) -> None:
        """Write the model as one file, its weights copied from file to file. Above 2 GB, where one file cannot hold it,
        the weights lie beside it as `<name>.data`. Raises ValueError where it was kept in memory and is too large."""
        if self._kept is not None:
            path.write_bytes(self._kept.SerializeToString())
            return
        if self.size_bytes >= _PROTOBUF_END:
            self._save_two(path)
            return
        with path.open("wb") as file, self._path.with_name(_WEIGHTS).open("rb") as weights:
            for piece in single_file(self._skeleton()):
                if isinstance(piece, Span):
                    weights.seek(piece.offset)
                    file.write(weights.read(piece.length))
                else:
                    file.write(piece)

    def _save_two(self, path: Path) -> None:
        beside = external_data(path)
        shutil.copyfile(self._path.with_name(_WEIGHTS), beside)
        model = self._skeleton()
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = beside.name
        path.write_bytes(model.SerializeToString())

    def _write(self, program: Program) -> bool:
        try:
            _sweep()
            folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = Path(folder) / _NAME
            ir.save(build(program), self._path, external_data=_WEIGHTS)
        except OSError:
            return False
        return True

    def _skeleton(self) -> onnx.ModelProto:
        return onnx.load(self._path, load_external_data=False)


def _sweep() -> None:
    """Remove what killed processes left, after a day (their numbers say little in a folder that containers share)."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and not alive(int(pid)) and time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def external_data(path: Path) -> Path:
    """Where the weights of a model above 2 GB lie."""
    return path.with_name(f"{path.name}.data")


@dataclass(frozen=True)
class Span:
    """Bytes of the file of weights."""

    offset: int
    length: int


def single_file(model: onnx.ModelProto) -> list[bytes | Span]:
    """A model with external weights as one file holds it: pieces of protobuf, and spans of the file of weights.

    `model` is taken apart.
    """
    tensors: list[bytes | Span] = []
    for tensor in model.graph.initializer:
        span = None
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            facts = {e.key: int(e.value) for e in tensor.external_data if e.key in ("offset", "length")}
            span = Span(facts.get("offset", 0), facts["length"])
            del tensor.external_data[:]
            tensor.ClearField("data_location")
        body = tensor.SerializeToString() + (_head(_RAW_DATA, span.length) if span else b"")
        tensors += [_head(_INITIALIZER, len(body) + (span.length if span else 0)), body, *([span] if span else [])]
    del model.graph.initializer[:]
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    return [model.SerializeToString(), _head(_GRAPH, len(graph) + size_of(tensors)), graph, *tensors]


def size_of(pieces: list[bytes | Span]) -> int:
    """Their bytes together."""
    return sum(p.length if isinstance(p, Span) else len(p) for p in pieces)


# Numbers of protobuf fields: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9


def _head(number: int, length: int) -> bytes:
    """What stands before a protobuf field of bytes: its tag and its length."""
    parts = [number << 3 | 2]
    while length > 127:
        parts.append(length & 127 | 128)
        length >>= 7
    return bytes([*parts, length])
