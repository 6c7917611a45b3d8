"""ONNX Runtime sessions: one place that knows its options. Needs numpy and onnxruntime, never torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnxruntime

from ..errors import DataError, FxpressError, first_line
from .processor import saturates

if TYPE_CHECKING:
    import onnx

_ERRORS_ONLY = 3
_PROVIDER = "CPUExecutionProvider"
# Without VNNI 8-bit products saturate, unless this is set (see processor.py). Only there: with AMX it takes the fast
# kernels away and changes no digit.
_EXACT = ("session.x64quantprecision", "1")
_NO_EXACT = "Attempt to replace the existing tensor"
_LOST_TYPE = "output_dtype INT8 does not match y_zero_point type UINT8"
# ONNX Runtime's names of element types -> numpy's.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class Runnable(Protocol):
    """What verification and benchmarks need of a loaded model, of whichever runtime."""

    def run(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs for positional inputs."""


class Session:
    """A model loaded into ONNX Runtime.

    `run(x, y)` or `run({"x": x, "y": y})` takes numpy arrays and gives the outputs as a tuple.
    `input_names`, `output_names`, `input_dtypes` (numpy names) and `input_shapes` (int, or a name where dynamic).
    """

    def __init__(self, inner: onnxruntime.InferenceSession) -> None:
        self.inner = inner
        inputs, outputs = inner.get_inputs(), inner.get_outputs()
        self.input_names = tuple(i.name for i in inputs)
        self.output_names = tuple(o.name for o in outputs)
        self.input_dtypes = tuple(_DTYPES.get(i.type, i.type) for i in inputs)
        self.output_dtypes = tuple(_DTYPES.get(o.type, o.type) for o in outputs)
        self.input_shapes = tuple(tuple(i.shape) for i in inputs)

    def run(self, *inputs: np.ndarray | Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """All outputs. Raises `DataError` for inputs of a wrong number, name, dtype or shape."""
        feed = self._feed(inputs)
        try:
            return tuple(self.inner.run(None, feed))
        except Exception as error:  # onnxruntime raises several unrelated classes
            raise DataError(
                f"ONNX Runtime cannot run the model on these inputs: {first_line(error)}",
                hint=f"it takes {self._signature()}",
            ) from error

    def _feed(self, inputs: tuple[Any, ...]) -> dict[str, np.ndarray]:
        named = len(inputs) == 1 and isinstance(inputs[0], Mapping)
        feed = dict(inputs[0]) if named else dict(zip(self.input_names, inputs))
        if set(feed) != set(self.input_names) or (not named and len(inputs) != len(self.input_names)):
            given = ", ".join(feed) if named else f"{len(inputs)} arrays"
            raise DataError(f"the model takes {self._signature()}, got {given}", hint="give every input once")
        arrays = {name: np.ascontiguousarray(feed[name]) for name in self.input_names}
        for name, dtype in zip(self.input_names, self.input_dtypes):
            if str(arrays[name].dtype) != dtype:
                raise DataError(
                    f"input {name!r} is {dtype}, got {arrays[name].dtype}", hint=f"convert it with .astype({dtype!r})"
                )
        return arrays

    def _signature(self) -> str:
        parts = zip(self.input_names, self.input_dtypes, self.input_shapes)
        return "; ".join(f"{n}: {d}[{', '.join(map(str, s))}]" for n, d, s in parts)

    def __repr__(self) -> str:
        return f"Session({self._signature()})"


def _load(source: bytes | str, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    if saturates():
        options.add_session_config_entry(*_EXACT)
    try:
        return onnxruntime.InferenceSession(source, options, providers=[_PROVIDER])
    except Exception as error:
        if _LOST_TYPE in str(error):
            # On x86 it makes int8 activations uint8, and forgets the type of a quantization that it moved before:
            # without that. (Products of int8 do not saturate, and have no kernel with uint8 weights.)
            options.add_session_config_entry("session.qdqisint8allowed", "1")
            options.add_session_config_entry(_EXACT[0], "0")
        elif _NO_EXACT in str(error):  # files of others, in which two weights have one zero point
            options.add_session_config_entry(_EXACT[0], "0")
        else:
            raise
    return onnxruntime.InferenceSession(source, options, providers=[_PROVIDER])


def make_session(
    model: onnx.ModelProto | bytes | str | Path,
    threads: int = 1,
    optimized_path: str | Path | None = None,
    profile: str | Path | None = None,
) -> Session:
    """Load a model into ONNX Runtime's CPU provider with `threads` threads.

    `optimized_path`: a file to which ONNX Runtime writes the graph that it really runs. `profile`: how the name of the
    file begins that gets the time of every kernel (`inner.end_profiling()` writes it and gives its name).
    Raises `FxpressError` for a model that ONNX Runtime refuses.
    """
    if not isinstance(threads, int) or threads < 1:
        raise FxpressError(f"threads must be at least 1, got {threads!r}", hint="use threads=1 for one core")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    named = isinstance(model, (bytes, str, Path))
    source = (model if isinstance(model, bytes) else str(model)) if named else model.SerializeToString()  # type: ignore[union-attr]
    try:
        inner = _load(source, options)
    except Exception as error:  # onnxruntime raises several unrelated classes
        no_kernel = "NOT_IMPLEMENTED" in str(error)
        hint = "it has no kernel for this element type: use float32" if no_kernel else "report it: a bug of fxpress"
        raise FxpressError(f"ONNX Runtime refuses the model: {first_line(error)}", hint=hint) from error
    return Session(inner)
