"""Encoders of other libraries are pushed as their own library saves them, and load by the lines of the card."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTMAEConfig, ViTMAEModel

from hf_ssl_or import SSLTrainer, SSLTrainingArguments
from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.export.timm import add_timm_files
from hf_ssl_or.hub.push import push_to_hub
from hf_ssl_or.hub.run_folder import run_at_checkpoint
from hf_ssl_or.models.adapters import adapt_encoder
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor
from hf_ssl_or.runs.results import read_results
from tests.hub.hub_server import HubServer

pytestmark = pytest.mark.usefixtures("signed_in")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 12, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()).mean((2, 3))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "transformers": lambda: Dinov2Model(Dinov2Config(intermediate_size=32, **SMALL)),
    "transformers, no pooler": lambda: ViTMAEModel(ViTMAEConfig(intermediate_size=32, **SMALL)),
    "timm": lambda: timm.create_model("test_convnext"),
    "torch": TwoLayers,
}


def trained(folder: Path, kind: str) -> SSLTrainer:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = list(np.random.default_rng(0).integers(0, 256, (64, 36, 40, 3), dtype=np.uint8))
    trainer = SSLTrainer(
        method="vicreg",
        encoder=ENCODERS[kind](),
        args=SSLTrainingArguments(output_dir=folder, max_steps=2, batch_size=32, monitor_every=0, device="cpu"),
        train_dataset=images,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def lines_of(card: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card.split("## How to use")[1].split("\n## ")[0], re.DOTALL))


@pytest.mark.parametrize(
    "kind", ["transformers", "torch", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in list(ENCODERS)[1:3])]
)
def test_what_is_pushed_loads_by_the_lines_of_the_card(
    kind: str, hub: HubServer, fresh_process: Callable, tmp_path: Path
) -> None:
    trainer = trained(tmp_path / "run", kind)
    described = read_results(tmp_path / "run" / "results.json").encoder
    assert described is not None and described.library == kind.split(",")[0]
    result = push_to_hub(tmp_path / "run", "ada/net")
    files = hub.repository("ada/net").files
    card = files["README.md"].decode()
    assert set(result.files) == set(files) and "model.safetensors" in files
    assert (
        "These were Python objects: `encoder`, `train_dataset`" in card and "it does not rebuild the run alone" in card
    )
    assert ("trust_remote_code" in card) == (kind == "torch")
    lines = lines_of(card)
    assert "hf_ssl_or" not in lines
    if kind == "torch":  # its class is not importable there
        source = inspect.getsource(TwoLayers)
        imported = f"from {__name__} import TwoLayers"
        assert imported in lines
        lines = lines.replace(imported, f"from torch import nn\n\n{source}")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.jpg")
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    (tmp_path / "photo.jpg").rename(tmp_path / "elsewhere" / "photo.jpg")
    save = "from safetensors.torch import save_file\nsave_file({'x': pixel_values, 'f': features.clone()}, 'found')"
    fresh_process(code=f"import sys\nimport torch\nsys.modules['hf_ssl_or'] = None\n{lines}\n{save}")
    found = load_file(tmp_path / "elsewhere" / "found")
    with torch.no_grad():
        expected = trainer.encoder.eval()(pixel_values=found["x"]).pooler_output
    torch.testing.assert_close(found["f"], expected, rtol=1e-5, atol=1e-6)
    pixels = trainer.images.preprocessing.tensor(tmp_path / "elsewhere" / "photo.jpg")
    torch.testing.assert_close(found["x"][0], pixels, rtol=0, atol=1e-5)


def test_other_features_stop_the_push(hub: HubServer, tmp_path: Path) -> None:
    trained(tmp_path / "run", "transformers")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    line = results["encoder"]["loading_lines"][-1]
    results["encoder"]["loading_lines"][-1] = line.replace("model(pixel_values)", "model(1.01 * pixel_values)")
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="what would be pushed gives other features"):
        push_to_hub(tmp_path / "run", "ada/net")
    assert not hub.log


@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_a_checkpoint_becomes_a_run_that_has_ended(kind: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", kind)
    with run_at_checkpoint(
        tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-2", tmp_path / "run" / "encoder"
    ) as folder:
        found = load_file(folder / "encoder" / "model.safetensors")
        assert json.loads((folder / "encoder" / "config.json").read_text())["pretraining"]["steps"] == 2
        if kind == "transformers":
            found = AutoModel.from_pretrained(folder / "encoder").state_dict()
    for name, weight in trainer.encoder.net.state_dict().items():
        assert torch.equal(found[name], weight), name


@torch.no_grad()
def test_any_net_of_timm_is_three_libraries_too(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = create_encoder("test_convnext", image_size=64).eval()
    model.save_pretrained(tmp_path)
    build_image_processor(Preprocessing(image_size=64)).save_pretrained(tmp_path)
    assert add_timm_files(tmp_path) is None
    x = torch.randn(2, 3, 64, 64)
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(net(x), model(x).pooler_output)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(x).pooler_output, model(x).pooler_output)


def test_lines_of_an_adapter_have_the_form_that_the_proof_expects() -> None:
    *_, inference, call = adapt_encoder(TwoLayers()).loading_lines("FOLDER")
    assert inference == "with torch.inference_mode():" and call.startswith("    features = ")
