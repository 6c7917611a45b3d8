"""OpenVINO as a second runtime: compile the ONNX file there, run it, and read which precision every layer really has.

Needs the extra `openvino`; nothing here is imported unless a model for the target `openvino` is verified.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from ..backends.coverage import node_macs
from ..errors import DataError, FxpressError, first_line
from ..frontend.program import Program
from .benchmark import Timing, compare_latency
from .feed import take
from .layers import LayerParity, check_layers

_INTEGER = ("u8", "i8")
_BORING = ("Const", "Input", "Output", "Reorder")


@dataclass(frozen=True)
class Kernel:
    """A layer that OpenVINO runs: its kind, precision and implementation, and the ONNX nodes it stands for."""

    kind: str
    precision: str
    implementation: str
    nodes: tuple[str, ...]


class OpenVinoSession:
    """A model compiled for OpenVINO's CPU device; `run` as of `runtime.session.Session`, on positional arrays."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.request = compiled.create_infer_request()

    def run(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs. Raises `DataError` for inputs that the model does not take."""
        try:
            results = self.request.infer(list(inputs))
        except Exception as error:  # openvino raises several unrelated classes
            raise DataError(
                f"OpenVINO cannot run the model on these inputs: {first_line(error)}", hint="check shapes and dtypes"
            ) from error
        return tuple(np.array(results[i]) for i in range(len(self.compiled.outputs)))

    def kernels(self) -> list[Kernel]:
        """The layers that are run, without constants and changes of layout."""
        found = []
        for node in self.compiled.get_runtime_model().get_ops():
            facts = {k: str(v.astype(str)) for k, v in node.get_rt_info().items()}
            if facts.get("layerType") not in _BORING:
                names = tuple(n for n in facts.get("originalLayersNames", "").split(",") if n)
                found.append(
                    Kernel(facts["layerType"], facts["runtimePrecision"], facts.get("primitiveType", ""), names)
                )
        return found


def _reason(error: Exception) -> str:
    """What OpenVINO says, without the lines that only say where in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception from")]
    return " ".join(said[:3]) or first_line(error)


def is_installed() -> bool:
    """Is the package `openvino` here?"""
    return importlib.util.find_spec("openvino") is not None


def make_openvino_session(model: onnx.ModelProto, threads: int = 1) -> OpenVinoSession:
    """Compile a model for the CPU; what is float is computed in float32, so that numbers can be compared.

    Raises `FxpressError` where the package is absent or refuses the model.
    """
    try:
        import openvino
    except ImportError as error:
        raise FxpressError("OpenVINO is not installed", hint='pip install "fxpress[openvino]"') from error
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    try:
        return OpenVinoSession(core.compile_model(core.read_model(model.SerializeToString()), "CPU", options))
    except Exception as error:  # openvino raises several unrelated classes
        raise FxpressError(
            f"OpenVINO {openvino.__version__} refuses the model: {_reason(error)}",
            hint="report it with the model: the table of the target openvino misses a condition",
        ) from error


def integer_share(model: onnx.ModelProto, kernels: Sequence[Kernel]) -> float:
    """The share (0..1) of the model's MACs in layers that OpenVINO computes on 8-bit integers.

    OpenVINO names a layer by the ONNX node, or by its output, and appends what it took apart ("conv1/WithoutBiases").
    """
    integers = {name.partition("/")[0] for k in kernels if k.precision in _INTEGER for name in k.nodes}
    macs = dict(node_macs(model))
    outputs = {node.name: node.output[0] for node in model.graph.node}
    found = sum(count for name, count in macs.items() if not integers.isdisjoint((name, outputs[name])))
    return found / max(sum(macs.values()), 1)


@dataclass(frozen=True)
class OpenVinoFindings:
    """What OpenVINO makes of a model: layer by layer against the simulation, share of MACs on integers, latency."""

    version: str
    layers: LayerParity
    integer_macs: float
    timing: Timing
    kernels: tuple[Kernel, ...]

    @property
    def kept(self) -> bool:
        """Does every layer agree within a step?"""
        return self.layers.kept

    def __str__(self) -> str:
        return (
            f"OpenVINO {self.version}: each layer within {self.layers.max_steps} step(s) of the simulation, "
            f"{self.integer_macs:.0%} of the MACs on integers, {self.timing.first_ms:.2f} ms in float and "
            f"{self.timing.second_ms:.2f} ms quantized ({self.timing.ratio:.2f}x)"
        )


def judge_in_openvino(
    program: Program,
    float_model: onnx.ModelProto,
    model: onnx.ModelProto,
    inputs: tuple[torch.Tensor, ...],
    threads: int = 1,
) -> OpenVinoFindings:
    """Verify a quantized program in OpenVINO: layers fed the same integers, kernels, latency of both models."""
    import openvino

    session = make_openvino_session(model, threads)
    single = tuple(x.contiguous().numpy() for x in take(program, inputs, 1))
    kernels = session.kernels()
    return OpenVinoFindings(
        openvino.__version__.partition("-")[0],
        check_layers(program, inputs, make_openvino_session),
        integer_share(model, kernels),
        compare_latency(make_openvino_session(float_model, threads), session, single),
        tuple(kernels),
    )
