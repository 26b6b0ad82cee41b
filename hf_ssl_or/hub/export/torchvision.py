"""torchvision: a state dict as safetensors, and the lines that build the net for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hf_ssl_or.hub.export.model import Lines, Portable, renamed, write_json
from hf_ssl_or.models.configuration_ssl import OWN_RESNETS
from hf_ssl_or.models.modeling_ssl_vit import SSLViTModel

PLAIN_RESNET = (
    r"(conv1\.weight|bn1\.\w+|fc\.\w+"
    r"|layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.\w+|downsample\.0\.weight|downsample\.1\.\w+))$"
)
_WIDTHS = [64, 128, 256, 512]

_BLOCK = r"^blocks\.(\d+)\."
_LAYER = r"encoder.layers.encoder_layer_\1."
_VIT_NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (_BLOCK + r"norm(\d)\.", _LAYER + r"ln_\2."),
    (_BLOCK + r"attn\.qkv\.", _LAYER + "self_attention.in_proj_"),
    (_BLOCK + r"attn\.proj\.", _LAYER + "self_attention.out_proj."),
    (_BLOCK + r"mlp\.fc1\.", _LAYER + "mlp.0."),
    (_BLOCK + r"mlp\.fc2\.", _LAYER + "mlp.3."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
)


def write(portable: Portable, folder: Path) -> list[Lines]:
    """Writes the encoder for torchvision's `ResNet` or `VisionTransformer`.

    Raises:
        InputError: Neither can express the encoder.
    """
    is_vit = isinstance(portable.encoder, SSLViTModel)
    if is_vit:
        weights = _vit_weights(portable)
        built = _build_vit(portable)
    else:
        built, weights = _build_resnet(portable), portable.weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", portable.describe())
    return [_lines(portable, built, "heads" if is_vit else "fc")]


def _build_resnet(portable: Portable) -> tuple[str, str]:
    """Returns the import statement and the lines that build the net; a small stem takes two more."""
    _check_resnet(portable)
    config, stages = portable.config, [list(stage) for stage in portable.encoder.stages()]
    block: Any = stages[0][0]
    kind = "BasicBlock" if block.expansion == 1 else "Bottleneck"
    groups, width = block.conv2.groups, block.conv2.out_channels // block.conv2.groups
    options = "" if (groups, width) == (1, 64) else f", groups={groups}, width_per_group={width}"
    classes = "" if portable.labels is None else f", num_classes={len(portable.labels)}"
    lines = f"model = ResNet({kind}, {[len(stage) for stage in stages]}{options}{classes})\n"
    if config.stem == "small":
        lines += f"model.conv1 = torch.nn.Conv2d({config.num_channels}, 64, 3, padding=1, bias=False)\n"
        lines += "model.maxpool = torch.nn.Identity()\n"
    elif config.num_channels != 3:
        lines += f"model.conv1 = torch.nn.Conv2d({config.num_channels}, 64, 7, stride=2, padding=3, bias=False)\n"
    return f"from torchvision.models.resnet import {kind}, ResNet", lines


def _check_resnet(portable: Portable) -> None:
    config = portable.config
    if config.architecture in OWN_RESNETS:
        raise portable.refusal("torchvision", f"it has no {config.architecture}", ["onnx"])
    instead = ["onnx"] if config.stem == "small" else ["timm", "onnx"]
    odd = next((name for name in portable.weights if not re.match(PLAIN_RESNET, name)), None)
    if odd is not None:
        raise portable.refusal("torchvision", f"its ResNet has no {odd}", instead)
    first: Any = next(iter(portable.encoder.stages()))[0]
    widths = [width // first.expansion for width in portable.encoder.stage_widths()[1:]]
    if widths != _WIDTHS:
        reason = f"the stages of its ResNet are {_listed(_WIDTHS)} wide, not {_listed(widths)}"
        raise portable.refusal("torchvision", reason, instead)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _vit_weights(portable: Portable) -> dict[str, Tensor]:
    """Returns the weights by torchvision's names, if it has a ViT of this kind."""
    weights, lost = renamed(portable.weights, _VIT_NAMES)
    reason = None
    if portable.config.num_channels != 3:
        reason = "takes three channels"
    elif portable.config.pooling != "token" or "cls_token" not in portable.weights:
        reason = "pools by a class token"
    elif lost:
        reason = f"has no {lost[0]}"
    elif "blocks.0.attn.qkv.bias" not in portable.weights:
        reason = "has biases of queries, keys and values"
    if reason is not None:
        raise portable.refusal("torchvision", f"its VisionTransformer {reason}", ["timm", "onnx"])
    return weights


def _build_vit(portable: Portable) -> tuple[str, str]:
    config, net, block = portable.config, portable.net, portable.net.blocks[0]
    return "from torchvision.models import VisionTransformer", (
        "model = VisionTransformer(\n"
        f"    image_size={config.image_size},\n"
        f"    patch_size={config.patch_size},\n"
        f"    num_layers={len(net.blocks)},\n"
        f"    num_heads={block.attn.num_heads},\n"
        f"    hidden_dim={net.embed_dim},\n"
        f"    mlp_dim={block.mlp.fc1.out_features},\n"
        f"    num_classes={len(portable.labels or [0])},\n"
        ")\n"
    )


def _lines(portable: Portable, built: tuple[str, str], head: str) -> Lines:
    (build_import, load), p = built, portable.preprocessing
    call = "with torch.inference_mode():\n    features = model(pixel_values)\n"
    weights = 'model.load_state_dict(load_file("FOLDER/model.safetensors"))\n'
    if portable.labels is None:
        load += f"model.{head} = torch.nn.Identity()\n{weights}"
    else:
        load += f"{weights}head, model.{head} = model.{head}, torch.nn.Identity()\n"
        call += "    logits = head(features)\n"
    prepare = (
        "transform = v2.Compose(\n"
        "    [\n"
        f"        v2.Resize({p.resize_to}, v2.InterpolationMode.{p.interpolation.upper()}),\n"
        f"        v2.CenterCrop({p.image_size}),\n"
        "        v2.PILToTensor(),\n"
        "        v2.ToDtype(torch.float32, scale=True),\n"
        f"        v2.Normalize({list(p.mean)}, {list(p.std)}),\n"
        "    ]\n"
        ")\n"
        "pixel_values = transform(image)[None]\n"
    )
    transforms = ("from torchvision.transforms import v2",) if portable.takes_rgb else ()
    lines = Lines(
        library="torchvision",
        packages="torchvision safetensors",
        imports=("import torch", "from safetensors.torch import load_file", build_import, *transforms),
        load=f"{load}model.eval()\n",
        prepare=prepare,
        call=call,
    )
    return portable.with_images(lines)
