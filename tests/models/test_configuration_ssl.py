from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hf_ssl_or.models import SSLResNetConfig, SSLViTConfig
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig, list_architectures

PRETRAINING = {"method": "vicreg", "steps": 10, "nested": {"seed": 0, "views": [1, 2]}}


def test_orthogonality_round_trip() -> None:
    config = OrthogonalityConfig(penalty="srip", weight=1, include=["*.conv1.weight"], every=2)
    assert OrthogonalityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [f.name for f in dataclasses.fields(config)] == list(config.to_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("penalty", "l2"),
        ("weight", -1e-6),
        ("weight", float("nan")),
        ("weight", float("inf")),
        ("weight", "big"),
        ("every", 0),
        ("power_iterations", 0),
        ("seed", -1),
        ("schedule", "linear"),
        ("include", "*"),
        ("gamma", 1),
    ],
)
def test_orthogonality_errors_name_the_field(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        OrthogonalityConfig.from_dict({key: value})


@pytest.mark.parametrize("config_class", [SSLResNetConfig, SSLViTConfig])
def test_nested_objects_survive_the_file(config_class: type, tmp_path) -> None:
    settings = OrthogonalityConfig(penalty="srip", weight=1e-4)
    config = config_class(orthogonality=settings, pretraining=PRETRAINING)
    config.save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        assert loaded.orthogonality == settings
        assert loaded.pretraining == PRETRAINING
        assert loaded.to_diff_dict() == config.to_diff_dict()
    assert config_class(**config.to_dict()).to_dict() == config.to_dict()


def test_a_dict_of_orthogonality_is_converted_always() -> None:
    config = SSLResNetConfig(orthogonality={"penalty": "dso"})
    assert config.orthogonality == OrthogonalityConfig(penalty="dso")
    config.orthogonality = {"weight": 2}
    assert config.orthogonality == OrthogonalityConfig(weight=2)
    with pytest.raises(ValueError, match="gamma"):
        config.orthogonality = {"gamma": 1}


@pytest.mark.parametrize(
    ("config", "hidden_size"),
    [
        ({"architecture": "resnet18"}, 512),
        ({"architecture": "resnet50"}, 2048),
        ({"architecture": "resnet50", "channels": [8, 16, 32, 64]}, 256),
        ({"architecture": "wide_resnet28_2"}, 128),
        ({"architecture": "resnet18", "model_args": {"global_pool": "catavgmax"}}, 1024),
    ],
)
def test_hidden_size_of_resnets(config: dict, hidden_size: int) -> None:
    assert SSLResNetConfig(**config).hidden_size == hidden_size


def test_vit_values_come_from_the_architecture() -> None:
    config = SSLViTConfig(architecture="vit_tiny")
    assert (config.hidden_size, config.image_size, config.patch_size, config.pooling) == (192, 224, 16, "token")
    assert SSLViTConfig(architecture="vit_tiny_patch16_384").image_size == 384
    assert SSLViTConfig(architecture="vit_base_patch16_gap_224").pooling == "avg"


def test_a_config_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    SSLViTConfig(architecture="vit_small", image_size=64, patch_size=8, model_args={"drop_path_rate": 0.1})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"imagesize": 64}, "'imagesize', did you mean 'image_size'"),
        ({"architecture": "resnet81"}, "did you mean 'resnet18'"),
        ({"architecture": "resnet18.a1_in1k"}, "architecture"),
        ({"architecture": "vit_tiny_patch16_224"}, "VisionTransformer"),
        ({"architecture": "resnetv2_50"}, "ResNetV2"),
        ({"channels": [8, 16]}, "channels"),
        ({"channels": [0, 8, 16, 32]}, "channels"),
        ({"image_size": 0}, "image_size"),
        ({"num_channels": 0}, "num_channels"),
        ({"hidden_size": 3}, "hidden_size"),
        ({"model_args": {"foo": 1}}, "foo"),
        ({"model_args": {"num_classes": 1}}, "num_classes"),
        ({"model_args": {"act_layer": torch.nn.ReLU}}, "JSON"),
        ({"architecture": "wide_resnet28_2", "stem": "standard"}, "stem"),
    ],
)
def test_resnet_errors_name_the_field(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SSLResNetConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"image_size": 33, "patch_size": 16}, "image_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"architecture": "vit_base_patch16_siglip_224"}, "pooling"),
        ({"model_args": {"img_size": 32}}, "img_size"),
    ],
)
def test_vit_errors_name_the_field(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SSLViTConfig(**arguments)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(StrictDataclassError, match="stem"):
        SSLResNetConfig(stem="tiny")
    with pytest.raises(StrictDataclassError, match="image_size"):
        SSLResNetConfig(image_size="32")


def test_a_saved_config_of_a_newer_version_loads() -> None:
    values = SSLResNetConfig().to_dict() | {"key_of_the_future": 1}
    assert SSLResNetConfig.from_dict(values).key_of_the_future == 1


def test_transformers_own_keys_are_taken() -> None:
    config = SSLResNetConfig(num_labels=7, out_features=["stage1", "stage4"], output_hidden_states=True)
    assert config.num_labels == 7
    assert config.out_indices == [1, 4]


@pytest.mark.parametrize("model_type", ["ssl_resnet", "ssl_vit"])
def test_architectures_start_with_our_own(model_type: str) -> None:
    assert list_architectures(model_type)[0] in ("wide_resnet28_2", "vit_tiny")
