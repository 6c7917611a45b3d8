"""The forms that quantization writes for a target, model by model: speed over float, SQNR, parity, and the kernels' time.

    taskset -c 0 python benchmarks/forms.py resnet18 deit_tiny            # a line each; no names: all models
    taskset -c 0 python benchmarks/forms.py swin_t --profile --parity     # with time by kernel, float beside int8
    ... --pipeline 'quantize{forms=[attention]}'                          # another form

Weights are random unless said otherwise (compare within a model only), pictures are noise of 224x224 (the network that
looks for objects: 320x320), texts are 128 random tokens. One thread, batch 1, processor time, interleaved runs, median of ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import nn
from zoo_models import declare_operators

import fxpress
from fxpress.backends.coverage import measure_coverage
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.frontend.program import Program
from fxpress.frontend.sources import declare_torchvision_operators, load_source
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.quantize.ranges.choose import mean_sqnr, program_outputs
from fxpress.runtime.benchmark import compare_latency
from fxpress.runtime.layers import check_layers
from fxpress.runtime.session import make_session
from fxpress.runtime.verify import check_parity

PREPARE = "cleanup,canonicalize,fuse-batchnorm"
TOKENS = 128


class Detector(nn.Module):
    """A small network like those of the YOLO family: SiLU, blocks that split and concatenate, an upsampled neck."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, width, 3, 2), _unit(width, 2 * width, 3, 2), Split(2 * width))
        self.middle = nn.Sequential(_unit(2 * width, 4 * width, 3, 2), Split(4 * width))
        self.deep = nn.Sequential(_unit(4 * width, 8 * width, 3, 2), Split(8 * width))
        self.deepest = nn.Sequential(_unit(8 * width, 16 * width, 3, 2), Split(16 * width), Pyramid(16 * width))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.join = Split(24 * width, 8 * width)
        self.small, self.large = nn.Conv2d(8 * width, 85, 1), nn.Conv2d(16 * width, 85, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, 3, h, w] -> [n, 85, h / 16, w / 16], [n, 85, h / 32, w / 32]."""
        middle = self.deep(self.middle(self.stem(x)))
        deepest = self.deepest(middle)
        return self.small(self.join(torch.cat([self.up(deepest), middle], 1))), self.large(deepest)


class Split(nn.Module):
    """Half of the channels goes through two convolutions; all that was computed is joined."""

    def __init__(self, inputs: int, outputs: int | None = None) -> None:
        super().__init__()
        half = (outputs or inputs) // 2
        self.first, self.last = _unit(inputs, 2 * half, 1), _unit(3 * half, outputs or inputs, 1)
        self.a, self.b = _unit(half, half, 3), _unit(half, half, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, inputs, h, w] -> [n, outputs, h, w]."""
        kept, worked = self.first(x).chunk(2, 1)
        return self.last(torch.cat([kept, worked, worked + self.b(self.a(worked))], 1))


class Pyramid(nn.Module):
    """Pools of growing windows, joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = _unit(channels, channels // 2, 1), _unit(2 * channels, channels, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] -> the same."""
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Text(nn.Module):
    """BERT base with random weights, from token numbers to the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        declare_operators()  # which transformers asks of torchvision
        declare_torchvision_operators()  # transformers imports torchvision
        from transformers import BertConfig, BertModel

        self.model = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64[n, tokens] -> [n, tokens, 768]."""
        return self.model(input_ids=ids).last_hidden_state


def _picture(source: str) -> Callable[[], tuple[nn.Module, list[torch.Tensor]]]:
    return lambda: (load_source(source).module, [_noise(i, 224) for i in range(3)])


