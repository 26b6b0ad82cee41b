"""Everybody's own client, in a fresh process, against the Hub of these tests: what was pushed loads unchanged."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import AutoImageProcessor, AutoModel

from hf_ssl_or.recipe import recipe_from_dict
from hf_ssl_or.run import pretrain
from tests.hub.conftest import RECIPE, TOKEN
from tests.hub.hub_server import HubServer

REPOSITORY = Path(__file__).resolve().parents[2]
ENCODER = {"name": "resnet18", "channels": [8, 8, 8, 16], "model_args": {"layers": [1, 1, 1, 1]}}

STRANGER = """
    import sys
    sys.modules["hf_ssl_or"] = None  # not installed here
    import numpy as np, timm, torch
    from huggingface_hub import ModelCard, snapshot_download
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

    torch.set_num_threads(1)
    trust, found = {"trust_remote_code": True}, {}
    image = Image.open("image.png")
    for revision in ("main", "v2"):
        processor = AutoImageProcessor.from_pretrained("ada/net", revision=revision, **trust)
        pixels = processor(image, return_tensors="pt").pixel_values
        with torch.no_grad():
            model = AutoModel.from_pretrained("ada/net", revision=revision, **trust)
            found[revision] = model(pixels).pooler_output
    classifier = AutoModelForImageClassification.from_pretrained("ada/net", num_labels=3, **trust)
    assert len(classifier.config.id2label) == 3
    extract = pipeline("image-feature-extraction", "ada/net", pool=True, **trust)
    found["pipeline"] = torch.tensor(extract(image))
    net = timm.create_model("hf-hub:ada/net", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    with torch.no_grad():
        found["timm"] = net(pixels)
        found["timm pixels"] = transform(image)[None]
    found["pixels"] = pixels
    folder = snapshot_download("ada/net", local_dir="snapshot")
    found["snapshot"] = AutoModel.from_pretrained(folder, **trust)(pixels).pooler_output
    assert ModelCard.load("ada/net").data.library_name == "transformers"
    np.savez("found.npz", **{name: value.detach().numpy() for name, value in found.items()})
"""

FRIEND = """
    import json, sys
    sys.path.insert(0, REPOSITORY)
    import torch
    from hf_ssl_or.cli import main

    torch.set_num_threads(1)
    assert main(["train", "continue.yaml", "--output", "run"]) == 0
    options = ["--dataset", "lab/birds", "--protocols", "knn", "data.image_size=32"]
    assert main(["evaluate", "ada/net@v2", *options, "--output", "evaluated.json"]) == 0
    assert main(["evaluate", "ada/net@v3", *options]) == 2
    assert main(["train", "continue.yaml", "encoder.init_from=ada/net@v3", "--output", "other"]) == 2
"""


@pytest.fixture(scope="module")
def portable_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoder timm can build too."""
    folder = tmp_path_factory.mktemp("runs") / "portable"
    pretrain(recipe_from_dict({**RECIPE, "encoder": ENCODER}), folder)
    return folder


def small_dataset() -> bytes:
    """A parquet file of labeled images, as datasets writes it."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(24):
        buffer = io.BytesIO()
        Pictures.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    columns = {"image": pictures, "label": [i % 3 for i in range(24)]}
    file = io.BytesIO()
    Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(file)
    return file.getvalue()


def test_everybody_loads_what_was_pushed(
    hub: HubServer,
    portable_run: Path,
    tmp_path: Path,
    fresh_process: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    push = [sys.executable, "-m", "hf_ssl_or", "push", str(portable_run), "ada/net"]
    done = fresh_process(*push, PYTHONPATH=str(REPOSITORY))
    assert "pushed 14 files" in done.stdout and TOKEN not in done.stdout + done.stderr
    repository = hub.repository("ada/net")
    assert len(repository.history()) == 2 and "pretrained_cfg" in json.loads(repository.files["config.json"])
    repository.refs["v2"] = repository.refs["main"]

    elsewhere = tmp_path / "elsewhere"
    pixels = np.random.default_rng(1).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    Pictures.fromarray(pixels).save(elsewhere / "image.png")
    fresh_process(code=STRANGER, HF_TOKEN="")
    check_features(portable_run / "encoder", elsewhere)

    parquet = small_dataset()
    hub.put("lab/birds", {f"data/{split}.parquet": parquet for split in ("train", "test")}, kind="dataset")
    encoder = {**ENCODER, "init_from": "ada/net@v2"}
    recipe = {**RECIPE, "encoder": encoder, "data": {"dataset": "lab/birds"}}
    recipe["training"] = {**RECIPE["training"], "max_steps": 1, "optimizer": {"lr": 1e-9}}
    (elsewhere / "continue.yaml").write_text(yaml.safe_dump({**recipe, "orthogonality": {"penalty": "none"}}))
    done = fresh_process(code=f"REPOSITORY = {str(REPOSITORY)!r}\n" + FRIEND.replace("\n    ", "\n"))
    assert "has no revision 'v3'" in done.stderr and done.stderr.count("hf-ssl-or: error:") == 2, done.stderr
    assert json.loads((elsewhere / "evaluated.json").read_text())["encoder"] == "ada/net@v2"
    check_continued(portable_run / "encoder", elsewhere / "run" / "encoder")


@torch.no_grad()
def check_features(encoder: Path, elsewhere: Path) -> None:
    found = {name: torch.from_numpy(value) for name, value in np.load(elsewhere / "found.npz").items()}
    image = Pictures.open(elsewhere / "image.png")
    pixels = AutoImageProcessor.from_pretrained(encoder)(image, return_tensors="pt").pixel_values
    expected = AutoModel.from_pretrained(encoder)(pixels).pooler_output
    assert torch.equal(found["pixels"], pixels)
    for name in ("main", "v2", "snapshot", "pipeline", "timm"):
        torch.testing.assert_close(found[name].reshape(expected.shape), expected, rtol=0, atol=1e-5)
    assert (found["timm pixels"] - pixels).abs().max() < 1.1 / 255 / 0.2  # timm rounds after resizing


def check_continued(before: Path, after: Path) -> None:
    """At a tiny learning rate the weights stay those that the run started from; statistics of BatchNorm move."""
    weights, start = AutoModel.from_pretrained(after).state_dict(), AutoModel.from_pretrained(before).state_dict()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name in (name for name in start if not name.endswith(statistics)):
        torch.testing.assert_close(weights[name], start[name], rtol=0, atol=1e-6)
    assert any(not weights[name].equal(start[name]) for name in start)
