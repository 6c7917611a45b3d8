"""Lowering on whole models: torchvision, timm and transformers, against eager PyTorch at batches 1, 2 and 5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxpress.backends.onnx.lower import lower
from fxpress.frontend.capture import capture
from fxpress.runtime.verify import check_parity
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.zoo]

TORCHVISION = [
    ("resnet18", 64), ("resnet50", 64), ("mobilenet_v2", 64), ("mobilenet_v3_small", 64), ("densenet121", 64),
    ("shufflenet_v2_x1_0", 64), ("efficientnet_b0", 64), ("regnet_y_400mf", 64), ("googlenet", 64),
    ("squeezenet1_1", 64), ("mnasnet0_5", 64), ("convnext_tiny", 64), ("vit_b_16", 224), ("swin_t", 64),
    ("swin_v2_t", 64), ("maxvit_t", 224), ("alexnet", 64), ("inception_v3", 96),
]  # fmt: skip
SEGMENTATION = ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50"]
TIMM = [
    "mobilenetv3_small_050", "resnet10t", "res2net50_26w_4s", "ghostnet_050", "hrnet_w18_small", "lcnet_035",
    "tf_efficientnet_lite0", "cspresnet50", "dla34", "repvgg_a0", "rexnet_100", "selecsls42b", "dpn48b", "resnest14d",
    "skresnet18", "efficientvit_b0", "mobilevit_xxs", "edgenext_xx_small", "poolformer_s12",
    "mobileone_s0", "fastvit_t8", "levit_128s", "convmixer_768_32", "nf_regnet_b0", "eca_nfnet_l0",
    "coatnet_pico_rw_224", "xcit_nano_12_p16_224", "deit_tiny_patch16_224", "mixer_s32_224", "gmlp_ti16_224",
    "pvt_v2_b0", "crossvit_tiny_240", "cait_xxs24_224", "visformer_tiny", "tiny_vit_5m_224",
]  # fmt: skip
_FIXED_SIZE = ("224", "240", "levit", "visformer", "mixer", "gmlp")


def redraw(module: nn.Module) -> nn.Module:
    """Statistics and scales that are not the neutral ones, so that a mistake in them would show."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point() and tensor.ndim <= 1:
            # Biases and norm weights: many are 0 or 1 at the start, and layer scales nearly 0.
            tensor.copy_(0.7 * tensor + torch.rand(tensor.shape, generator=generator) * 0.3)
    return module.eval()


def check(module: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    program = capture(redraw(module), inputs, kwargs or None)
    parity = check_parity(program, lower(program))
    assert parity.batches == (1, 2, 5)
    assert parity.smallest_reference > 1e-6, "outputs are zero: the comparison says nothing"
    assert parity.max_relative <= 1e-4


@pytest.mark.parametrize(("name", "size"), TORCHVISION, ids=lambda v: str(v))
def test_torchvision(name: str, size: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    check(torchvision.models.get_model(name, weights=None, **extra), torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    check(torchvision.models.get_model(name, weights=None, weights_backbone=None), torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    fixed = any(part in name for part in _FIXED_SIZE)
    size = model.default_cfg["input_size"][-1] if fixed else 64
    check(model, torch.randn(2, 3, size, size))


def test_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 12))
    check(transformers.BertModel(config), input_ids=ids, attention_mask=torch.ones(2, 12, dtype=torch.long))


def test_segformer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    torch.manual_seed(0)
    check(transformers.SegformerForSemanticSegmentation(config), pixel_values=torch.randn(2, 3, 64, 64))
