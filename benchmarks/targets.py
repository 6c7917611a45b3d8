"""What the targets and the recipes beside INT8 give: accuracy on real weights, OpenVINO beside ONNX Runtime, float16,
layers quantized as they run.

    taskset -c 0 python benchmarks/targets.py accuracy     # every target, ResNet-20 and MobileNetV2 with their weights
    taskset -c 0 python benchmarks/targets.py processor    # ort-x86 and ort-x86-avx2 on this processor, with VNNI or without
    taskset -c 0 python benchmarks/targets.py openvino     # the same networks there and in ONNX Runtime (random weights)
    taskset -c 0 python benchmarks/targets.py recipes      # fp16 and int8-dynamic
    taskset -c 0 python benchmarks/targets.py dynamic      # the kernels behind int8-dynamic, layer by layer

One thread, processor time, interleaved runs, medians of ratios. Nothing is tuned here: test data only judge.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx
import onnxruntime
import torch
from forms import MODELS
from int8_accuracy import DATA, collect, top1
from models import cifar_resnet20
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.structure import check_structure
from fxpress.backends.targets import load_target, target_names
from fxpress.errors import FxpressError
from fxpress.frontend.program import Program
from fxpress.frontend.sources import load_source
from fxpress.frontend.weights import load_weights
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.passes.quantize.ranges.choose import mean_sqnr, program_outputs
from fxpress.runtime.benchmark import Timing, compare_latency
from fxpress.runtime.dynamic_layers import check_dynamic, dynamic_nodes
from fxpress.runtime.layers import check_layers
from fxpress.runtime.openvino import integer_share, make_openvino_session
from fxpress.runtime.processor import saturates
from fxpress.runtime.session import Runnable, Session, make_session
from fxpress.runtime.verify import check_parity

PREPARE = "cleanup,canonicalize,fuse-batchnorm"


def timed(first: Runnable, second: Runnable, x: np.ndarray, seconds: float = 4.0) -> Timing:
    return compare_latency(first, second, (x,), seconds=seconds, clock=time.thread_time)


def prepared(module: nn.Module, example: torch.Tensor) -> Program:
    return run_passes(fxpress.capture(module.eval(), example), PREPARE)


# -- accuracy ------------------------------------------------------------------------------------------------------


def resnet20() -> tuple[nn.Module, np.ndarray, np.ndarray, np.ndarray]:
    """Module, calibration images, judged images, their labels."""
    module = cifar_resnet20()
    load_weights(module, DATA / "cifar_resnet20.th")
    calibration, _ = collect(DATA / "cifar10_train20k.npz", "cifar10", 1000)
    return module, calibration, *collect(DATA / "cifar10_test_a.npz", "cifar10")


def mobilenet_v2() -> tuple[nn.Module, np.ndarray, np.ndarray, np.ndarray]:
    module = load_source("torchvision:mobilenet_v2").module
    load_weights(module, DATA / "mobilenet_v2-b0353104.pth")
    x, y = collect(DATA / "imagenet_sample_500.zip", "imagenet")
    calibrated = np.arange(len(x)) % 5 == 0
    return module, x[calibrated], x[~calibrated], y[~calibrated]


def with_real_weights() -> Iterator[tuple[Program, Session, list[tuple[torch.Tensor]], np.ndarray, np.ndarray]]:
    """Each network: program, float session, calibration, judged images and labels. Prints its float accuracy."""
    for name, load in (("resnet20", resnet20), ("mobilenet_v2", mobilenet_v2)):
        module, calibration, x, y = load()
        program = prepared(module, torch.from_numpy(x[:2]))
        batches = [(torch.from_numpy(calibration[i : i + 50]),) for i in range(0, len(calibration), 50)]
        floating = make_session(lower(program))
        print(f"{name}: float {top1(_run(floating), x, y):.2f} %", flush=True)
        yield program, floating, batches, x, y


def accuracy() -> None:
    for program, _, batches, x, y in with_real_weights():
        for target in target_names():
            _judge_target(program, target, batches, x, y)


def _run(session: Runnable) -> Callable[[np.ndarray], np.ndarray]:
    return lambda images: session.run(images)[0]


def _judge_target(
    program: Program, name: str, batches: list[tuple[torch.Tensor]], x: np.ndarray, y: np.ndarray
) -> None:
    target = load_target(name)
    quantized = run_passes(program, "quantize", Context(target, batches))
    model = lower(quantized)
    here = top1(_run(make_session(model)), x, y)
    judged = torch.from_numpy(x[:8])
    layers = check_layers(quantized, (judged,))
    line = f"  {name:14} {here:.2f} % in ONNX Runtime, {layers.max_steps} step(s), {layers.share_equal:.5%} equal"
    if target.runtime == "openvino":
        there = make_openvino_session(model)
        layers = check_layers(quantized, (judged,), make_openvino_session)
        line += f"; {top1(_run(there), x, y):.2f} % in OpenVINO, {layers.max_steps} step(s)"
        line += f", {layers.share_equal:.5%} equal, {integer_share(model, there.kernels()):.1%} of MACs on integers"
    if target.runtime != "onnxruntime":
        line += f"; {len(check_structure(model, target))} faults of form"
    print(line, flush=True)


# -- with and without VNNI ------------------------------------------------------------------------------------------


def processor() -> None:
    print(f"8-bit products {'saturate' if saturates() else 'are exact'} on this processor")
    for program, floating, batches, x, y in with_real_weights():
        for target in ("ort-x86", "ort-x86-avx2"):
            model = lower(run_passes(program, "quantize", Context(load_target(target), batches)))
            for kind, session in (("exact", make_session(model)), ("default", _with_default_options(model))):
                speed = timed(floating, session, x[:1]).ratio
                print(f"  {target:14} {kind:8} {top1(_run(session), x, y):.2f} %, {speed:.2f}x", flush=True)


def _with_default_options(model: onnx.ModelProto) -> Session:
    """As who has only the file loads it, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return Session(onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))


