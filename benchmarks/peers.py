"""Other tools on the same float ONNX file and the same calibration samples, and their models timed in one run."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx

from fxpress.runtime.session import make_session

Feed = dict[str, np.ndarray]


class _Reader:
    """What quantize_static wants of calibration data: one feed dict a call, then None."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self.feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantize_static_settings() -> dict[str, dict[str, object]]:
    """The settings that ONNX Runtime's documentation offers for x86: its default, and uint8 activations x int8 weights."""
    from onnxruntime.quantization import QuantFormat, QuantType

    u8s8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    return {
        "static default (S8S8)": {},
        "static U8S8 per channel": {**u8s8, "per_channel": True},
        "static U8S8 per tensor": {**u8s8},
        "static U8S8 per channel, QOperator": {**u8s8, "per_channel": True, "quant_format": QuantFormat.QOperator},
    }


def quantize_static_models(
    model: onnx.ModelProto, feeds: list[Feed], settings: dict[str, dict[str, object]] | None = None
) -> dict[str, onnx.ModelProto]:
    """ONNX Runtime's `quantize_static` after its own `quant_pre_process`, one model for each setting. `feeds` are the
    calibration samples, each a feed of one example."""
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    results = {}
    logging.getLogger().setLevel(logging.ERROR)
    # Its shape inference leaves files in the working directory where it fails.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        source, prepared, result = (str(Path(folder) / f"{n}.onnx") for n in ("float", "prepared", "int8"))
        onnx.save(model, source)
        try:
            quant_pre_process(source, prepared)
        except Exception:  # it cannot follow every shape; its documentation then says to leave that part out
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        for name, options in (settings or quantize_static_settings()).items():
            quantize_static(prepared, result, _Reader(feeds), **options)
            results[name] = onnx.load(result)
    return results


def nncf_model(model: onnx.ModelProto, feeds: list[Feed], transformer: bool = False) -> onnx.ModelProto:
    """NNCF's post-training quantization of an ONNX model, its defaults but for the samples and the kind of model.

    It gets opset 20: what NNCF 3.4 adds to a file of opset 21 does not load in ONNX Runtime 1.31 for many models.
    """
    import nncf
    from onnx import version_converter

    model = version_converter.convert_version(model, 20)

    logging.getLogger("nncf").setLevel(logging.ERROR)
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), model_type=kind)


def interleaved(
    models: dict[str, onnx.ModelProto],
    inputs: Feed | np.ndarray,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    trials: int = 5,
) -> dict[str, list[float]]:
    """Milliseconds of each model in each round, one thread. The order is drawn anew for every round (who runs behind the
    large float model finds a cold cache), and every trial loads the models anew (where a session's memory lies is worth
    a few percent)."""
    times: dict[str, list[float]] = {name: [] for name in models}
    draw, warm = random.Random(0), 3
    for _ in range(trials):
        sessions = {name: make_session(model, threads=1) for name, model in models.items()}
        for i in range(max(3, rounds // trials) + warm):
            for name in draw.sample(list(models), len(models)):
                start = clock()
                sessions[name].run(inputs)
                if i >= warm:
                    times[name].append((clock() - start) * 1e3)
    return times
