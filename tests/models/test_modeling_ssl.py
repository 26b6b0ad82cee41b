from __future__ import annotations

import contextlib
import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from hf_ssl_or.models import (
    SSLResNetBackbone,
    SSLResNetConfig,
    SSLResNetForImageClassification,
    SSLResNetModel,
    SSLViTBackbone,
    SSLViTConfig,
    SSLViTModel,
)
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from tests.models.conftest import CONFIGS

SLIM = [8, 16, 32, 64]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize(
    ("config", "name", "arguments"),
    [
        (SSLResNetConfig(channels=SLIM), "resnet18", {"channels": SLIM}),
        (SSLResNetConfig(architecture="resnet50", channels=SLIM), "resnet50", {"channels": SLIM}),
        (SSLResNetConfig(architecture="resnet18d", channels=SLIM), "resnet18d", {"channels": SLIM}),
        (
            SSLViTConfig(architecture="vit_tiny", image_size=32, patch_size=8, model_args={"depth": 2}),
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 2},
        ),
        (
            SSLViTConfig(architecture="vit_tiny", image_size=32, patch_size=8, pooling="avg", model_args={"depth": 2}),
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 2, "global_pool": "avg"},
        ),
    ],
)
def test_is_timms_own_net(config, name: str, arguments: dict, images_BCHW: torch.Tensor) -> None:
    """One seed gives one initialization, and one set of weights one result, to the bit."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=0, **arguments).eval()
    assert same_weights(model.timm_model, reference)
    output = model(images_BCHW)
    assert torch.equal(output.pooler_output, reference(images_BCHW))
    assert torch.equal(output.last_hidden_state, reference.forward_features(images_BCHW))


def test_wide_resnet_is_the_classic_one(images_BCHW: torch.Tensor) -> None:
    model = SSLResNetForImageClassification(SSLResNetConfig(architecture="wide_resnet28_2", num_labels=10)).eval()
    assert sum(p.numel() for p in model.parameters()) == 1_467_610  # as published for WRN-28-2 with ten classes
    output = model.encoder(images_BCHW)
    assert output.last_hidden_state.shape == (4, 128, 8, 8)
    reference = timm.create_model("resnetv2_18", layers=[4, 4, 4], channels=[32, 64, 128], stem_chs=16, num_classes=0)
    reference.stem.conv = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
    reference.stem.pool = torch.nn.Identity()
    reference.load_state_dict(model.encoder.timm_model.state_dict())
    expected = reference.eval()(images_BCHW)
    torch.testing.assert_close(output.pooler_output, expected)


def test_wide_resnet_has_plain_norms() -> None:
    """Code that replaces BatchNorm by class (SyncBatchNorm and the like) must not lose an activation."""
    norms = [
        m for m in SSLResNetModel(SSLResNetConfig(architecture="wide_resnet28_2")).modules() if "Norm" in str(type(m))
    ]
    assert {type(norm) for norm in norms} == {torch.nn.BatchNorm2d}


@pytest.mark.parametrize("architecture", ["resnet18", "resnet18d", "resnet26t", "seresnet18"])
@pytest.mark.parametrize(("stem", "sizes"), [("small", [32, 32, 16, 8, 4]), ("standard", [8, 8, 4, 2, 1])])
def test_stem_sizes(architecture: str, stem: str, sizes: list[int], images_BCHW: torch.Tensor) -> None:
    if architecture not in timm.list_models():
        pytest.skip(f"this timm has no {architecture}")
    model = SSLResNetModel(SSLResNetConfig(architecture=architecture, stem=stem, channels=SLIM)).eval()
    states = model(images_BCHW[:1], output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == sizes
    assert [state.shape[1] for state in states] == model.stage_widths()


def test_output_shapes(make_config, images_BCHW: torch.Tensor) -> None:
    config = make_config()
    model = AutoModel.from_config(config).eval()
    output = model(images_BCHW, output_hidden_states=True)
    assert output.pooler_output.shape == (4, config.hidden_size)
    assert len(output.hidden_states) == len(config.stage_names)
    assert model(images_BCHW).hidden_states is None
    as_tuple = model(images_BCHW, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], output.pooler_output)
    assert torch.equal(model(images_BCHW).pooler_output, output.pooler_output)


def test_vit_takes_other_sizes(images_BCHW: torch.Tensor) -> None:
    config = SSLViTConfig(architecture="vit_tiny", image_size=32, patch_size=8, model_args={"depth": 2})
    model = SSLViTModel(config).eval()
    small = images_BCHW[..., :16, :16]
    reference = copy.deepcopy(model.timm_model)
    reference.set_input_size((16, 16))
    assert torch.equal(model(small).pooler_output, reference(small))
    with pytest.raises(ValueError, match="16x16"):
        model(small, interpolate_pos_encoding=False)
    with pytest.raises(ValueError, match="patch size 8"):
        model(images_BCHW[..., :12, :12])
    strict = model(images_BCHW, interpolate_pos_encoding=False).pooler_output
    assert torch.equal(strict, model(images_BCHW).pooler_output)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(make_config, reentrant: bool, images_BCHW: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain = AutoModel.from_config(make_config()).train()
    frugal = copy.deepcopy(plain)
    calls = []

    def context_fn():
        calls.append(1)
        return contextlib.nullcontext(), contextlib.nullcontext()

    kwargs = {"use_reentrant": True} if reentrant else {"use_reentrant": False, "context_fn": context_fn}
    frugal.activation_checkpointing_enable(kwargs)
    images = images_BCHW.clone().requires_grad_()
    for model in (plain, frugal):
        model(images).pooler_output.square().sum().backward()
    blocks = sum(len(list(stage)) for stage in plain.stages())
    assert len(calls) == (0 if reentrant else blocks)
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert same_weights(plain, frugal)  # running statistics included: they are updated once


def three_blocks() -> SSLResNetConfig:
    return SSLResNetConfig(architecture="wide_resnet28_2", channels=[8, 16, 24], model_args={"layers": [1, 1, 1]})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [three_blocks, CONFIGS["vit"]], ids=["resnet", "vit"])
def test_checkpointing_compiles_to_one_graph(config, training: bool, images_BCHW: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain = AutoModel.from_config(config()).train(training)
    frugal = copy.deepcopy(plain)
    frugal.activation_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(frugal, fullgraph=True, backend="aot_eager")
    for model in (plain, compiled):
        model(images_BCHW).pooler_output.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert same_weights(plain, frugal)  # running statistics included: they are updated once


def test_a_compiled_graph_that_breaks_in_a_block_is_checkpointed_all_the_same(images_BCHW: torch.Tensor) -> None:
    plain = SSLResNetModel(three_blocks()).train()
    plain.timm_model.stages[1].blocks[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    frugal = copy.deepcopy(plain)
    frugal.activation_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    for model in (plain, torch.compile(frugal, backend="aot_eager")):
        model(images_BCHW).pooler_output.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert same_weights(plain, frugal)


def test_checkpointing_by_the_older_name(images_BCHW: torch.Tensor) -> None:
    model = SSLResNetForImageClassification(SSLResNetConfig(channels=SLIM))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.encoder.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.encoder.gradient_checkpointing


def test_save_and_load(make_config, images_BCHW: torch.Tensor, tmp_path) -> None:
    model = AutoModel.from_config(make_config()).eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path)
    assert same_weights(model, loaded)
    assert torch.equal(loaded(images_BCHW).pooler_output, model(images_BCHW).pooler_output)
    assert set(loaded.config.auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageClassification",
        "AutoBackbone",
    }


def test_dtype_and_device_map(make_config, images_BCHW: torch.Tensor, tmp_path) -> None:
    model = AutoModel.from_config(make_config()).eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    expected = model(images_BCHW).pooler_output
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(images_BCHW).pooler_output.dtype == torch.bfloat16
    for device_map in ("auto", "cpu"):
        loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(loaded(images_BCHW).pooler_output, expected)


def test_disk_offload(make_config, images_BCHW: torch.Tensor, tmp_path) -> None:
    model = AutoModel.from_config(make_config()).eval()
    model.save_pretrained(tmp_path / "model")
    names = [name for name, _ in model.timm_model.named_children()]
    device_map = {
        f"timm_model.{name}": "disk" if "layer" in name or name in ("stages", "blocks") else "cpu" for name in names
    }
    device_map |= {f"timm_model.{name}": "cpu" for name, _ in model.timm_model.named_parameters(recurse=False)}
    offloaded = AutoModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert any(p.is_meta for p in offloaded.parameters())
    assert torch.equal(offloaded(images_BCHW).pooler_output, model(images_BCHW).pooler_output)


def test_head_from_a_checkpoint_without_one(make_config, images_BCHW: torch.Tensor, tmp_path) -> None:
    model = AutoModel.from_config(make_config()).eval()
    model.save_pretrained(tmp_path / "base")
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=5)
    assert same_weights(model, classifier.encoder)
    weight = classifier.classifier.weight
    assert weight.shape == (5, model.config.hidden_size)
    assert 0.01 < weight.std() < 0.03
    assert not classifier.classifier.bias.any()
    output = classifier(images_BCHW, labels=torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 3]))
    )
    classifier.save_pretrained(tmp_path / "head")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "head"), model)
    with pytest.raises(RuntimeError):
        AutoModelForImageClassification.from_pretrained(tmp_path / "head", num_labels=3)
    other = AutoModelForImageClassification.from_pretrained(
        tmp_path / "head", num_labels=3, ignore_mismatched_sizes=True
    )
    assert other.classifier.weight.shape[0] == 3
    assert 0.01 < other.classifier.weight.std() < 0.03
    assert same_weights(other.encoder, model)


def test_what_is_missing_gets_timms_initialization(tmp_path) -> None:
    """A stem that does not fit the checkpoint is drawn anew; every other weight is loaded."""
    model = SSLResNetModel(SSLResNetConfig(channels=SLIM))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    model.save_pretrained(tmp_path)
    config = SSLResNetConfig(channels=SLIM, stem="small")
    loaded = SSLResNetModel.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    fan_out = 64 * 9
    assert loaded.timm_model.conv1.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    others = [p for name, p in loaded.named_parameters() if name != "timm_model.conv1.weight"]
    assert all((p == 7).all() for p in others)


def test_non_persistent_buffers_are_right(tmp_path) -> None:
    model = SSLResNetModel(SSLResNetConfig(architecture="resnetblur18", channels=SLIM))
    blurs = {name: value for name, value in model.named_buffers() if name not in model.state_dict()}
    assert blurs
    model.save_pretrained(tmp_path)
    loaded = dict(SSLResNetModel.from_pretrained(tmp_path).named_buffers())
    assert all(torch.equal(loaded[name], value) for name, value in blurs.items())


def test_meta_device_then_init_weights(make_config) -> None:
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(make_config())
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_backbone_maps(make_config, images_BCHW: torch.Tensor, tmp_path) -> None:
    config = make_config()
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    names = config.stage_names[1:]
    backbone_class = AutoBackbone._model_mapping[type(config)]
    backbone = backbone_class.from_pretrained(tmp_path, out_features=names)
    assert same_weights(backbone.encoder, model)
    output = backbone(images_BCHW)
    assert output.hidden_states is None
    assert [m.shape[1] for m in output.feature_maps] == backbone.channels
    last = model(images_BCHW).last_hidden_state
    if last.dim() == 3:
        last = last[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(output.feature_maps[-1], last)
    assert len(backbone(images_BCHW, output_hidden_states=True).hidden_states) == len(config.stage_names)
    assert len(AutoBackbone.from_config(config)(images_BCHW).feature_maps) == 1
    assert isinstance(backbone.forward_with_filtered_kwargs(images_BCHW, output_attentions=True), type(output))


def test_backbone_maps_of_resnet_by_hand(images_BCHW: torch.Tensor) -> None:
    config = SSLResNetConfig(stem="small", channels=SLIM, out_features=["stem", "stage2"])
    backbone = SSLResNetBackbone(config).eval()
    assert [tuple(m.shape[1:]) for m in backbone(images_BCHW).feature_maps] == [(64, 32, 32), (16, 16, 16)]


def test_pipelines(make_config, tmp_path) -> None:
    config = make_config(num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    build_image_processor(Preprocessing(image_size=32, mean=[0.5] * 3, std=[0.25] * 3)).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    scores = pipeline("image-classification", model=str(tmp_path))(image)
    assert len(scores) == 3
    features = pipeline("image-feature-extraction", model=str(tmp_path), pool=True)(image)
    assert np.asarray(features).shape == (1, config.hidden_size)


def test_transformers_trainer(make_config, images_BCHW: torch.Tensor, tmp_path) -> None:
    model = AutoModelForImageClassification.from_config(make_config(num_labels=2))
    data = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images_BCHW)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    before = model.classifier.weight.detach().clone()
    result = Trainer(model=model, args=arguments, train_dataset=data).train()
    assert np.isfinite(result.training_loss)
    assert not torch.equal(model.classifier.weight, before)


def test_copies_and_pickles(make_config, images_BCHW: torch.Tensor) -> None:
    model = AutoModel.from_config(make_config()).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images_BCHW).pooler_output, model(images_BCHW).pooler_output)


# ---------------------------------------------------------------------------------------------------------------------
# A vision transformer that sees some of the patches


def small_vit(**options) -> SSLViTModel:
    return create_encoder("vit_tiny", image_size=32, patch_size=8, depth=2, **options).eval()


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "pooling": "avg"}])
def test_kept_patches_are_all_that_is_seen(options, images_BCHW: torch.Tensor) -> None:
    model = small_vit(**options)
    net = model.timm_model
    kept = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(4)])
    output = model(images_BCHW, output_hidden_states=True, kept_patches=kept)
    tokens = net._pos_embed(net.patch_embed(images_BCHW))
    prefix = net.num_prefix_tokens
    x = torch.stack([torch.cat([t[:prefix], t[prefix + k]]) for t, k in zip(tokens, kept, strict=True)])
    assert torch.equal(output.hidden_states[0], x)
    x = net.norm(net.blocks(x))
    torch.testing.assert_close(output.last_hidden_state, x)
    torch.testing.assert_close(output.pooler_output, net.forward_head(x, pre_logits=True))


def test_keeping_all_patches_changes_nothing(images_BCHW: torch.Tensor) -> None:
    model = small_vit()
    every = torch.arange(16).expand(4, -1)
    assert torch.equal(model(images_BCHW, kept_patches=every).last_hidden_state, model(images_BCHW).last_hidden_state)
    shuffled = model(images_BCHW, kept_patches=every.flip(1))
    torch.testing.assert_close(shuffled.pooler_output, model(images_BCHW).pooler_output)
    wide = torch.cat([images_BCHW, images_BCHW], dim=3)  # positions are resampled, then chosen
    kept = torch.tensor([[31, 0]]).expand(4, -1)
    assert model(wide, kept_patches=kept).last_hidden_state.shape == (4, 3, 192)


def test_checkpointing_with_kept_patches_changes_nothing(images_BCHW: torch.Tensor) -> None:
    plain = small_vit().train()
    frugal = copy.deepcopy(plain)
    frugal.activation_checkpointing_enable({"use_reentrant": False})
    kept = torch.tensor([[3, 1, 12]]).expand(4, -1)
    for model in (plain, frugal):
        model(images_BCHW, kept_patches=kept).last_hidden_state.square().sum().backward()
    for p, q in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_wrong_choice_of_patches_is_refused(images_BCHW: torch.Tensor) -> None:
    kept = torch.tensor([[0, 1]]).expand(4, -1)
    for wrong in (kept[:3], kept[0]):
        with pytest.raises(ValueError, match=r"kept_patches: expected shape \(4, kept\)"):
            small_vit()(images_BCHW, kept_patches=wrong)
    with pytest.raises(ValueError, match="kept_patches: patch_drop_rate has dropped others"):
        small_vit(patch_drop_rate=0.5)(images_BCHW, kept_patches=kept)
    with pytest.raises(ValueError, match="kept_patches: resnet18 takes whole images"):
        SSLResNetModel(SSLResNetConfig(channels=SLIM))(images_BCHW, kept_patches=kept)


def test_feature_maps_want_all_patches(images_BCHW: torch.Tensor) -> None:
    model = small_vit()
    output = model(images_BCHW, output_hidden_states=True, kept_patches=torch.tensor([[0, 1]]).expand(4, -1))
    with pytest.raises(ValueError, match="all 16 patches, not 2"):
        model.feature_map(output, 2, images_BCHW.shape[-2:])
    with pytest.raises(TypeError, match="kept_patches"):
        SSLViTBackbone(model.config)(images_BCHW, kept_patches=torch.tensor([[0, 1]]).expand(4, -1))
