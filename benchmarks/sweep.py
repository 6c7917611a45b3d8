"""The whole way on many architectures: capture, prune by half, check the oracle, quantize, lower, compare with ONNX Runtime.

    python benchmarks/sweep.py                         # all, about ten minutes
    python benchmarks/sweep.py timm:dla34 resnet18     # some

Random weights, re-drawn so that no output is constant; small pictures. A line a model:

    prune    oracle, relative error in float64, and the share of parameters kept at ratio=0.5
    float    PyTorch against ONNX Runtime, relative, at batches 1, 2 and 5; the pruned program likewise
    steps    largest difference of a quantized layer fed the same integers, and the share of equal values
    integer  share of MACs in integer kernels of the optimized graph
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import nn

import fxpress
from fxpress.backends.coverage import measure_coverage
from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.errors import FxpressError
from fxpress.frontend.sources import load_source
from fxpress.passes.base import Context
from fxpress.passes.manager import PassManager, run_passes
from fxpress.passes.prune.masking import oracle_error
from fxpress.runtime.layers import check_layers
from fxpress.runtime.verify import check_parity

# fmt: off
MODELS = [
    "resnet18", "resnext50_32x4d", "densenet121", "googlenet", "shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vgg11_bn",
    "timm:vovnet39a", "timm:ecaresnet26t", "timm:skresnet18", "timm:fbnetc_100", "timm:repvgg_a0", "timm:gernet_s",
    "timm:xception41", "timm:selecsls42b", "timm:darknet53", "timm:regnetx_002", "timm:mobileone_s0",
    "timm:cs3darknet_s", "timm:mobilevit_xxs", "timm:fastvit_t8", "timm:hgnetv2_b0", "timm:efficientnetv2_rw_t",
    "timm:mobilenetv3_large_100", "timm:dla34", "timm:dpn68", "timm:resnest14d", "timm:mixnet_s",
    "timm:hardcorenas_a", "timm:tinynet_e", "timm:rexnet_100", "timm:lcnet_050", "timm:semnasnet_100",
    "timm:nfnet_l0", "timm:edgenext_xx_small", "timm:ese_vovnet19b_dw", "timm:starnet_s1", "timm:pvt_v2_b0",
    "timm:repghostnet_050", "timm:resnetv2_50", "timm:tresnet_m", "timm:legacy_seresnet18", "timm:res2net50_26w_4s",
    "timm:hrnet_w18_small", "timm:ghostnet_100", "timm:cspresnet50", "timm:deit_tiny_patch16_224",
    "timm:resmlp_12_224", "timm:poolformer_s12",
]
# fmt: on


def redraw(module: nn.Module) -> nn.Module:
    """Weights and statistics under which every branch matters."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.2)
        elif isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
    for parameter in module.parameters():
        if parameter.abs().max() < 1e-4:  # layer scales and heads that start at zero
            nn.init.normal_(parameter, 0, 0.1)
    return module


def line(name: str, size: int) -> str:
    """All checks on one model."""
    source = load_source(name if ":" in name else f"torchvision:{name}")
    shape = (3, 224, 224) if any(part in name for part in ("deit", "resmlp")) else (3, size, size)
    program = run_passes(fxpress.capture(redraw(source.module).eval(), torch.randn(2, *shape)), "cleanup,canonicalize")
    plan = fxpress.plan_pruning(program, ratio=0.5)
    pruned = plan.apply(program)
    error = oracle_error(plan.mask(program), pruned)
    kept = pruned.parameter_count / program.parameter_count
    parities = []
    for each in (program, pruned):
        fused = run_passes(each, "fuse-batchnorm")
        parities.append(check_parity(fused, lower(fused)).max_relative)
    return f"prune {error:.1e} ({kept:.2f})  float {parities[0]:.1e} {parities[1]:.1e}  " + quantized(program, shape)


def quantized(program: fxpress.Program, shape: tuple[int, ...]) -> str:
    data = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    context = Context(target=load_target("ort-x86"), calibration=[(data,)])
    int8 = PassManager("fuse-batchnorm,quantize{ranges=minmax}").run(program, context)
    layers = check_layers(int8, (data[:2],))
    coverage = measure_coverage(lower(int8)).integer_macs
    return f"steps {layers.max_steps:g} ({layers.share_equal:.5f})  integer {coverage:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in options.models:
        start = time.perf_counter()
        try:
            result = line(name, options.size)
        except FxpressError as error:
            failed, result = failed + 1, f"{type(error).__name__}: {error.message.splitlines()[0]}"
        print(f"{name:32} {result}  {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(options.models) - failed} of {len(options.models)} went all the way")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
