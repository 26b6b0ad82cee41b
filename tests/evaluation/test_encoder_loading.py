"""Encoders of three libraries, written to a folder and loaded by name: the features, the size, the messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_labeled import image_folder
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.encoder_loading import FrozenEncoder, load_encoder
from hf_ssl_or.evaluation.labeled import load_labeled
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SLIM = {"channels": [8, 8, 8, 8], "stem": "small"}
VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
)


def save(model: PreTrainedModel, folder: Path, **processor) -> str:
    model.save_pretrained(folder)
    options = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD} | processor
    ViTImageProcessor(**options).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def features(encoder: FrozenEncoder) -> torch.Tensor:
    return encoder.model(IMAGES).pooler_output


def test_ours_from_a_folder_and_from_a_run(tmp_path: Path) -> None:
    model = create_encoder("resnet18", image_size=32, **SLIM).eval()
    for folder in (tmp_path / "plain", tmp_path / "run" / "encoder"):
        model.save_pretrained(folder)
        build_image_processor(Preprocessing(image_size=32, mean=MEAN, std=STD)).save_pretrained(folder)
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    for name in ("plain", "run"):
        encoder = load_encoder(str(tmp_path / name))
        assert (encoder.image_size, encoder.processing.mean, encoder.processing.std) == (32, tuple(MEAN), tuple(STD))
        torch.testing.assert_close(features(encoder), model(IMAGES).pooler_output.detach())
    untrained = load_encoder(f"random:{tmp_path / 'run'}")
    assert untrained.key() == load_encoder(f"random:{tmp_path / 'run'}").key() != encoder.key()
    assert features(untrained).shape == features(encoder).shape and untrained.processing == encoder.processing
    assert load_encoder(f"{tmp_path / 'run'}@48").image_size == 48


@torch.no_grad()
def test_transformers_features_come_from_the_pooler_the_class_token_or_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit, bare = ViTModel(VIT).eval(), ViTModel(VIT, add_pooling_layer=False).eval()
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    convnext = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)).eval()
    expected = {
        "vit": (vit, "pooler output", vit(IMAGES).pooler_output),
        "bare": (bare, "class token", bare(IMAGES).last_hidden_state[:, 0]),  # its pooler would be random
        "resnet": (resnet, "pooler output", resnet(IMAGES).last_hidden_state.mean((2, 3))),
        "convnext": (convnext, "pooler output", convnext(IMAGES).pooler_output),
    }
    for name, (model, pooling, wanted) in expected.items():
        encoder = load_encoder(save(model, tmp_path / name))
        assert encoder.pooling == pooling, name
        torch.testing.assert_close(features(encoder), wanted)
        assert (encoder.image_size, encoder.processing.mean) == (32, tuple(MEAN)) and not encoder.model.training


@torch.no_grad()
def test_the_half_of_clip_that_sees_images(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(vision_config=small | {"image_size": 32, "patch_size": 8}, text_config=small | {"vocab_size": 99})
    ).eval()
    folder = save(clip, tmp_path / "clip", do_center_crop=True, crop_size={"height": 32, "width": 32})
    torch.testing.assert_close(features(load_encoder(folder)), clip.vision_model(IMAGES).pooler_output)


@torch.no_grad()
def test_timm_from_a_folder_that_timm_wrote(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=7).eval()
    save_for_hf(net, tmp_path / "net")
    encoder = load_encoder(str(tmp_path / "net"))
    own = net.pretrained_cfg
    assert encoder.image_size == own["input_size"][-1] and encoder.processing.mean == own["mean"]
    torch.testing.assert_close(features(encoder), net.forward_head(net.forward_features(IMAGES), pre_logits=True))


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"), [(64, 0.875, "bicubic"), (40, 0.95, "bilinear"), (48, 1.0, "bicubic")]
)
def test_images_of_a_timm_encoder_are_those_of_its_own_transform(
    size: int, crop_pct: float, interpolation: str, tmp_path: Path
) -> None:
    """To the pixel, whatever the settings of the data say."""
    net = timm.create_model("test_resnet", num_classes=7)
    net.pretrained_cfg |= {"input_size": (3, size, size), "crop_pct": crop_pct, "interpolation": interpolation}
    save_for_hf(net, tmp_path / "net")
    data = image_folder(tmp_path / "pictures", {"train": {"a": 4, "b": 4}, "test": {"a": 3, "b": 3}}, side=70)
    encoder = load_encoder(str(tmp_path / "net"))
    transform = create_transform(**resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'net'}")))
    data, like = encoder.prepare(dataclasses.replace(data, crop_pct=0.5, interpolation="nearest"))
    for split, images in zip(("train", "test"), load_labeled(data, like=like), strict=True):
        files = sorted((tmp_path / "pictures" / split).rglob("*.png"))
        expected_BCHW = torch.stack([transform(Image.open(file)) for file in files])
        (found_BCHW,) = images.clean([np.arange(len(images))])
        torch.testing.assert_close(found_BCHW, expected_BCHW, rtol=1e-6, atol=1e-6)


def test_images_of_a_transformers_encoder_are_cropped_as_its_processor_does(tmp_path: Path) -> None:
    """To a step of 1 / 255: transformers resizes tensors, which round otherwise."""
    shape = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    ViTModel(VIT).save_pretrained(tmp_path / "net")
    CLIPImageProcessor(**shape, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path / "net")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "net")
    data = image_folder(tmp_path / "pictures", {"train": {"a": 4, "b": 4}, "test": {"a": 3, "b": 3}}, side=70)
    data, like = load_encoder(str(tmp_path / "net")).prepare(data)
    train, _ = load_labeled(data, like=like)
    pictures = [Image.open(file).convert("RGB") for file in sorted((tmp_path / "pictures/train").rglob("*.png"))]
    expected_BCHW = processor(pictures, return_tensors="pt").pixel_values
    (found_BCHW,) = train.clean([np.arange(len(train))])
    steps = ((found_BCHW - expected_BCHW) * torch.tensor(STD).view(-1, 1, 1) * 255).abs()
    assert steps.max() < 2.01 and steps.mean() < 0.3


def test_untrained_nets(tmp_path: Path) -> None:
    small, again = load_encoder("random:resnet18@32"), load_encoder("random:resnet18@32")
    assert small.model.config.stem == "small" and small.image_size == 32 and small.processing.mean is None
    assert small.key() == again.key() and small.describe()["parameters"] > 11e6
    assert load_encoder("random:test_vit@64").image_size == 64  # timm's, told its size
    assert load_encoder("random:timm:test_resnet@40").image_size == 40


def test_the_key_follows_weights_and_processing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = ViTModel(VIT)
    first = load_encoder(save(vit, tmp_path / "a")).key()
    assert load_encoder(save(vit, tmp_path / "b")).key() == first
    assert load_encoder(save(vit, tmp_path / "c", image_mean=[0.5] * 3)).key() != first
    with torch.no_grad():
        next(vit.parameters()).view(-1)[0] += 1e-3
    assert load_encoder(save(vit, tmp_path / "d")).key() != first


def test_messages_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("{}")
    vit = ViTModel(VIT)
    state = {name: value for name, value in vit.state_dict().items() if "attention" not in name}
    vit.save_pretrained(tmp_path / "torn", state_dict=state)
    refused = {
        "timm:resnet18": "timm:resnet18: cannot load its weights: .* the Hub cannot be reached; random:timm:",
        "timm/resnet18.a1_in1k": "^timm/resnet18.a1_in1k: cannot load its weights",
        "timm:resnt18": "unknown timm model 'resnt18': did you mean 'resnet18'",
        "org/net": "org/net: cannot be loaded as an encoder: its files are neither on this disk nor in the cache",
        "./nowhere": "there is no such folder",
        str(tmp_path / "empty"): "neither a run's nor an encoder's folder",
        str(tmp_path / "unfinished"): "the run has not ended",
        str(tmp_path / "torn"): "its files lack",
    }
    for name, message in refused.items():
        with pytest.raises(InputError, match=message) as caught:
            load_encoder(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be loaded as an encoder: .* takes no images of 3 x 4 x 4"):
        load_encoder(save(vit, tmp_path / "vit") + "@4")
