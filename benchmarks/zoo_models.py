"""The models of the zoo: names of timm and torchvision models, and tiny transformers configurations.

`load(name)` gives a module with random weights and example inputs. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxpress.frontend.sources import declare_torchvision_operators

# fmt: off
_TIMM = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coatnet_pico_rw_224
convformer_s18 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto cpubone_b0_bfrobust crossvit_tiny_240
cs3darknet_s csatv2 cspnext_tiny cspresnet50 darknet53 davit_tiny deit3_small_patch16_224 deit_tiny_patch16_224
densenet121 dla34 dpn68 eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0
fastvit_t8 fbnetc_100 flexivit_small focalnet_tiny_srf gcresnet33ts gcvit_xxtiny gernet_s ghostnet_100 ghostnetv2_100
gmlp_ti16_224 halonet26t hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_m
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small
legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto maxvit_nano_rw_256 mixer_s32_224 mixnet_s
mnasnet_small mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium
mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small
nf_regnet_b0 nfnet_l0 pit_ti_224 pnasnet5large poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnet18 resnetv2_50
resnext50_32x4d rexnet_100 samvit_base_patch16_224 sebotnet33ts_256 selecsls42b semnasnet_100 sequencer2d_s
seresnext26d_32x4d shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224
swinv2_tiny_window8_256 tf_efficientnet_lite0 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_pcpvt_small
twins_svt_small vgg11_bn visformer_tiny vit_relpos_small_patch16_224 vit_small_r26_s32_224 vit_tiny_patch16_224
vitamin_small_224 volo_d1_224 vovnet39a xception41 xcit_nano_12_p16_224
"""

