"""The measurements behind six choices in the code: how pools, stems, depthwise convolutions, tokens and masks are
written, and how ranges are chosen.

    taskset -c 0 python benchmarks/choices.py pools stems depthwise tokens masks ranges

pools   an average pool between 8-bit tensors: ONNX Runtime's integer pool, its float pool, a depthwise convolution
stems   whole networks with the first convolution as it is, and over 2x2 blocks of pixels or for four columns at once
depthwise  whole networks with depthwise convolutions on the channels that they have, and on multiples of 16
tokens  networks of linear layers on tokens, which are written as matrices: speed over float and SQNR
masks   attention of 12 heads over 128 tokens, masked as the graph has it and without denormal numbers
ranges  SQNR of the outputs under each range rule, on samples that took no part in calibration and in no judging
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import numpy as np
import onnx
import torch
from int8_accuracy import DATA, collect
from models import cifar_resnet20, cifar_resnet32
from onnx import TensorProto, helper, numpy_helper
from peers import Feed, interleaved
from torch import nn

import fxpress
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.frontend.program import Program
from fxpress.frontend.sources import load_source
from fxpress.frontend.weights import load_weights
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.quantize.ranges.choose import mean_sqnr
from fxpress.passes.quantize.spec import Target

TARGET = load_target("ort-x86")
PREPARE = "cleanup,canonicalize,fuse-batchnorm"


def medians(models: dict[str, onnx.ModelProto], x: np.ndarray | Feed, rounds: int = 60) -> dict[str, float]:
    """Median milliseconds of each model."""
    return {name: statistics.median(t) for name, t in interleaved(models, x, rounds, trials=4).items()}


# -- pools --------------------------------------------------------------------------------------------------------


def pool_model(form: str, channels: int, size: int) -> onnx.ModelProto:
    """uint8 [1, C, H, H] -> uint8, averaged over 2x2."""
    arrays = {
        "s": np.float32(0.02), "z": np.uint8(0), "low": np.float32(-3e38), "w": np.full((channels, 1, 2, 2), 127, np.int8),
        "ws": np.full(channels, 1 / (4 * 127), np.float32), "wz": np.zeros(channels, np.int8),
    }  # fmt: skip
    make = helper.make_node
    nodes = [make("DequantizeLinear", ["x", "s", "z"], ["a"])]
    if form == "depthwise convolution":
        nodes.append(make("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0))
        nodes.append(make("Conv", ["a", "wd"], ["b"], group=channels, strides=[2, 2]))
    else:
        nodes.append(make("AveragePool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]))
        nodes.append(make("Max", ["p", "low"], ["b"]) if form == "float pool" else make("Identity", ["p"], ["b"]))
    nodes.append(make("QuantizeLinear", ["b", "s", "z"], ["y"]))
    info = helper.make_tensor_value_info
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes, "pool", [info("x", TensorProto.UINT8, [1, channels, size, size])], [info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items() if n in used],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def pools() -> None:
    forms = ("integer pool", "float pool", "depthwise convolution")
    for channels, size in ((128, 56), (256, 28), (512, 14)):
        x = np.random.default_rng(0).integers(0, 255, (1, channels, size, size)).astype(np.uint8)
        found = medians({f: pool_model(f, channels, size) for f in forms}, x)
        print(f"pool 2x2 [{channels}, {size}, {size}]:", ", ".join(f"{k} {v * 1e3:.0f} us" for k, v in found.items()))


# -- stems --------------------------------------------------------------------------------------------------------


def stems() -> None:
    networks = {n: (load_source(f"torchvision:{n}").module, 224) for n in ("mobilenet_v2", "resnet18", "googlenet", "vgg11")}
    networks["resnet20"] = (cifar_resnet20().eval(), 32)
    for name, (module, size) in networks.items():
        program = fxpress.capture(module, torch.randn(2, 3, size, size))
        data = [(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)),)]
        floating = run_passes(program, PREPARE)
        plain = dataclasses.replace(TARGET, stem_blocks=False, stem_columns=1)
        models = {
            "float": lower(floating),
            "plain stem": int8(floating, plain, data),
            "blocks or columns": int8(floating, TARGET, data),
        }
        print(
            f"stem of {name}:", ", ".join(f"{k} {v:.2f} ms" for k, v in medians(models, data[0][0][:1].numpy()).items())
        )


def depthwise() -> None:
    for name in ("shufflenet_v2_x1_0", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0"):
        program = fxpress.capture(load_source(f"torchvision:{name}").module, torch.randn(2, 3, 224, 224))
        data = [(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)]
        floating = run_passes(program, PREPARE)
        plain = dataclasses.replace(TARGET, depthwise_multiple=1)
        models = {
            "float": lower(floating),
            "as they are": int8(floating, plain, data),
            "multiples of 16": int8(floating, TARGET, data),
        }
        found = medians(models, data[0][0][:1].numpy())
        print(f"depthwise in {name}:", ", ".join(f"{k} {v:.2f} ms" for k, v in found.items()))


def int8(program: Program, target: Target, data: list[tuple[torch.Tensor, ...]]) -> onnx.ModelProto:
    return lower(PassManager("quantize{ranges=minmax}").run(program, Context(target=target, calibration=data)))


# -- masks --------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """One layer of attention, causal or with hidden tokens: bool[n, tokens]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(768, 2304), nn.Linear(768, 768)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """[n, 128, 768] -> [n, 128, 768]."""
        q, k, v = self.qkv(x).reshape(-1, 128, 3, 12, 64).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).flatten(2))