def _noise(seed: int, size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _texts() -> tuple[nn.Module, list[torch.Tensor]]:
    return Text(), [torch.randint(0, 30000, (4, TOKENS), generator=torch.Generator().manual_seed(i)) for i in range(3)]


# Name -> a function that gives the module and three batches: two to calibrate on, one held out.
MODELS: dict[str, Callable[[], tuple[nn.Module, list[torch.Tensor]]]] = {
    **{
        n: _picture(f"torchvision:{n}")
        for n in (
            "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x1_0",
            "convnext_tiny", "swin_t",
        )
    },
    "deit_tiny": _picture("timm:deit_tiny_patch16_224"),
    "bert": _texts,
    "detector": lambda: (Detector(), [_noise(i, 320) for i in range(3)]),
}  # fmt: skip


def kernel_times(model: onnx.ModelProto, x: torch.Tensor, runs: int = 20) -> list[tuple[str, str, float]]:
    """(node, op, median ms) of every kernel that ONNX Runtime runs for `model`, the slowest first."""
    with tempfile.TemporaryDirectory() as folder:
        session = make_session(model, profile=Path(folder) / "profile")
        for _ in range(runs):
            session.run(x.numpy())
        events = json.loads(Path(session.inner.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            times.setdefault(key, []).append(event["dur"] / 1e3)
    rows = [(node, op, statistics.median(t)) for (node, op), t in times.items()]
    return sorted(rows, key=lambda row: -row[2])


def print_profile(title: str, model: onnx.ModelProto, x: torch.Tensor, nodes: int) -> None:
    """Milliseconds and share by op, then the slowest nodes."""
    rows = kernel_times(model, x)
    total = sum(ms for *_, ms in rows)
    by_op: Counter[str] = Counter()
    counts = Counter(op for _, op, _ in rows)
    for _, op, ms in rows:
        by_op[op] += ms  # type: ignore[assignment]
    print(f"  {title}: kernels {total:.2f} ms")
    for op, ms in by_op.most_common(14):
        print(f"    {op:28s} {counts[op]:4d} x {ms:8.3f} ms {100 * ms / total:5.1f} %")
    for node, op, ms in rows[:nodes]:
        print(f"      {ms:7.3f} ms {op:24s} {node}")


def judge(name: str, options: argparse.Namespace) -> None:
    """Print what one model gains, and what it costs."""
    torch.manual_seed(0)
    module, batches = MODELS[name]()
    start = time.perf_counter()
    program = run_passes(fxpress.capture(module.eval(), batches[0][:2]), PREPARE)
    captured = time.perf_counter()
    context = Context(target=load_target(options.target), calibration=[(b,) for b in batches[:2]])
    quantized = PassManager(options.pipeline).run(program, context)
    folded = time.perf_counter()
    models = lower(program), lower(quantized)
    held_out = batches[2]
    timing = compare_latency(
        *map(make_session, models), (held_out[:1].numpy(),), seconds=options.seconds, clock=time.thread_time
    )
    sqnr = mean_sqnr([program_outputs(program, (held_out,))], [program_outputs(quantized, (held_out,))])
    coverage = measure_coverage(models[1])
    print(
        f"{name}: {timing.ratio:.2f}x ({timing.first_ms:.2f} -> {timing.second_ms:.2f} ms, {timing.runs} pairs), {sqnr:.1f} dB, "
        f"{100 * coverage.integer_macs:.1f} % of MACs on integers; "
        f"capture {captured - start:.0f} s, quantize {folded - captured:.0f} s",
        flush=True,
    )
    if options.parity:
        print_parity(quantized, models[1], held_out)
    if options.profile:
        for title, model in zip(("float", "int8"), models):
            print_profile(title, model, held_out[:1], options.nodes)
    if options.save:
        folder = Path(options.save)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, model in zip(("float", "int8"), models):
            onnx.save(model, folder / f"{name}.{kind}.onnx")
        program.save(folder / f"{name}.float.pt2")


def print_parity(quantized: Program, model: onnx.ModelProto, held_out: torch.Tensor) -> None:
    """Layer by layer on the same inputs, then end to end."""
    layers = check_layers(quantized, (held_out[:2],))
    ends = check_parity(quantized, model, batches=(1, 2), real_inputs=(held_out,))
    print(
        f"  parity: layers at most {layers.max_steps} step(s) apart, {100 * layers.share_equal:.4f} % equal; end to end "
        f"{100 * ends.output_within_1_step:.2f} % within a step, {ends.max_relative:.1e} of the largest"
    )
    for layer in sorted(layers.layers, key=lambda s: s.share_equal)[:4]:
        if layer.share_equal < 1:
            print(f"    {layer.name}: {layer.max_steps} step(s), {100 * layer.share_equal:.4f} % equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--target", default="ort-x86")
    parser.add_argument("--pipeline", default="quantize")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--nodes", type=int, default=12, help="how many single nodes --profile lists")
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--save", metavar="FOLDER", help="write the ONNX files and the float program there")
    torch.set_num_threads(1)
    options = parser.parse_args()
    for name in options.models:
        judge(name, options)


if __name__ == "__main__":
    main()
