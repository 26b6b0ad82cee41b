from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from hf_ssl_or.models import SSLResNetForImageClassification, SSLResNetModel, SSLTimmModel, SSLViTModel
from hf_ssl_or.models.auto import create_encoder, list_encoders
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig

SLIM = [8, 16, 32, 64]


def test_create_from_outside() -> None:
    encoder = create_encoder("resnet18", stem="small", image_size=32)
    assert isinstance(encoder, SSLResNetModel)
    assert (encoder.config.stem, encoder.config.image_size, encoder.config.hidden_size) == ("small", 32, 512)
    vit = create_encoder("vit_tiny", image_size=32, patch_size=8, pooling="avg", depth=1)
    assert isinstance(vit, SSLViTModel)
    assert len(vit.timm_model.blocks) == 1
    assert vit.config.model_args == {"depth": 1}


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("convnext_atto", {"image_size": 32}, SSLTimmModel),
        ("eva02_tiny_patch14_224", {"image_size": 28, "depth": 1}, SSLTimmModel),
        ("resnetv2_18", {"layers": (1, 1, 1, 1)}, SSLTimmModel),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 2, "image_size": 32}, SSLTimmModel),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 48, "num_heads": 2, "pooling": "avg"}, SSLViTModel),
    ],
)
def test_families(name: str, options: dict, family: type) -> None:
    """What the two families cannot express is built by timm as it is."""
    encoder = create_encoder(name, **options)
    assert type(encoder) is family and encoder.config.image_size == options.get("image_size", 224)


def test_a_folder_of_transformers_timm_or_ours(tmp_path, images_BCHW: torch.Tensor) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    dinov2 = Dinov2Model(Dinov2Config(**small)).eval()
    dinov2.save_pretrained(tmp_path / "dinov2")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dinov2")
    convnext = timm.create_model("convnext_atto", dims=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_classes=5).eval()
    model_config = {"model_args": {"dims": [8] * 4, "depths": [1] * 4}}
    save_for_hf(convnext, tmp_path / "timm", model_config=model_config, safe_serialization=True)
    ours = create_encoder(str(tmp_path / "timm")).eval()
    ours.save_pretrained(tmp_path / "ours")
    expected = convnext.forward_head(convnext.forward_features(images_BCHW), pre_logits=True)
    for name in ("timm", "ours"):
        encoder = create_encoder(str(tmp_path / name)).eval()
        assert isinstance(encoder, SSLTimmModel) and torch.equal(encoder(images_BCHW).pooler_output, expected)
    encoder = create_encoder(str(tmp_path / "dinov2")).eval()
    assert encoder.preprocessing["image_size"] == encoder.config.image_size == 32
    assert torch.equal(encoder(images_BCHW).pooler_output, dinov2(images_BCHW).pooler_output)
    with pytest.raises(ValueError, match="num_channels: .* takes 3, not 1"):
        create_encoder(str(tmp_path / "dinov2"), num_channels=1)
    with pytest.raises(ValueError, match="pooling: .* is a model of transformers"):
        create_encoder(str(tmp_path / "dinov2"), pooling="avg")


def test_orthogonality_is_kept() -> None:
    settings = OrthogonalityConfig(penalty="srip")
    assert create_encoder("resnet18", channels=SLIM, orthogonality=settings).config.orthogonality == settings


