"""What this machine's processor does with 8-bit products, asked of ONNX Runtime and not of the processor's name.

Without VNNI, ONNX Runtime on x86 adds two products of 8-bit activations and weights in 16 bits, which saturate: results
differ from what the file says, silently. Its session option `session.x64quantprecision` avoids that (weights become
uint8, and products are added in 32 bits), at the price of speed. `make_session` sets it where products saturate, and
nowhere else: with AMX it costs as much and gains nothing (resnet18: 25 ms for 7.3). Weights of seven bits (target
`ort-x86-avx2`) cannot saturate, and keep the fast kernels.
"""

from __future__ import annotations

import base64
import functools
import platform
import zlib

import numpy as np
import onnxruntime as ort

_ARM = ("aarch64", "arm64")
_LENGTH = 64
# 255 times 127 summed over 64 places, as the 200 steps of the output: 101 where pairs are cut off at 32,767. An ONNX
# file and not made here, since sessions need no onnx (tests/test_processor.py makes it).
_PRODUCT = (
    "eNrj4LLay8lly8VYwcWcn5fKxZIHIhnLITy28ngwn7U4OTEHKinEWKnEG+iTmZeaWOSbWOJbmiPEXlCUn1KaXKLFK8DoBNLoxcLA"
    "0GCvxS3A5ATW48XIoNXDweHAISDA7MRY7tXAUT8KRsEoGLEAWFQwO0GLF1DpwA8sOSCljBfL2TeKblHCwCJJiI+Lh4NJiIOLiYMR"
    "iB2SgIKVaIICTixcDAKiAJ5uJlQ="
)


@functools.cache
def saturates() -> bool:
    """Do 8-bit products saturate in ONNX Runtime here, with its options as they are by default?"""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    model = zlib.decompress(base64.b64decode(_PRODUCT))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, _LENGTH), 255, np.uint8)})
    return bool((found != 200).any())


def family() -> str:
    """The kind of this machine's processor, as targets name it: "x86" or "arm"."""
    return "arm" if platform.machine().lower() in _ARM else "x86"


def native_target() -> str:
    """The target for models that run on this machine in ONNX Runtime."""
    if family() == "arm":
        return "ort-arm"
    return "ort-x86-avx2" if saturates() else "ort-x86"