# -- OpenVINO ------------------------------------------------------------------------------------------------------


def openvino(models: Iterable[str] = tuple(MODELS)) -> None:
    for name in models:
        module, batches = MODELS[name]()
        program = prepared(module, batches[0][:2])
        made = {t: _quantized(program, t, batches) for t in ("ort-x86", "openvino")}
        x = batches[2][:1]
        floating, ours, theirs = lower(program), lower(made["ort-x86"]), lower(made["openvino"])
        there = make_openvino_session(theirs)
        layers = check_layers(made["openvino"], (x,), make_openvino_session)
        ort = timed(make_session(floating), make_session(ours), x.numpy())
        vino = timed(make_openvino_session(floating), there, x.numpy())
        try:
            same = f"{timed(make_openvino_session(ours), there, x.numpy(), 2.0).ratio:.2f}x as fast as the file for ort-x86 there"
        except FxpressError:  # it does not take every file for another runtime
            same = "where the file for ort-x86 does not load"
        sqnr = mean_sqnr([program_outputs(program, (x,))], [tuple(map(torch.from_numpy, there.run(x.numpy())))])
        print(
            f"{name:20} ORT {ort.first_ms:6.2f} -> {ort.second_ms:6.2f} ms ({ort.ratio:.2f}x)  OpenVINO {vino.first_ms:6.2f}"
            f" -> {vino.second_ms:6.2f} ms ({vino.ratio:.2f}x), {same}, {sqnr:.1f} dB, {integer_share(theirs, there.kernels()):.1%} on integers, {layers.max_steps} step(s),"
            f" {layers.share_equal:.4%} equal",
            flush=True,
        )


def _quantized(program: Program, target: str, batches: list[torch.Tensor]) -> Program:
    return run_passes(program, "quantize", Context(load_target(target), [(b,) for b in batches[:2]]))


# -- recipes -------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Two LSTM layers in both directions over embedded words, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 256)
        self.lstm = nn.LSTM(256, 256, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(512, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, t] -> [n, t, 50]."""
        return self.head(self.lstm(self.words(tokens))[0])


def recipes() -> None:
    torch.manual_seed(0)
    cases = {n: MODELS[n]() for n in ("resnet18", "mobilenet_v2", "swin_t", "bert")}
    load_weights(cases["mobilenet_v2"][0], DATA / "mobilenet_v2-b0353104.pth")  # random ones let activations vanish
    cases["tagger"] = (Tagger(), [torch.randint(0, 1000, (4, 64))])
    for name, (module, batches) in cases.items():
        program = prepared(module, batches[0][:2])
        for recipe, text in (("fp16", "to-half"), ("int8-dynamic", "quantize-dynamic")):
            if recipe == "fp16" or name not in ("resnet18", "mobilenet_v2"):
                _judge_recipe(name, recipe, program, text, batches[-1])


def _judge_recipe(name: str, recipe: str, program: Program, pipeline: str, x: torch.Tensor) -> None:
    made = run_passes(program, pipeline, Context(load_target("ort-x86")))
    before, after = lower(program), lower(made)
    parity = check_parity(made, after)
    timing = timed(make_session(before), make_session(after), x[:1].numpy())
    sqnr = mean_sqnr([program_outputs(program, (x,))], [program_outputs(made, (x,))])
    layers = check_dynamic(made, (x[:2],)) if dynamic_nodes(made) else None
    found = f"{layers.max_steps} step(s), {layers.share_equal:.4%} equal by layer" if layers else "within the bound"
    print(
        f"{name:14} {recipe:13} file {_size(after) / _size(before):.3f}, {timing.ratio:.2f}x, {sqnr:.1f} dB, PyTorch and "
        f"ONNX Runtime {parity.max_relative:.1e} apart ({found if parity.kept else 'TOO FAR'})",
        flush=True,
    )


def _size(model: onnx.ModelProto) -> int:
    return model.ByteSize()


def dynamic() -> None:
    for shape, width in (((1, 512), 512), ((128, 768), 768), ((1, 128, 768), 3072), ((4, 64, 256), 256)):
        _judge_layer(f"linear {list(shape)} -> {width}", nn.Linear(shape[-1], width), torch.randn(shape))
    for steps, batch, inputs, hidden in ((64, 1, 256, 256), (32, 8, 128, 512)):
        layer = nn.LSTM(inputs, hidden, batch_first=True)
        _judge_layer(f"LSTM [{batch}, {steps}, {inputs}] -> {hidden}", layer, torch.randn(batch, steps, inputs))


def _judge_layer(name: str, layer: nn.Module, x: torch.Tensor) -> None:
    program = fxpress.capture(layer.eval(), x, dynamic_batch=False)
    made = run_passes(program, "quantize-dynamic", Context(load_target("ort-x86")))
    timing = timed(make_session(lower(program)), make_session(lower(made)), x.numpy(), 1.0)
    print(f"{name:34} {timing.first_ms:7.3f} -> {timing.second_ms:7.3f} ms ({timing.ratio:.2f}x)", flush=True)


BENCHMARKS = {"accuracy": accuracy, "processor": processor, "openvino": openvino, "recipes": recipes, "dynamic": dynamic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(BENCHMARKS), choices=[*BENCHMARKS, []])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="for openvino: these only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in options.what:
        if name == "openvino":
            openvino(options.models)
        else:
            BENCHMARKS[name]()


if __name__ == "__main__":
    main()
