"""Which weights of well-known models the orthogonality regularizer takes: writes the table of docs/orthogonality.md.

    python docs/orthogonality.py

The models are tiny ones of random weights; layers of one kind have one row, whatever their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from torch import Tensor, nn

from hf_ssl_or import OrthogonalityConfig, OrthogonalityRegularizer

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = SMALL | {"vocab_size": 32, "max_position_embeddings": 16}
VISION = SMALL | {"image_size": 16, "patch_size": 8}


class Tagger(nn.Module):
    """A recurrent layer, then attention, with a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=6)
        self.attention = nn.MultiheadAttention(12, 2)
        self.over_images = nn.MultiheadAttention(12, 2, kdim=10, vdim=14)
        self.gru = nn.GRUCell(12, 6)
        self.upsample = nn.ConvTranspose1d(6, 8, 3, groups=2)
        self.queries = nn.Parameter(torch.randn(4, 12))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, num_key_value_heads=1))


def clip() -> nn.Module:
    text = DECODER | {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**DECODER))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=4))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**(VISION | {"mlp_ratio": 2}), num_labels=4, use_swiglu_ffn=True)
    return transformers.Dinov2ForImageClassification(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4, num_labels=4
    )
    return transformers.SwinForImageClassification(config)


def convnextv2() -> nn.Module:
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4)
    return transformers.ConvNextV2ForImageClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**DECODER, num_key_value_heads=1, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**DECODER))


def bloom() -> nn.Module:
    config = transformers.BloomConfig(n_layer=2, hidden_size=16, n_head=2, vocab_size=32)
    return transformers.BloomForCausalLM(config)


def whisper() -> nn.Module:
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIZES.items()}
    config = transformers.WhisperConfig(
        **sizes, d_model=16, vocab_size=32, num_mel_bins=8, max_source_positions=8, max_target_positions=8, pad_token_id=0
    )
    return transformers.WhisperForConditionalGeneration(config)


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def timm_convnext() -> nn.Module:
    return timm.create_model("test_convnext", num_classes=4)


def timm_efficientnet() -> nn.Module:
    config = transformers.TimmWrapperConfig(architecture="test_efficientnet", num_labels=4)
    return transformers.TimmWrapperForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "CLIP": clip,
    "BERT": bert,
    "ViT": vit,
    "DINOv2": dinov2,
    "Swin": swin,
    "ConvNeXt V2": convnextv2,
    "Mixtral": mixtral,
    "GPT-NeoX": gpt_neox,
    "BLOOM": bloom,
    "Whisper": whisper,
    "LSTM and attention": Tagger,
    "timm's ConvNeXt": timm_convnext,
    "timm's EfficientNet": timm_efficientnet,
}


if __name__ == "__main__":
    for name, build in MODELS.items():
        model = build()
        reg = OrthogonalityRegularizer(model, OrthogonalityConfig(weight=1.0))
        print("#####", name, type(model).__name__)
        for n in reg.names: print("   +", n, tuple(model.get_parameter(n).shape))
        for n, why in reg.skipped().items(): print("   -", n, why)
