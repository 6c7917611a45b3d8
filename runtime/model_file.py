"""A model that waits in a file, so that its weights are in memory only while someone looks at them.

The file is the model with its weights beside it (ONNX external data), which ONNX Runtime maps instead of copying. It
lies in a folder of its own that goes away with the object.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import onnx
import onnx_ir as ir

from ..backends.onnx.lower import build, lower
from ..frontend.program import Program

_NAME, _WEIGHTS = "model.onnx", "weights"
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
        self.size_bytes = self._kept.ByteSize() if self._kept is not None else single_file_size(self._skeleton())

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

    def _write(self, program: Program) -> bool:
        try:
            folder = tempfile.mkdtemp(prefix="fxpress-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._path = Path(folder) / _NAME
            ir.save(build(program), self._path, external_data=_WEIGHTS)
        except OSError:
            return False
        return True

    def _skeleton(self) -> onnx.ModelProto:
        return onnx.load(self._path, load_external_data=False)


def single_file_size(model: onnx.ModelProto) -> int:
    """The bytes that a model with external weights takes with them inside."""
    tensors = 0
    for tensor in model.graph.initializer:
        size = 0
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            size = next(int(e.value) for e in tensor.external_data if e.key == "length")
            del tensor.external_data[:]
            tensor.ClearField("data_location")
        tensors += _field(tensor.ByteSize() + (_field(size) if size else 0))
    del model.graph.initializer[:]
    graph = model.graph.ByteSize() + tensors
    model.ClearField("graph")
    return model.ByteSize() + _field(graph)


def _field(length: int) -> int:
    """A protobuf field of `length` bytes, with its tag (fields up to 15) and its length."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length
