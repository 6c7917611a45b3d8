"""Lowering on whole models: torchvision, timm and transformers, against eager PyTorch at batches 1, 2 and 5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxpress.backends.onnx.lower import lower
from fxpress.backends.targets import load_target
from fxpress.frontend.capture import capture
from fxpress.passes.base import Context
from fxpress.passes.manager import run_passes
from fxpress.runtime.layers import check_layers, layer_table
from fxpress.runtime.verify import check_parity

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
        elif tensor.is_floating_point() and not tensor.any():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)  # some heads begin at zero
    return module.eval()


def check(module: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    program = capture(redraw(module), inputs, kwargs or None)
    parity = check_parity(program, lower(program))
    assert parity.batches == (1, 2, 5)
    assert parity.smallest_reference > 1e-6, "outputs are zero: the comparison says nothing"
    assert all((y[0] != y[1]).any() for y in program.call_example()), "outputs do not depend on the input"
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


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 64, **SMALL}
CAUSAL = {"use_cache": False, "num_key_value_heads": 1, **TEXT}
LANGUAGE: list[tuple[str, str, dict[str, Any]]] = [
    ("BertModel", "BertConfig", TEXT),
    ("AlbertModel", "AlbertConfig", {"embedding_size": 16, **TEXT}),
    ("DebertaV2Model", "DebertaV2Config", {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], **TEXT}),
    ("LlamaModel", "LlamaConfig", CAUSAL),
    ("MistralModel", "MistralConfig", {"sliding_window": 4, **CAUSAL}),
    ("GPT2Model", "GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "use_cache": False}),
    ("T5EncoderModel", "T5Config", {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}),
]
VISION: list[tuple[str, str, int, dict[str, Any]]] = [
    ("BeitModel", "BeitConfig", 32, {"image_size": 32, "patch_size": 8, **SMALL}),
    ("SwinModel", "SwinConfig", 32, {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}),
    ("SegformerForSemanticSegmentation", "SegformerConfig", 64, {"depths": [1] * 4, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}),
]


@pytest.mark.parametrize("item", LANGUAGE, ids=lambda v: v[0])
def test_language_models(item: tuple[str, str, dict[str, Any]]) -> None:
    """With an attention mask of zeros and ones."""
    transformers = pytest.importorskip("transformers")
    model, config, options = item
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 50, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    module = getattr(transformers, model)(getattr(transformers, config)(**options))
    check(module, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("item", VISION, ids=lambda v: v[0])
def test_vision_transformers(item: tuple[str, str, int, dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    model, config, size, options = item
    torch.manual_seed(0)
    module = getattr(transformers, model)(getattr(transformers, config)(**options))
    check(module, pixel_values=torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x1_0", "efficientnet_b0"])
def test_quantized_layers_are_within_one_step(name: str) -> None:
    """The whole way: every layer of the INT8 file, fed the same integers, against the simulation in PyTorch."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    program = capture(redraw(torchvision.models.get_model(name, weights=None)), torch.randn(2, 3, 64, 64))
    reference = run_passes(program, "cleanup,canonicalize,fuse-batchnorm")
    images = (torch.randn(4, 3, 64, 64),)
    context = Context(target=load_target("ort-x86"), calibration=[images])
    quantized = run_passes(reference, "quantize", context)
    layers = check_layers(quantized, images)
    assert layers.max_steps <= 1
    assert layers.share_equal > 0.999
    assert layers.output_relative <= 1e-4
    assert len(layers.layers) > 50
    rows = layer_table(reference, quantized, images)
    assert all(r.sqnr_isolated_db > 20 for r in rows if r.sqnr_isolated_db is not None)
    # The sigmoid in a SiLU that the target writes in two parts is no node of the float program, nor is a tensor that is
    # stored once more for an op that wants it saturated (hardsigmoid).
    assert all(r.op == "sigmoid" or r.name.endswith(".input") for r in rows if r.sqnr_isolated_db is None)
