"""Weights that were trained on other channels: the first layer's become what timm makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from hf_ssl_or.models.auto import create_encoder

NETS = {
    "resnet18": ("conv1.weight", {"channels": [8, 8, 8, 8]}),
    "resnet18d": ("conv1.0.weight", {"channels": [8, 8, 8, 8]}),
    "wide_resnet28_2": ("stem.conv.weight", {}),
    "vit_tiny": (
        "patch_embed.proj.weight",
        {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    ),
}


@pytest.mark.parametrize("there", [1, 3, 6])
@pytest.mark.parametrize("name", NETS)
def test_only_the_first_layer_changes(name: str, there: int, tmp_path: Path) -> None:
    first, options = NETS[name]
    torch.manual_seed(0)
    saved = create_encoder(name, num_channels=there, **options)
    saved.save_pretrained(tmp_path)
    weight = saved.timm_model.state_dict()[first]
    for here in (1, 2, 3, 5, 8):
        state = create_encoder(name, num_channels=here, init_from=tmp_path).timm_model.state_dict()
        if here == there:
            wanted = weight
        elif here == 1:
            wanted = weight.sum(1, keepdim=True)
        else:
            wanted = torch.stack([weight[:, channel % there] for channel in range(here)], dim=1) * (there / here)
        torch.testing.assert_close(state.pop(first), wanted)
        assert all(value.equal(saved.timm_model.state_dict()[key]) for key, value in state.items())
    assert create_encoder(name, init_from=tmp_path).config.num_channels == there, "unless another number is asked for"


@torch.no_grad()
def test_gray_and_doubled_images_have_the_features_of_the_color_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = create_encoder("resnet18", channels=[8, 8, 8, 8], stem="small", image_size=16).eval()
    saved.save_pretrained(tmp_path)
    gray, rgb = torch.randn(2, 1, 16, 16), torch.randn(2, 3, 16, 16)
    one, six = (create_encoder("resnet18", num_channels=n, init_from=tmp_path).eval() for n in (1, 6))
    expected = saved(gray.expand(-1, 3, -1, -1)).pooler_output
    torch.testing.assert_close(one(gray).pooler_output, expected)
    torch.testing.assert_close(six(torch.cat([rgb, rgb], 1)).pooler_output, saved(rgb).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 6])
def test_a_folder_that_timm_wrote(channels: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=0).eval()
    save_for_hf(net, tmp_path, safe_serialization=True)
    ours = create_encoder("resnet18", num_channels=channels, init_from=tmp_path).eval()
    file = {"file": str(tmp_path / "model.safetensors")}
    options = {"num_classes": 0, "in_chans": channels, "pretrained_cfg_overlay": file}
    theirs = timm.create_model("resnet18", pretrained=True, **options).eval()
    images_BCHW = torch.randn(2, channels, 64, 64)
    torch.testing.assert_close(ours(images_BCHW).pooler_output, theirs(images_BCHW))


def test_other_kernels_are_still_refused(tmp_path: Path) -> None:
    create_encoder("resnet18", channels=[8, 8, 8, 8], stem="small", image_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"init_from: conv1.weight of .* does not fit: \(64, 3, 3, 3\) there"):
        create_encoder("resnet18", stem="standard", image_size=16, init_from=tmp_path)
