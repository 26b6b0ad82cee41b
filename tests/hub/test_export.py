"""What is exported loads in the other library with the same numbers, or is refused in one line and leaves nothing."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export import TARGETS, export
from hf_ssl_or.hub.export.model import Lines, read_portable
from hf_ssl_or.hub.export.timm import add_timm_files
from hf_ssl_or.hub.verify import compare
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from tests.hub.hub_server import HubServer

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
LABELS = ["cat", "dog", "newt"]
SLIM = {"channels": [8, 16, 32, 64], "image_size": 32, "layers": [1, 1, 1, 1]}
VIT = {"image_size": 32, "patch_size": 8, "depth": 2}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)


def save(
    folder: Path, name: str, *, head: bool = False, shards: str = "1GB", pixels: dict | None = None, **options
) -> torch.nn.Module:
    """Saves an encoder, or a classifier, whose norms have seen data."""
    torch.manual_seed(0)
    model: torch.nn.Module = create_encoder(name, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1)
    config = model.config
    if head:
        config.update({"id2label": dict(enumerate(LABELS)), "label2id": {name: k for k, name in enumerate(LABELS)}})
        classifier = AutoModelForImageClassification.from_config(config)
        classifier.encoder.load_state_dict(model.state_dict())
        model = classifier
    model.save_pretrained(folder, max_shard_size=shards)
    settings = pixels or {"mean": MEAN, "std": STD, "crop_pct": 0.8, "interpolation": "bicubic"}
    build_image_processor(Preprocessing(image_size=config.image_size, **settings)).save_pretrained(folder)
    return model.eval()


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8))


def pixels(folder: Path) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="pt").pixel_values


# ---------------------------------------------------------------------------------------------------------------------
# Each layout, loaded here once more by the library alone


@torch.no_grad()
def test_timm_with_a_head(tmp_path: Path):
    """timm builds net, transform and label names; transformers' wrapper of timm and its pipeline read the same."""
    model = save(tmp_path / "net", "vit_tiny", head=True, pooling="avg", **VIT)
    exported = export(tmp_path / "net", "timm", tmp_path / "out")
    assert exported.differences.keys() == {"timm", "transformers"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    net, x = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), pixels(tmp_path / "net")
    assert torch.equal(net(x), model(x).logits)
    assert net.pretrained_cfg["label_names"] == LABELS and net.num_classes == 3
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    assert torch.equal(transform(picture())[None], x)  # resized and cropped, as by our image processor
    found = pipeline("image-classification", model=str(tmp_path / "out"))(picture())
    assert {entry["label"] for entry in found} == set(LABELS)
    assert found[0]["score"] == pytest.approx(float(model(x).logits.softmax(1).max()), abs=1e-6)
    headless = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    assert torch.equal(headless(x), model.encoder(x).pooler_output)


@torch.no_grad()
def test_stock_resnet_is_slim_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = save(tmp_path / "net", "resnet18", **SLIM)
    assert main(["export", str(tmp_path / "net"), "--to", "transformers", "--output", str(tmp_path / "out")]) == 0
    assert "checked with transformers, largest difference: features" in capsys.readouterr().out
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded).__name__ == "ResNetModel" and not any(info.values())
    x = pixels(tmp_path / "net")
    torch.testing.assert_close(loaded.eval()(x).pooler_output.flatten(1), model(x).pooler_output)
    assert torch.equal(pixels(tmp_path / "out"), x)


