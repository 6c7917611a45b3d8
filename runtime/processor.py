"""What this machine's processor does with 8-bit products, asked of ONNX Runtime and not of the processor's name.

Without VNNI, ONNX Runtime on x86 adds two products of 8-bit activations and weights in 16 bits, which saturate: results
differ from what the file says, silently. Its session option `session.x64quantprecision` avoids that (weights become
uint8, and products are added in 32 bits), at the price of speed. `make_session` sets it where products saturate, and
nowhere else: with AMX it costs as much and gains nothing (resnet18: 25 ms for 7.3). Weights of seven bits (target
`ort-x86-avx2`) cannot saturate, and keep the fast kernels.
"""

from __future__ import annotations

import functools
import platform

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

_ARM = ("aarch64", "arm64")
_LENGTH = 64


@functools.cache
def saturates() -> bool:
    """Do 8-bit products saturate in ONNX Runtime here, with its options as they are by default?"""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(_product(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, _LENGTH), 255, np.uint8)})
    return bool((found != 200).any())


def native_target() -> str:
    """The target for models that run on this machine in ONNX Runtime."""
    if platform.machine().lower() in _ARM:
        return "ort-arm"
    return "ort-x86-avx2" if saturates() else "ort-x86"


def _product() -> bytes:
    """255 times 127, summed, as the 200 steps of its output: 101 where pairs are cut off at 32,767."""
    scale = np.array(_LENGTH * 255 * 127 / 200, np.float32)
    constants: dict[str, np.ndarray] = {
        "one": np.array(1, np.float32),
        "none": np.array(0, np.uint8),
        "w": np.full((_LENGTH, 16), 127, np.int8),
        "w_none": np.array(0, np.int8),
        "scale": scale,
    }
    inputs = ["x", "one", "none", "w", "one", "w_none", "scale", "none"]
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", inputs, ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, _LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 16])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())