def test_list_encoders() -> None:
    assert {"resnet18", "resnet50", "wide_resnet28_2", "vit_small", "vit_base_patch16_224"} <= set(list_encoders())
    assert set(timm.list_models()) < set(list_encoders()) and len(set(list_encoders())) == len(list_encoders())
    assert list_encoders("wide_resnet*") == ["wide_resnet28_2", "wide_resnet50_2", "wide_resnet101_2"]
    assert list_encoders("nothing*") == []


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("resnet81", {}, "did you mean 'resnet18'"),
        ("vit_smal", {}, "did you mean 'vit_small'"),
        ("efficientnet_b0", {"stem": "small"}, "stem: efficientnet_b0 is of the family ssl_timm"),
        ("crossvit_tiny_240", {"image_size": 64}, "image_size: crossvit_tiny_240 takes no images of 64 x 64"),
        ("nobody/nothing", {}, "encoder: nobody/nothing"),
        ("nobody/nothing", {"init_from": "resnet18.a1_in1k"}, "init_from: nobody/nothing brings its own weights"),
        ("resnet18.a1_in1k", {}, "did you mean 'resnet18'"),
        ("vit_tiny", {"stem": "small"}, "stem: vit_tiny"),
        ("vit_tiny", {"channels": SLIM}, "channels: vit_tiny"),
        ("resnet18", {"patch_size": 8}, "patch_size: resnet18"),
        ("resnet18", {"pooling": "avg"}, "pooling: resnet18"),
        ("resnet18", {"depth": 3}, "depth"),
        ("resnet18", {"stem": "tiny"}, "stem"),
        ("resnet18", {"orthogonality": {"gamma": 1}}, "gamma"),
        ("resnet18", {"init_from": "/no/such/folder"}, "init_from: /no/such/folder"),
        ("resnet18", {"init_from": "nobody/nothing"}, "init_from: nobody/nothing"),
    ],
)
def test_errors_name_the_option(name: str, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_encoder(name, **options)


@pytest.fixture
def timm_folder(tmp_path):
    net = timm.create_model("resnet18", channels=SLIM).eval()
    save_for_hf(net, tmp_path, model_config={"model_args": {"channels": SLIM}}, safe_serialization=True)
    return net, tmp_path


def test_init_from_timm_folder(timm_folder, images_BCHW: torch.Tensor) -> None:
    net, folder = timm_folder
    encoder = create_encoder("resnet18", init_from=folder).eval()
    assert encoder.config.channels == SLIM
    net.reset_classifier(0)
    assert torch.equal(encoder(images_BCHW).pooler_output, net(images_BCHW))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("resnet18", {"stem": "small"}, r"conv1.weight .*\(64, 3, 7, 7\) there, \(64, 3, 3, 3\) here"),
        ("resnet18", {"channels": [8, 16, 32, 48]}, "layer4.0.conv1.weight"),
        ("resnet34", {}, "has no layer1.2"),
        ("resnet14t", {}, "has no conv1.0.weight"),
    ],
)
def test_what_does_not_fit_is_named(timm_folder, name: str, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_encoder(name, init_from=timm_folder[1], **options)


def test_only_safetensors_are_read(timm_folder) -> None:
    _, folder = timm_folder
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors"):
        create_encoder("resnet18", init_from=folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="layout"):
        create_encoder("resnet18", init_from=folder)


@pytest.mark.parametrize("shards", ["10GB", "60KB"])
def test_init_from_our_folder(shards: str, images_BCHW: torch.Tensor, tmp_path) -> None:
    """The folder's configuration holds, also of a classifier; its head stays behind."""
    config = create_encoder("resnet18", stem="small", channels=SLIM, image_size=32).config
    model = SSLResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    encoder = create_encoder("resnet18", init_from=tmp_path).eval()
    assert encoder.config.stem == "small"
    assert torch.equal(encoder(images_BCHW).pooler_output, model.encoder(images_BCHW).pooler_output)
    with pytest.raises(ValueError, match="is a resnet18, not a resnet34"):
        create_encoder("resnet34", init_from=tmp_path)


def test_positions_are_resampled_by_timm(images_BCHW: torch.Tensor, tmp_path) -> None:
    source = create_encoder("vit_tiny", image_size=32, patch_size=8, depth=1).eval()
    source.save_pretrained(tmp_path)
    same = create_encoder("vit_tiny", init_from=tmp_path).eval()
    assert torch.equal(same(images_BCHW).pooler_output, source(images_BCHW).pooler_output)
    larger = create_encoder("vit_tiny", init_from=tmp_path, image_size=64)
    expected = resample_abs_pos_embed(source.timm_model.pos_embed, [8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(larger.timm_model.pos_embed, expected)
    assert torch.equal(larger.timm_model.patch_embed.proj.weight, source.timm_model.patch_embed.proj.weight)


def test_init_from_timm_vit(images_BCHW: torch.Tensor, tmp_path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "depth": 1, "global_pool": "avg"}
    net = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    save_for_hf(net, tmp_path, model_config={"model_args": arguments}, safe_serialization=True)
    encoder = create_encoder("vit_tiny", init_from=tmp_path).eval()
    assert (encoder.config.pooling, encoder.config.patch_size, encoder.config.model_args) == ("avg", 8, {"depth": 1})
    net.reset_classifier(0)
    assert torch.equal(encoder(images_BCHW).pooler_output, net(images_BCHW))


def test_init_from_hub(images_BCHW: torch.Tensor, timm_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare timm name is looked up under timm/ on the Hub."""
    net, folder = timm_folder
    asked = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name))
        return str(folder / name)

    monkeypatch.setattr("hf_ssl_or.models.auto.hf_hub_download", download)
    encoder = create_encoder("resnet18", init_from="resnet18.a1_in1k").eval()
    create_encoder("resnet18", init_from="timm/resnet18.a1_in1k")
    assert set(asked) == {("timm/resnet18.a1_in1k", name) for name in ("config.json", "model.safetensors")}
    net.reset_classifier(0)
    assert torch.equal(encoder(images_BCHW).pooler_output, net(images_BCHW))


def test_a_missing_shard_is_named(tmp_path) -> None:
    encoder = create_encoder("resnet18", channels=SLIM)
    encoder.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        create_encoder("resnet18", init_from=tmp_path)


def test_an_unknown_weight_is_named(timm_folder) -> None:
    _, folder = timm_folder
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"extra.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="unknown extra.weight"):
        create_encoder("resnet18", init_from=folder)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "resnet18"