@torch.no_grad()
def test_stock_vit_with_a_head(tmp_path: Path):
    model = save(tmp_path / "net", "vit_tiny", head=True, **VIT)
    export(tmp_path / "net", "transformers", tmp_path / "out")
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded).__name__ == "ViTForImageClassification" and not any(info.values())
    assert list(loaded.config.id2label.values()) == LABELS
    x = pixels(tmp_path / "net")
    torch.testing.assert_close(loaded.eval()(x).logits, model(x).logits)
    on_disk = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "vit.encoder.layer.1.attention.attention.query.weight" in on_disk  # a name that older versions read too


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("vit_tiny", True, VIT),
        ("resnet18", True, {"stem": "small", "layers": [1, 1, 1, 1]}),
        ("resnext50_32x4d", False, {"image_size": 32, "layers": [1, 1, 1, 1]}),
    ],
)
@torch.no_grad()
def test_torchvision_by_the_lines_of_the_readme(name: str, head: bool, options: dict, tmp_path: Path):
    model = save(tmp_path / "net", name, head=head, **options)
    exported = export(tmp_path / "net", "torchvision", tmp_path / "out")
    assert exported.differences["torchvision"]["features"] <= 1e-5
    readme = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1].replace('"out', f'"{tmp_path}/out')
    picture().save(tmp_path / "photo.png")
    names: dict = {}
    exec(code.replace("photo.jpg", str(tmp_path / "photo.png")), names)
    x = pixels(tmp_path / "net")
    torch.testing.assert_close(names["features"].clone(), model.base_model(x).pooler_output, rtol=1e-4, atol=1e-5)
    if head:
        torch.testing.assert_close(names["logits"].clone(), model(x).logits, rtol=1e-4, atol=1e-5)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert list(config["id2label"].values()) == LABELS and config["preprocessing"]["mean"] == MEAN


def test_onnx_of_what_no_other_library_has(tmp_path: Path):
    save(tmp_path / "net", "wide_resnet28_2", head=True, channels=[8, 16, 24], layers=[1, 1, 1])
    exported = export(tmp_path / "net", "onnx", tmp_path / "out")
    assert exported.differences["ONNX Runtime"].keys() == {"features", "logits", "pixels"}
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"pixel_values": ["batch", 3, 32, 32], "features": ["batch", 24], "logits": ["batch", 3]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.onnx"}


@torch.no_grad()
def test_other_images_bring_their_conversion(tmp_path: Path):
    """Six channels of floats: no transform of timm's takes them, so the folder has the file that does."""
    pixels = {"num_channels": 6, "eight_bit": False, "value_range": [-1, 3], "mean": [0.4] * 6, "std": [0.2] * 6}
    model = save(tmp_path / "net", "resnet18", num_channels=6, pixels=pixels, **SLIM)
    exported = export(tmp_path / "net", "timm", tmp_path / "out")
    assert all(found["pixels"] <= 1e-6 for found in exported.differences.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "image_conversion.py"}
    net, x = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), torch.randn(2, 6, 32, 32)
    assert torch.equal(net(x), model(x).pooler_output) and net.pretrained_cfg["input_size"] == (6, 32, 32)
    assert add_timm_files(tmp_path / "net") is None  # and the folder of the encoder, which has it anyway


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be expressed, and what goes wrong


