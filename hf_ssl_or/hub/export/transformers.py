"""Stock transformers: `ViTModel` and `ResNetModel`, under the names of weights that all its versions read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, ResNetConfig, ViTConfig

from hf_ssl_or.hub.export.model import Lines, Portable, renamed, write_json
from hf_ssl_or.hub.export.timm import processor_lines
from hf_ssl_or.hub.export.torchvision import PLAIN_RESNET
from hf_ssl_or.models.image_processing_ssl import stock_processor
from hf_ssl_or.models.modeling_ssl_vit import SSLViTModel

_LIBRARY = "stock transformers"

_BLOCK = r"^blocks\.(\d+)\."
_VIT_NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (_BLOCK + r"norm1\.", r"encoder.layer.\1.layernorm_before."),
    (_BLOCK + r"norm2\.", r"encoder.layer.\1.layernorm_after."),
    (_BLOCK + r"attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (_BLOCK + r"attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (_BLOCK + r"mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (_BLOCK + r"mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
)
_UNITS = (("convolution", "conv"), ("normalization", "bn"))
_STAGES = [
    (rf"^layer{s}\.(\d+)\.{theirs}{j}\.", rf"encoder.stages.{s - 1}.layers.\1.layer.{j - 1}.{ours}.")
    for s in range(1, 5)
    for j in range(1, 4)
    for ours, theirs in _UNITS
]
_SHORTCUTS = [
    (rf"^layer{s}\.(\d+)\.downsample\.{i}\.", rf"encoder.stages.{s - 1}.layers.\1.shortcut.{unit}.")
    for s in range(1, 5)
    for i, (unit, _) in enumerate(_UNITS)
]
_RESNET_NAMES = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    *_STAGES,
    *_SHORTCUTS,
    (r"^fc\.", "classifier.1."),
)


def write(portable: Portable, folder: Path) -> list[Lines]:
    """Writes the encoder as transformers' own ViT or ResNet.

    Raises:
        InputError: Neither can express the encoder.
    """
    is_vit = isinstance(portable.encoder, SSLViTModel)
    weights = _split_attention(portable.weights) if is_vit else portable.weights
    _check_vit(portable) if is_vit else _check_resnet(portable)
    weights, lost = renamed(weights, _VIT_NAMES if is_vit else _RESNET_NAMES)
    if lost:
        raise portable.refusal(_LIBRARY, f"it has no {lost[0]}", ["timm", "onnx"])
    config = _vit_config(portable) if is_vit else _resnet_config(portable)
    _check_size(portable, config)
    kind = "ViT" if is_vit else "ResNet"
    config.architectures = [f"{kind}Model"]
    if portable.labels is not None:
        config.architectures = [f"{kind}ForImageClassification"]
        weights = {key if key.startswith("classifier") else f"{kind.lower()}.{key}": weights[key] for key in weights}
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if (processor := stock_processor(portable.preprocessing)) is not None:
        write_json(folder / "preprocessor_config.json", processor)
    return [_lines(portable, is_vit)]


def _split_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cuts timm's fused rows of query, key and value into three weights."""
    split = {}
    for name, tensor in weights.items():
        if re.match(_BLOCK + r"attn\.qkv\.", name):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[name.replace("qkv", part)] = rows.clone()
        else:
            split[name] = tensor
    return split


def _check_vit(portable: Portable) -> None:
    if portable.config.pooling != "token":
        raise portable.refusal(_LIBRARY, "its ViT has no norm after average pooling", ["timm", "onnx"])
    if "cls_token" not in portable.weights:
        raise portable.refusal(_LIBRARY, "its ViT has a class token", ["timm", "onnx"])


def _check_resnet(portable: Portable) -> None:
    if portable.config.stem != "standard":
        raise portable.refusal(_LIBRARY, "the stem of its ResNet is 7x7 with a max-pool, always", ["onnx"])
    odd = next((name for name in portable.weights if not re.match(PLAIN_RESNET, name)), None)
    if odd is not None:
        raise portable.refusal(_LIBRARY, f"its ResNet has no {odd}", ["timm", "onnx"])


def _vit_config(portable: Portable) -> PreTrainedConfig:
    net, block = portable.net, portable.net.blocks[0]
    return ViTConfig(
        hidden_size=net.embed_dim,
        num_hidden_layers=len(net.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=net.norm.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        patch_size=portable.config.patch_size,
        **_shared(portable),
    )


def _resnet_config(portable: Portable) -> PreTrainedConfig:
    stages = [list(stage) for stage in portable.encoder.stages()]
    widths = portable.encoder.stage_widths()
    return ResNetConfig(
        embedding_size=widths[0],
        hidden_sizes=widths[1:],
        depths=[len(stage) for stage in stages],
        layer_type="bottleneck" if hasattr(stages[0][0], "conv3") else "basic",
        **_shared(portable),
    )


def _shared(portable: Portable) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "num_channels": portable.config.num_channels,
        "image_size": portable.config.image_size,
        "preprocessing": portable.preprocessing.to_dict(),
        **(stock_processor(portable.preprocessing) or {}),
    }
    if portable.labels is None:
        return shared
    id2label = dict(enumerate(portable.labels))
    return {**shared, "id2label": id2label, "label2id": {name: k for k, name in id2label.items()}}


def _check_size(portable: Portable, config: PreTrainedConfig) -> None:
    """Refuses variants of an architecture that have weights of the same names and other shapes."""
    with torch.device("meta"):
        extra = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        theirs = sum(p.numel() for p in AutoModel.from_config(config, **extra).parameters())
    ours = sum(p.numel() for p in portable.net.parameters())
    if ours != theirs:
        reason = f"its {config.model_type} of this kind has {theirs:,} weights, this one has {ours:,}"
        raise portable.refusal(_LIBRARY, reason, ["timm", "onnx"])


def _lines(portable: Portable, is_vit: bool) -> Lines:
    auto = "AutoModel" if portable.labels is None else "AutoModelForImageClassification"
    load, call = "", "with torch.inference_mode():\n"
    if portable.labels is None:
        option = ", add_pooling_layer=False" if is_vit else ""
        load += f'encoder = {auto}.from_pretrained("FOLDER"{option}).eval()\n'
    else:
        load += f'classifier = {auto}.from_pretrained("FOLDER").eval()\n'
        load += "encoder = classifier.base_model\n"
        call += "    logits = classifier(pixel_values).logits\n"
    pooled = "last_hidden_state[:, 0]" if is_vit else "pooler_output.flatten(1)"
    call += f"    features = encoder(pixel_values).{pooled}\n"
    return processor_lines(portable, Lines("transformers", "transformers timm torchvision", (auto,), load, "", call))