_TORCHVISION = """
alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 densenet161 efficientnet_b0
efficientnet_v2_s fcn_resnet50 googlenet inception_v3 lraspp_mobilenet_v3_large maxvit_t mc3_18 mnasnet0_5 mnasnet1_3
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 regnet_x_400mf regnet_y_400mf
resnet18 resnet50 resnext50_32x4d s3d shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 swin3d_t swin_t
swin_v2_t vgg11 vgg11_bn vit_b_32 wide_resnet50_2
"""
VIDEO = ("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 64, **_SMALL}
_CAUSAL = {"use_cache": False, "num_key_value_heads": 2, **_TEXT}
_IMAGE = {"image_size": 32, "patch_size": 8, **_SMALL}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
_ENCODER_DECODER = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "use_cache": False,
}
_T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False}
_WAVE = {
    "vocab_size": 32, **_SMALL, "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}
_WHISPER = {
    "vocab_size": 50, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "num_mel_bins": 16, "max_source_positions": 32, "decoder_layers": 1, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "pad_token_id": 0,
}
_GPT2 = {"vocab_size": 50, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
_CLIP_TEXT = {**_TEXT, "projection_dim": 16, "eos_token_id": 2}
_RELATIVE = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_SEGFORMER = {**_STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, "num_labels": 5}
_LLAMA_HEAD = {"head_dim": 8, **_CAUSAL}


@dataclass(frozen=True)
class Tiny:
    """A transformers model by class names, its configuration, and what it is fed: text, pair, image, sound or mel."""

    model: str
    config: str
    options: dict[str, Any]
    feed: str = "text"
    size: int = 32


TRANSFORMERS: dict[str, Tiny] = {
    "albert": Tiny("AlbertModel", "AlbertConfig", {"embedding_size": 16, **_TEXT}),
    "bart": Tiny("BartModel", "BartConfig", _ENCODER_DECODER, "pair"),
    "beit": Tiny("BeitModel", "BeitConfig", _IMAGE, "image"),
    "bert": Tiny("BertModel", "BertConfig", _TEXT),
    "bert-classifier": Tiny("BertForSequenceClassification", "BertConfig", _TEXT),
    "bloom": Tiny("BloomModel", "BloomConfig", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}),
    "clip-text": Tiny("CLIPTextModel", "CLIPTextConfig", _CLIP_TEXT),
    "clip-vision": Tiny("CLIPVisionModel", "CLIPVisionConfig", {**_IMAGE, "projection_dim": 16}, "image"),
    "convbert": Tiny("ConvBertModel", "ConvBertConfig", {"embedding_size": 32, **_TEXT}),
    "convnext": Tiny("ConvNextModel", "ConvNextConfig", _STAGES, "image", 64),
    "convnextv2": Tiny("ConvNextV2Model", "ConvNextV2Config", _STAGES, "image", 64),
    "data2vec-text": Tiny("Data2VecTextModel", "Data2VecTextConfig", _TEXT),
    "deberta": Tiny("DebertaModel", "DebertaConfig", _TEXT),
    "deberta-v2": Tiny("DebertaV2Model", "DebertaV2Config", {**_RELATIVE, **_TEXT}),
    "deit": Tiny("DeiTModel", "DeiTConfig", _IMAGE, "image"),
    "dinov2": Tiny("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2, **_IMAGE}, "image"),
    "distilbert": Tiny("DistilBertModel", "DistilBertConfig", {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}),
    "electra": Tiny("ElectraModel", "ElectraConfig", {"embedding_size": 16, **_TEXT}),
    "ernie": Tiny("ErnieModel", "ErnieConfig", _TEXT),
    "falcon": Tiny("FalconModel", "FalconConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}),
    "fnet": Tiny("FNetModel", "FNetConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64}, "ids"),
    "gemma": Tiny("GemmaModel", "GemmaConfig", _LLAMA_HEAD),
    "gemma2": Tiny("Gemma2Model", "Gemma2Config", _LLAMA_HEAD),
    "gpt2": Tiny("GPT2Model", "GPT2Config", _GPT2),
    "gpt2-lm": Tiny("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt-neox": Tiny("GPTNeoXModel", "GPTNeoXConfig", {"use_cache": False, **_TEXT}),
    "gptj": Tiny("GPTJModel", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "hubert": Tiny("HubertModel", "HubertConfig", _WAVE, "sound"),
    "levit": Tiny("LevitModel", "LevitConfig", {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "image", 64),
    "llama": Tiny("LlamaModel", "LlamaConfig", _CAUSAL),
    "llama-lm": Tiny("LlamaForCausalLM", "LlamaConfig", _CAUSAL),
    "mistral": Tiny("MistralModel", "MistralConfig", {"sliding_window": 4, **_CAUSAL}),
    "mobilebert": Tiny("MobileBertModel", "MobileBertConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "intra_bottleneck_size": 16, "embedding_size": 16}),
    "mobilevit": Tiny("MobileViTModel", "MobileViTConfig", {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 64]}, "image", 64),
    "mpnet": Tiny("MPNetModel", "MPNetConfig", _TEXT),
    "opt": Tiny("OPTModel", "OPTConfig", {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "use_cache": False}),
    "phi": Tiny("PhiModel", "PhiConfig", _CAUSAL),
    "poolformer": Tiny("PoolFormerModel", "PoolFormerConfig", {**_STAGES}, "image", 64),
    "pvt": Tiny("PvtModel", "PvtConfig", {"image_size": 64, **_STAGES, "num_attention_heads": [1, 2, 2, 4]}, "image", 64),
    "qwen2": Tiny("Qwen2Model", "Qwen2Config", _CAUSAL),
    "qwen3": Tiny("Qwen3Model", "Qwen3Config", _LLAMA_HEAD),
    "regnet": Tiny("RegNetModel", "RegNetConfig", {**_STAGES, "embedding_size": 8, "groups_width": 8}, "image", 64),
    "resnet": Tiny("ResNetModel", "ResNetConfig", {**_STAGES, "embedding_size": 8}, "image", 64),
    "roberta": Tiny("RobertaModel", "RobertaConfig", _TEXT),
    "segformer": Tiny("SegformerForSemanticSegmentation", "SegformerConfig", _SEGFORMER, "image", 64),
    "siglip-vision": Tiny("SiglipVisionModel", "SiglipVisionConfig", _IMAGE, "image"),
    "squeezebert": Tiny("SqueezeBertModel", "SqueezeBertConfig", {"embedding_size": 32, **_TEXT}),
    "swin": Tiny("SwinModel", "SwinConfig", _SWIN, "image"),
    "swinv2": Tiny("Swinv2Model", "Swinv2Config", _SWIN, "image"),
    "t5": Tiny("T5Model", "T5Config", _T5, "pair"),
    "t5-encoder": Tiny("T5EncoderModel", "T5Config", _T5),
    "unispeech": Tiny("UniSpeechModel", "UniSpeechConfig", _WAVE, "sound"),
    "vit": Tiny("ViTModel", "ViTConfig", _IMAGE, "image"),
    "wav2vec2": Tiny("Wav2Vec2Model", "Wav2Vec2Config", _WAVE, "sound"),
    "whisper-encoder": Tiny("WhisperEncoder", "WhisperConfig", _WHISPER, "mel"),
    "xlm-roberta": Tiny("XLMRobertaModel", "XLMRobertaConfig", _TEXT),
}
# fmt: on

NAMES = [
    *(f"timm:{n}" for n in _TIMM.split()),
    *(f"torchvision:{n}" for n in _TORCHVISION.split()),
    *(f"transformers:{n}" for n in TRANSFORMERS),
]
_KEEP: list[object] = []

Loaded = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # module, args, kwargs


def load(name: str) -> Loaded:
    """A model with random weights in eval mode, and example inputs with batch 2."""
    library, _, model = name.partition(":")
    declare_operators()
    torch.manual_seed(0)
    module, args, kwargs = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}[library](model)
    return redraw(module).eval(), args, kwargs


def declare_operators() -> None:
    """Call before importing timm or torchvision, whose compiled operators may be missing."""
    _KEEP.append(declare_torchvision_operators())


def _timm(name: str) -> Loaded:
    import timm

    module = timm.create_model(name, pretrained=False)
    return module, (_picture(module, *module.default_cfg["input_size"]),), {}


def _torchvision(name: str) -> Loaded:
    import torchvision

    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    module = torchvision.models.get_model(name, weights=None, **options)
    if name in VIDEO:
        size = 224 if name.startswith(("mvit", "s3d")) else 112
        return module, (torch.randn(2, 3, 16, size, size),), {}
    return module, (_picture(module, 3, 224, 224),), {}


def _picture(module: nn.Module, channels: int, height: int, width: int) -> torch.Tensor:
    """A small picture where the model takes one, else one of its own size: the algebra is the same, and the run short."""
    small = torch.randn(2, channels, 96, 96)
    try:
        with torch.no_grad():
            module.eval()(small)
        return small
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return torch.randn(2, channels, height, width)


def _transformers(name: str) -> Loaded:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    tiny = TRANSFORMERS[name]
    config = getattr(transformers, tiny.config)(**tiny.options)
    cls = WhisperEncoder if tiny.model == "WhisperEncoder" else getattr(transformers, tiny.model)
    return cls(config), (), _feed(tiny)


def _feed(tiny: Tiny) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(3, 50, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    feeds = {
        "text": {"input_ids": ids, "attention_mask": mask},
        "ids": {"input_ids": ids},
        "pair": {"input_ids": ids, "decoder_input_ids": torch.randint(3, 50, (2, 7))},
        "image": {"pixel_values": torch.randn(2, 3, tiny.size, tiny.size)},
        "sound": {"input_values": torch.randn(2, 1600)},
        "mel": {"input_features": torch.randn(2, 16, 64)},
    }
    return feeds[tiny.feed]


def redraw(module: nn.Module) -> nn.Module:
    """Random weights, biases, scales and statistics of sane size, so that every position matters to the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_mean"):
                tensor.copy_(values * 0.3)
            elif name.endswith("running_var"):
                tensor.copy_(values.abs() + 0.5)
            elif isinstance(_owner(module, name), nn.Parameter) and tensor.ndim <= 1:
                tensor.copy_(0.2 * values + name.endswith("weight"))
            elif isinstance(_owner(module, name), nn.Parameter) and not tensor.std() > 1e-3:
                tensor.copy_(0.3 * values)
    return module


def _owner(module: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)