@pytest.mark.parametrize(
    ("name", "options", "targets", "reason"),
    [
        ("resnet18", {"stem": "small", **SLIM}, ["timm", "transformers"], "stem"),
        ("resnet18", SLIM, ["torchvision"], "64, 128, 256, 512 wide, not 8, 16, 32, 64"),
        ("wide_resnet28_2", {"channels": [8, 8, 8]}, ["timm", "transformers", "torchvision"], "stem|wide_resnet28_2"),
        ("resnet18d", SLIM, ["transformers", "torchvision"], "has no conv1.0.weight"),
        ("seresnet18", SLIM, ["transformers", "torchvision"], "has no layer1.0.se"),
        ("resnext50_32x4d", SLIM | {"channels": None}, ["transformers"], "weights, this one has"),
        ("vit_tiny", {**VIT, "pooling": "avg"}, ["transformers", "torchvision"], "average pooling|class token"),
        ("vit_tiny", {**VIT, "reg_tokens": 2}, ["transformers", "torchvision"], "has no reg_token"),
        ("vit_tiny", {**VIT, "init_values": 0.1}, ["transformers", "torchvision"], "has no blocks.0.ls1.gamma"),
    ],
)
def test_what_a_library_cannot_express_is_said_at_once(
    name: str, options: dict, targets: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    save(tmp_path / "net", name, **options)
    for target in targets:
        argv = ["export", str(tmp_path / "net"), "--to", target, "--output", str(tmp_path / "out")]
        capsys.readouterr()
        assert main(argv) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-ssl-or: error: ")]
        assert len(said) == 1 and re.search(reason, said[0]) and "trust_remote_code=True" in said[0], said
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_other_features_leave_nothing(tmp_path: Path):
    """An activation is no weight: only the numbers tell that the exported net is another one."""
    save(tmp_path / "net", "resnet18", act_layer="gelu", **SLIM)
    with pytest.raises(InputError, match=r"net: transformers cannot express it: its features differ by \d"):
        export(tmp_path / "net", "transformers", tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def test_the_check_runs_where_this_package_is_not(tmp_path: Path):
    save(tmp_path, "resnet18", **SLIM)
    lines = Lines("a friend", "", ("import hf_ssl_or.models",), "", "", "")
    with pytest.raises(InputError, match="a friend cannot load it in a fresh process: ModuleNotFoundError"):
        compare(read_portable(tmp_path), tmp_path, [lines])


@pytest.mark.parametrize("target", TARGETS)
def test_an_output_that_holds_something_is_left_alone(target: str, tmp_path: Path):
    save(tmp_path / "net", "resnet18", **SLIM)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="out: is not empty"):
        export(tmp_path / "net", target, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    assert importlib.import_module(f"hf_ssl_or.hub.export.{target}").write


def test_bad_sources(tmp_path: Path):
    with pytest.raises(InputError, match="did you mean 'timm'"):
        export(tmp_path, "tim")
    with pytest.raises(InputError, match="there is no config.json"):
        export(tmp_path, "timm")
    with pytest.raises(InputError, match="nobody/nothing: cannot be loaded"):
        export("nobody/nothing", "timm")
    AutoModel.from_config(timm_free_vit()).save_pretrained(tmp_path)
    build_image_processor(Preprocessing(image_size=32, mean=MEAN, std=STD)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a ViTModel; only encoders of this package"):
        export(tmp_path, "timm")


def timm_free_vit():
    from transformers import ViTConfig

    return ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)


# ---------------------------------------------------------------------------------------------------------------------
# One folder for all


@torch.no_grad()
def test_one_folder_serves_this_package_and_timm(tmp_path: Path):
    """Sharded weights become one file; what is loaded and saved again is of our layout; once more changes nothing."""
    model = save(tmp_path, "vit_tiny", head=True, shards="2MB", **VIT)
    assert add_timm_files(tmp_path) is None
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    x = pixels(tmp_path)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x).logits)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(ours(x).logits, model(x).logits) and ours.config.id2label == dict(enumerate(LABELS))
    encoder = create_encoder("vit_tiny", init_from=tmp_path).eval()
    assert torch.equal(encoder(x).pooler_output, model.encoder(x).pooler_output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert add_timm_files(tmp_path) is None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_small_stem_stays_ours(tmp_path: Path):
    save(tmp_path, "resnet18", stem="small", **SLIM)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "small stem" in add_timm_files(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_repository_serves_all(hub: HubServer, fresh_process: Callable, tmp_path: Path):
    """From `main`: timm, our code by trust, a backbone by its Hub id, and transformers' wrapper of timm by no code."""
    model = save(tmp_path / "net", "resnet18", **SLIM)
    add_timm_files(tmp_path / "net")
    hub.put("ada/net", {path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()})
    fresh_process(
        code="""
        import sys
        sys.modules["hf_ssl_or"] = None
        import numpy as np, timm, torch
        from transformers import AutoBackbone, AutoImageProcessor, AutoModel, TimmWrapperModel

        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        trust = {"trust_remote_code": True}
        with torch.no_grad():
            found = {
                "timm": timm.create_model("hf-hub:ada/net", pretrained=True).eval()(x),
                "ours": AutoModel.from_pretrained("ada/net", **trust)(x).pooler_output,
                "wrapper": TimmWrapperModel.from_pretrained("ada/net")(x).pooler_output,
                "map": AutoBackbone.from_pretrained("ada/net", out_indices=[2, 4], **trust)(x).feature_maps[-1],
            }
        assert type(AutoImageProcessor.from_pretrained("ada/net", **trust)).__name__ == "SSLImageProcessor"
        np.savez("found.npz", **{name: value.numpy() for name, value in found.items()})
        """
    )
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(x)
    with np.load(tmp_path / "elsewhere" / "found.npz") as found:
        for name in ("timm", "ours", "wrapper"):
            np.testing.assert_allclose(found[name], output.pooler_output.numpy(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["map"], output.last_hidden_state.numpy(), rtol=0, atol=1e-6)
