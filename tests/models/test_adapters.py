"""Encoders of other libraries: their own features, what they cannot do, and what loads them without this package."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from own_net import Own
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextV2Config,
    Dinov2Config,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from hf_ssl_or.models.adapters import EncoderAdapter, adapt_encoder
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig

TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES: dict[str, Any] = {"image_size": 32, "patch_size": 8}
WIDTHS: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32}
SWIN = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
VISION = {
    "dinov2": Dinov2Config(**TINY, **IMAGES),
    "dinov3_vit": DINOv3ViTConfig(**TINY, **IMAGES),
    "dinov3_convnext": DINOv3ConvNextConfig(**WIDTHS),
    "convnextv2": ConvNextV2Config(**WIDTHS),
    "swin": SWIN,
    "vit_mae": ViTMAEConfig(**TINY, **IMAGES),
    "siglip": SiglipVisionConfig(**TINY, **IMAGES),
    "clip": CLIPVisionConfig(**TINY, **IMAGES),
    "beit": BeitConfig(**TINY, **IMAGES),
}


MAKE: dict[str, Any] = {
    **{name: lambda config=config: AutoModel.from_config(copy.deepcopy(config)) for name, config in VISION.items()},
    "timm": lambda: timm.create_model("test_efficientnet", in_chans=1),
    "resnet18": torchvision.models.resnet18,
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(),
    "own": Own,
}


@pytest.fixture(params=list(MAKE))
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MAKE[request.param]()


def noise(adapter: Any, count: int = 2) -> Tensor:
    shape = (count, adapter.config.num_channels, adapter.config.image_size or 32, adapter.config.image_size or 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_features_and_the_module_are_left_as_they_were(net: nn.Module) -> None:
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    adapter = adapt_encoder(net.train())
    assert torch.equal(torch.get_rng_state(), random) and all(module.training for module in net.modules())
    assert all(torch.equal(state[name], value) for name, value in adapter.net.state_dict().items())
    features = adapter(noise(adapter)).pooler_output
    assert features.shape == (2, adapter.config.hidden_size) and features.requires_grad
    features.square().sum().backward()
    trained = {name: p for name, p in adapter.net.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None], "data parallelism waits for these"
    again = copy.deepcopy(adapter).eval()
    assert torch.equal(again(noise(adapter)).pooler_output, adapter.eval()(noise(adapter)).pooler_output)
    assert adapt_encoder(adapter) is adapter


@torch.no_grad()
def test_which_features(images_BCHW: Tensor) -> None:
    torch.manual_seed(0)
    nets = {name: MAKE[name]().eval() for name in ("dinov2", "vit_mae", "swin")}
    vit = AutoModel.from_config(ViTConfig(**TINY, **IMAGES), add_pooling_layer=False).eval()
    head = AutoModelForImageClassification.from_config(copy.deepcopy(VISION["dinov2"])).eval()
    clip = CLIPModel(CLIPConfig(vision_config=TINY | IMAGES, text_config=TINY | {"vocab_size": 99})).eval()
    own, resnet, timms = Own().eval(), torchvision.models.resnet18().eval(), timm.create_model("test_resnet").eval()
    expected = {
        "dinov2": (nets["dinov2"], nets["dinov2"](images_BCHW).pooler_output),
        "swin": (nets["swin"], nets["swin"](images_BCHW).last_hidden_state.mean(1)),
        "class token": (vit, vit(images_BCHW).last_hidden_state[:, 0]),
        "head": (head, head.dinov2(images_BCHW).pooler_output),
        "clip": (clip, clip.vision_model(images_BCHW).pooler_output),
        "own": (own, own(images_BCHW).mean((2, 3))),
        "torchvision": (resnet, resnet.avgpool(_before_pool(resnet, images_BCHW)).flatten(1)),
        "timm": (timms, timms.forward_head(timms.forward_features(images_BCHW), pre_logits=True)),
    }
    for name, (net, wanted) in expected.items():
        found = adapt_encoder(net)(images_BCHW).pooler_output
        torch.testing.assert_close(found, wanted, msg=name)
    mae = adapt_encoder(nets["vit_mae"])
    assert mae.net.config.mask_ratio == 0 and "no patches are masked" in mae.left_out[0]
    assert mae(images_BCHW, output_hidden_states=True).hidden_states[0].shape == (4, 17, 16)
    assert torch.equal(mae(images_BCHW).pooler_output, mae(images_BCHW).pooler_output)


def _before_pool(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def test_an_encoder_of_this_package_comes_back() -> None:
    encoder = create_encoder("resnet18", channels=[8, 8, 8, 8])
    assert adapt_encoder(encoder) is encoder


@pytest.mark.parametrize("name", ["dinov2", "swin", "timm", "resnet18", "own"])
def test_recomputing_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    plain = adapt_encoder(MAKE[name]()).train()
    for module in plain.modules():  # no dropped paths, which would be random
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing_enable()
    assert len(frugal.blocks()) >= 2
    ran = [0]
    for module in frugal.blocks()[0].modules():
        module.register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    frugal = copy.deepcopy(frugal)
    for adapter in (plain, frugal):
        adapter(noise(adapter, 4)).pooler_output.square().sum().backward()
    for (key, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), key
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), frugal.buffers(), strict=True))
    assert ran[0] > sum(1 for _ in frugal.blocks()[0].modules()), "its parts ran again in backward"
    assert frugal.state_dict().keys() == plain.state_dict().keys()


LOADING = """
import json, sys
sys.modules["hf_ssl_or"] = None  # not importable here
import torch
from safetensors.torch import load_file, save_file
for folder, lines in json.loads(sys.argv[1]).items():
    scope = {"pixel_values": load_file(folder + "/images.safetensors")["x"]}
    exec("\\n".join(lines), scope)
    save_file({"features": scope["features"].contiguous()}, folder + "/features.safetensors")