def masks() -> None:
    x, seen = torch.randn(2, 128, 768), torch.arange(128).expand(2, 128) < 64
    for name, inputs in (("causal", (x,)), ("half of the tokens hidden", (x, seen))):
        floating = run_passes(fxpress.capture(Masked(), inputs), PREPARE)
        plain = dataclasses.replace(TARGET, shields_masks=False)
        models = {
            "float": lower(floating),
            "as it is": int8(floating, plain, [inputs]),
            "shielded": int8(floating, TARGET, [inputs]),
        }
        feed = dict(zip([i.name for i in floating.inputs], (t[:1].numpy() for t in inputs)))
        print(f"attention, {name}:", ", ".join(f"{k} {v:.2f} ms" for k, v in medians(models, feed).items()))


# -- tokens -------------------------------------------------------------------------------------------------------


def tokens() -> None:
    for name in ("timm:deit_tiny_patch16_224", "torchvision:convnext_tiny", "torchvision:swin_t"):
        program = run_passes(fxpress.capture(load_source(name).module, torch.randn(2, 3, 224, 224)), PREPARE)
        data, held_out = (torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        context = Context(target=TARGET, calibration=[(data,)])
        quantized = PassManager("quantize{ranges=minmax}").run(program, context)
        sqnr = mean_sqnr([program.run_flat((held_out,))], [quantized.run_flat((held_out,))])
        found = medians({"float": lower(program), "int8": lower(quantized)}, held_out[:1].numpy(), 40)
        print(f"{name}: {found['float'] / found['int8']:.2f}x over float, {sqnr:.1f} dB", flush=True)


# -- ranges -------------------------------------------------------------------------------------------------------


def ranges() -> None:
    images, _ = collect(DATA / "cifar10_train20k.npz", "cifar10", 2000)
    for make, file in ((cifar_resnet20, "cifar_resnet20.th"), (cifar_resnet32, "cifar_resnet32.th")):
        module = make()
        load_weights(module, DATA / file)
        compare_ranges(file, module, images[:1000], images[1000:])
    module = load_source("torchvision:mobilenet_v2").module
    load_weights(module, DATA / "mobilenet_v2-b0353104.pth")
    # Only the hundred pictures that the accuracy benchmark calibrates on: the others are for judging.
    pictures = collect(DATA / "imagenet_sample_500.zip", "imagenet")[0][::5]
    compare_ranges("mobilenet_v2", module, pictures[:60], pictures[60:])


def compare_ranges(title: str, module: torch.nn.Module, calibration: np.ndarray, held_out: np.ndarray) -> None:
    x = torch.from_numpy(held_out)
    program = run_passes(fxpress.capture(module, x[:2]), PREPARE)
    batches = [(torch.from_numpy(calibration[i : i + 20]),) for i in range(0, len(calibration), 20)]
    want = [program.run_flat((part,)) for part in x.split(50)]
    for rule in ("minmax", "moving-average", "mse"):
        for weights in ("minmax", "mse"):
            pipeline = f"quantize{{ranges={rule},weights={weights}}}"
            quantized = PassManager(pipeline).run(program, Context(target=TARGET, calibration=batches))
            sqnr = mean_sqnr(want, (quantized.run_flat((part,)) for part in x.split(50)))
            print(f"{title}: ranges {rule}, weights {weights}: {sqnr:.1f} dB on {len(x)} held-out samples", flush=True)


CHOICES = {"pools": pools, "stems": stems, "depthwise": depthwise, "masks": masks, "tokens": tokens, "ranges": ranges}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", default=list(CHOICES))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in parser.parse_args().choices:
        CHOICES[name]()


if __name__ == "__main__":
    main()
