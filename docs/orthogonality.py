"""Which weights of well-known models the orthogonality regularizer takes: writes the table of docs/orthogonality.md.

    python docs/orthogonality.py

The models are tiny ones of random weights; layers of one kind have one row, whatever their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
import transformers as tf
from torch import nn

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


TEXT = DECODER | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIDES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}
SPEECH = {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
TIMM = {"num_labels": 4, "architecture": "test_efficientnet"}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16)),
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, num_key_value_heads=1)),
    "CLIP": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)),
    "BERT": lambda: tf.BertForMaskedLM(tf.BertConfig(**DECODER)),
    "ViT": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=4)),
    "DINOv2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION, num_labels=4, use_swiglu_ffn=True)),
    "Swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(**WINDOWS, num_labels=4)),
    "ConvNeXt V2": lambda: tf.ConvNextV2ForImageClassification(
        tf.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4)
    ),
    "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_key_value_heads=1, num_local_experts=3)),
    "GPT-NeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**DECODER)),
    "BLOOM": lambda: tf.BloomForCausalLM(tf.BloomConfig(n_layer=2, hidden_size=16, n_head=2, vocab_size=32)),
    "Whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**SIDES, **SPEECH, vocab_size=32, pad_token_id=0)
    ),
    "LSTM and attention": Tagger,
    "timm's ConvNeXt": lambda: timm.create_model("test_convnext", num_classes=4),
    "timm's EfficientNet": lambda: tf.TimmWrapperForImageClassification(tf.TimmWrapperConfig(**TIMM)),
}

DOCUMENT = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- by docs/orthogonality.py -->\n", "<!-- end -->\n"


def pattern(name: str) -> str:
    """Returns the name with stars for numbers, which is a pattern for `include` and `exclude`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def listed(lines: Iterable[str]) -> str:
    """Returns one cell of the table: each line once."""
    return "<br>".join(dict.fromkeys(lines)) or "-"


def row(name: str, model: nn.Module) -> str:
    """Returns a model's row; where one parameter is several matrices, it says what each is for."""
    regularizer = OrthogonalityRegularizer(model, OrthogonalityConfig(weight=1.0))
    taken = []
    for error in regularizer.errors():
        parameter, _, part = error.partition("[")
        taken.append(f"`{pattern(parameter)}`" + (f", by {kind(part)}" if part else ""))
    left = [f"`{pattern(name)}`: {reason.partition(':')[0]}" for name, reason in regularizer.skipped().items()]
    return f"| {name}, `{type(model).__name__}` | {listed(taken)} | {listed(left)} |"


def kind(part: str) -> str:
    """Returns what the suffixes of an error's name stand for."""
    if part.startswith("expert"):
        return "expert"
    return "query, key and value" if part[0] in "qkv" else "gate"


def table() -> str:
    """Returns the table of all models."""
    head = "| model | regularized | left out: why |\n|---|---|---|\n"
    return head + "".join(row(name, build()) + "\n" for name, build in MODELS.items())


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