"""


def test_the_lines_that_load_each_of_them(tmp_path: Path) -> None:
    wanted, programs = {}, {}
    for name, make in MAKE.items():
        torch.manual_seed(0)
        adapter, folder = adapt_encoder(make()), tmp_path / name
        adapter(noise(adapter, 4))  # moves running statistics
        adapter.config.orthogonality, adapter.config.pretraining = OrthogonalityConfig(penalty="srip"), {"steps": 3}
        adapter.config.preprocessing = {"image_size": 32}
        adapter.eval().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["orthogonality"]["penalty"] == "srip" and config["pretraining"] == {"steps": 3}, name
        assert not list(folder.glob("*.py"))
        with torch.no_grad():
            wanted[name] = adapter(noise(adapter)).pooler_output
        save_file({"x": noise(adapter)}, folder / "images.safetensors")
        programs[str(folder)] = adapter.loading_lines(folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LOADING, json.dumps(programs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, features in wanted.items():
        found = load_file(tmp_path / name / "features.safetensors")["features"]
        torch.testing.assert_close(
            found, features, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


class Dropping(Own):
    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.5, training=True)


class Tokens(Own):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2)


class Squeezing(Own):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean((2, 3)).reshape(2, -1)


class Labeled(Own):
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return super().forward(images)


class Counting(Own):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)


class Named(Own):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"left": super().forward(images), "right": images}


REFUSED = {
    "gives other features of the same images: turn off dropout": Dropping,
    r"gives \(2, 6, 900\), not \(images, features\)": Tokens,
    r"gives \(2, 6\) of 2 images, but \(2, 9\) of 3": Squeezing,
    "Labeled needs images, labels; an encoder takes images alone": Labeled,
    "Counting.count is of torch.int64": Counting,
    "Named gives left, right; name one of them features": Named,
    "Sequential.0.weight is lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3)),
    "ReLU has no parameters": nn.ReLU,
    "BertModel takes input_ids, not images": lambda: AutoModel.from_config(BertConfig(**TINY, vocab_size=9)),
    "Siglip2VisionModel needs pixel_values, pixel_attention_mask": lambda: AutoModel.from_config(
        Siglip2VisionConfig(**TINY)
    ),
    "takes no images of 3 x 4 x 4": lambda: nn.Sequential(nn.Conv2d(3, 4, 7), nn.Flatten()),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_is_no_encoder_is_refused_in_a_line(message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        adapt_encoder(REFUSED[message](), image_size=4 if "4 x 4" in message else None)
    assert "\n" not in str(caught.value)


def test_a_size_that_changes_with_the_image_is_refused_when_it_comes() -> None:
    adapter = adapt_encoder(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), image_size=8)
    assert adapter.config.hidden_size == 4 * 36
    with pytest.raises(ValueError, match="gives 256 features of 3x10x10 images, not 144"):
        adapter(torch.zeros(1, 3, 10, 10))


def test_it_compiles_in_place(images_BCHW: Tensor) -> None:
    adapter = adapt_encoder(Own()).eval()
    assert isinstance(adapter, EncoderAdapter)
    plain, names = adapter(images_BCHW).pooler_output, list(adapter.state_dict())
    adapter.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(adapter(images_BCHW).pooler_output, plain) and list(adapter.state_dict()) == names
