"""What transformers expects of every model: the checks of its own model tests, on ours."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import ModelOutput

from hf_ssl_or.models import (
    SSLResNetConfig,
    SSLResNetForImageClassification,
    SSLResNetModel,
    SSLTimmBackbone,
    SSLViTConfig,
    SSLViTForImageClassification,
    SSLViTModel,
)
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from tests.models.conftest import CONFIGS

AUTO = [AutoModel, AutoModelForImageClassification, AutoBackbone]
HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture(params=AUTO, ids=["model", "classifier", "backbone"])
def model(request: pytest.FixtureRequest, make_config):
    torch.manual_seed(0)
    return request.param.from_config(make_config(num_labels=3)).eval()


def flat(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in flat(part)]


def test_saved_and_loaded_whole(model, images_BCHW: torch.Tensor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for before, after in zip(flat(model(images_BCHW).to_tuple()), flat(loaded(images_BCHW).to_tuple()), strict=True):
        assert torch.equal(before, after)
    assert not loaded.training
    assert loaded.config.to_dict() | {"_name_or_path": ""} == AutoConfig.from_pretrained(tmp_path).to_dict() | {
        "_name_or_path": ""
    }


def test_only_the_head_is_missing_or_left_over(make_config, tmp_path) -> None:
    AutoModel.from_config(make_config()).save_pretrained(tmp_path / "base")
    _, info = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == HEAD and not info["unexpected_keys"] and not info["mismatched_keys"]
    AutoModelForImageClassification.from_config(make_config(num_labels=3)).save_pretrained(tmp_path / "head")
    _, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["unexpected_keys"] == HEAD and not info["missing_keys"]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_weights_by_timms_names(name: str, images_BCHW: torch.Tensor, tmp_path) -> None:
    """Every class reads them, without and with a head; what is saved again has our names."""
    config = CONFIGS[name](num_labels=3)
    model = AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = "fc." if name == "resnet" else "head."
    renamed = {
        key.removeprefix("encoder.timm_model.").replace("classifier.", head): value for key, value in weights.items()
    }
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(images_BCHW).logits, model(images_BCHW).logits)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == HEAD
    assert torch.equal(encoder(images_BCHW).pooler_output, model.encoder(images_BCHW).pooler_output)
    backbone_class = AutoBackbone._model_mapping[type(config)]
    _, info = backbone_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
    save_file({key: renamed[key] for key in renamed if not key.startswith(head)}, tmp_path / "model.safetensors")
    _, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == HEAD and not info["unexpected_keys"]


def test_what_a_published_configuration_says_to_timm_is_dropped(tmp_path) -> None:
    config = SSLViTConfig(architecture="vit_tiny", image_size=32, patch_size=8, model_args={"depth": 2})
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    said = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"depth": 2, "img_size": 32, "patch_size": 8, "global_pool": "token", "dynamic_img_size": True},
        "pretrained_cfg": {"mean": [0.5] * 3},
        "num_classes": 0,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.model_args == {"depth": 2} and (loaded.image_size, loaded.patch_size) == (32, 8)
    assert {"pretrained_cfg", "num_classes"}.isdisjoint(loaded.to_dict())
    assert SSLViTModel(loaded).state_dict().keys() == SSLViTModel(config).state_dict().keys()


def test_a_tuple_holds_the_same(model, images_BCHW: torch.Tensor) -> None:
    output = model(images_BCHW, output_hidden_states=True)
    assert isinstance(output, ModelOutput)
    found = model(images_BCHW, output_hidden_states=True, return_dict=False)
    assert isinstance(found, tuple)
    for a, b in zip(flat(found), flat(output.to_tuple()), strict=True):
        assert torch.equal(a, b)


def test_hidden_states_by_call_and_by_configuration(model, images_BCHW: torch.Tensor) -> None:
    stages = len(model.config.stage_names)
    by_call = model(images_BCHW, output_hidden_states=True).hidden_states
    other = copy.deepcopy(model)
    other.config.output_hidden_states = True
    by_configuration = other(images_BCHW).hidden_states
    assert len(by_call) == len(by_configuration) == stages
    assert all(torch.equal(a, b) for a, b in zip(by_call, by_configuration, strict=True))
    assert model(images_BCHW, output_hidden_states=False).hidden_states is None


def test_gradients_reach_hidden_states_and_every_weight(model, images_BCHW: torch.Tensor) -> None:
    output = model(images_BCHW, output_hidden_states=True)
    output.hidden_states[0].retain_grad()
    sum(tensor.float().square().sum() for tensor in flat(output.to_tuple())).backward()
    assert output.hidden_states[0].grad.abs().sum() > 0
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    if isinstance(model, SSLTimmBackbone):  # timm's maps come before what belongs to its head
        unused = [name for name in unused if ".head." not in name]
    assert not unused


def test_an_image_does_not_depend_on_its_batch(model, images_BCHW: torch.Tensor) -> None:
    exact, images = copy.deepcopy(model).double(), images_BCHW.double()
    together = flat(exact(images).to_tuple())
    alone = [flat(exact(image[None]).to_tuple()) for image in images]
    for i, tensor in enumerate(together):
        torch.testing.assert_close(tensor, torch.cat([parts[i] for parts in alone]), rtol=1e-9, atol=1e-9)


def test_the_same_twice(model, images_BCHW: torch.Tensor) -> None:
    for a, b in zip(flat(model(images_BCHW).to_tuple()), flat(model(images_BCHW).to_tuple()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype: torch.dtype, images_BCHW: torch.Tensor, tmp_path) -> None:
    """float32 images are taken; "auto" is the type that was saved; the values are near those of float32."""
    half = copy.deepcopy(model).to(dtype)
    half.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype and loaded.config.dtype == dtype
    for a, b in zip(flat(loaded(images_BCHW).to_tuple()), flat(model(images_BCHW).to_tuple()), strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).abs().max() < 0.05 * b.abs().max() + 0.05
    assert type(model).from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_one_device_map_for_all(model, images_BCHW: torch.Tensor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(flat(loaded(images_BCHW).to_tuple())[0], flat(model(images_BCHW).to_tuple())[0])


@pytest.mark.parametrize("where", ["disk", "split", "host"])
def test_offloaded_weights_change_nothing(model, where: str, images_BCHW: torch.Tensor, tmp_path) -> None:
    expected = flat(model(images_BCHW, output_hidden_states=True).to_tuple())
    if where == "host":
        offloaded = cpu_offload(model, execution_device="cpu")
    else:
        device_map = {"": "disk"}
        if where == "split":
            memory = {"cpu": sum(p.nbytes for p in model.parameters()) // 2, "disk": 10**9}
            device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        model.save_pretrained(tmp_path)
        folder = tmp_path / "offload"
        offloaded = type(model).from_pretrained(tmp_path, device_map=device_map, offload_folder=folder)
    assert any(p.is_meta for p in offloaded.parameters())
    for a, b in zip(flat(offloaded(images_BCHW, output_hidden_states=True).to_tuple()), expected, strict=True):
        assert torch.equal(a, b)


def test_blocks_that_must_not_be_split_exist(model) -> None:
    names = {type(module).__name__ for module in model.modules()}
    blocks = {type(block).__name__ for stage in model.base_model.stages() for block in stage}
    assert blocks <= names and (blocks <= set(model._no_split_modules) or {"SSLTimmModel"} == model._no_split_modules)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 1, 2, 1])),
        ("multi_label_classification", torch.eye(3)[[0, 1, 2, 1]]),
        ("regression", torch.randn(4, 3, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_losses_by_problem_type(problem: str, labels: torch.Tensor, images_BCHW: torch.Tensor) -> None:
    config = SSLResNetConfig(stem="small", channels=[8, 16, 32, 64], num_labels=3, problem_type=problem)
    output = SSLResNetForImageClassification(config).eval()(images_BCHW, labels=labels)
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem](output.logits, labels)
    torch.testing.assert_close(output.loss, expected)


def test_labels_are_named_by_the_configuration(make_config, tmp_path) -> None:
    names = {0: "cat", 1: "dog"}
    config = make_config(id2label=names, label2id={"cat": 0, "dog": 1})
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == names and loaded.classifier.out_features == 2


def small_vit_config(**options) -> SSLViTConfig:
    return SSLViTConfig(architecture="vit_tiny", image_size=32, patch_size=8, model_args={"depth": 2}, **options)


@pytest.mark.parametrize("model_class", [SSLViTModel, SSLViTForImageClassification])
def test_attention_step_by_step_and_fused(model_class: type, images_BCHW: torch.Tensor, tmp_path) -> None:
    model_class(small_vit_config(num_labels=2)).save_pretrained(tmp_path)
    found = {}
    for implementation in ("eager", "sdpa"):
        model = model_class.from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        blocks = model.base_model.timm_model.blocks
        assert all(block.attn.fused_attn == (implementation == "sdpa") for block in blocks)
        found[implementation] = model(images_BCHW)[-1]
    torch.testing.assert_close(found["eager"], found["sdpa"])
    model.set_attn_implementation("eager")
    assert not any(block.attn.fused_attn for block in blocks)
    assert torch.equal(model(images_BCHW)[-1], found["eager"])


def test_other_attention_is_refused(tmp_path) -> None:
    model = SSLViTModel(small_vit_config())
    model.save_pretrained(tmp_path)
    for implementation in ("flash_attention_2", "flex_attention", "nonsense"):
        with pytest.raises((ValueError, ImportError)):
            SSLViTModel.from_pretrained(tmp_path, attn_implementation=implementation)
        with pytest.raises(ValueError, match="attn_implementation: eager or sdpa"):
            model.set_attn_implementation(implementation)
    resnet = SSLResNetModel(SSLResNetConfig(channels=[8, 16, 32, 64]))
    resnet.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation: eager, not 'sdpa'"):
        resnet.set_attn_implementation("sdpa")


def test_input_embeddings_of_a_vit() -> None:
    model = SSLViTForImageClassification(small_vit_config(num_labels=2))
    assert model.get_input_embeddings() is model.encoder.timm_model.patch_embed


def test_image_processor_and_model_fit(model, tmp_path) -> None:
    build_image_processor(Preprocessing(image_size=32, mean=[0.5] * 3, std=[0.25] * 3)).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)) for i in range(2)
    ]
    for image in (images, [np.asarray(image) for image in images], [torch.from_numpy(np.array(i)) for i in images]):
        inputs = processor(image, return_tensors="pt")
        assert list(inputs) == [model.main_input_name]
        assert flat(model(**inputs).to_tuple())[0].shape[0] == 2
    processor.save_pretrained(tmp_path / "again")
    assert AutoImageProcessor.from_pretrained(tmp_path / "again", config=model.config).to_dict() == processor.to_dict()
