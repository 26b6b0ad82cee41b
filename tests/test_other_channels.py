"""Runs on images that are not RGB of 8 bits: from files to an encoder that AutoModel loads, with the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_ssl_or.cli import main
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.encoder_loading import load_encoder
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.evaluation.labeled import load_labeled
from hf_ssl_or.methods import available_methods, get_method
from hf_ssl_or.recipe import Recipe, load_recipe, recipe_from_dict
from hf_ssl_or.run import load_training_images, view_specs

CLASSES = ("dark", "light")


def pixels(rng: np.random.Generator, number: int, label: int, channels: int) -> np.ndarray:
    """A photon count of one kind or another: another size for each image, values of up to about 3000."""
    height, width = 20 + number % 3, 22 + number % 5
    counts = rng.poisson(200 + 900 * label, size=(height, width, channels)) + 400 * rng.random((1, 1, channels))
    return counts.astype(np.uint16)


def write_images(folder: Path, channels: int, each: int = 16) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            image = pixels(rng, i, label, channels)
            if channels == 1:
                Image.fromarray(image[..., 0]).save(folder / name / f"{i:02}.png")
            else:
                np.save(folder / name / f"{i:02}.npy", image)
    return folder


def tree(folder: Path, channels: int, **views: Any) -> dict[str, Any]:
    return {
        "data": {"dataset": str(folder), "image_size": 16, "holdout": 0.25, "num_workers": 1, "crop_pct": 0.9},
        "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8], "num_channels": channels},
        "method": {"name": "barlow_twins", "projector_dim": 16, "projector_hidden": 16},
        "views": views,
        "evaluation": {"protocols": ["linear-lbfgs"]},
        "training": {"batch_size": 16, "max_steps": 2, "log_every": 1, "monitor_images": 16, "device": "cpu"},
    }


def write_recipe(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(("channels", "name"), [(1, "16-bit PNG"), (6, "npy")])
def test_a_run_from_files_to_a_loaded_encoder(channels: int, name: str, tmp_path: Path) -> None:
    folder, run = write_images(tmp_path / "pictures", channels), tmp_path / "run"
    assert main(["train", write_recipe(tmp_path / "r.yaml", tree(folder, channels)), "--output", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    kept = results["data"]["preprocessing"]
    assert not kept["eight_bit"] and kept["num_channels"] == len(kept["mean"]) == channels
    assert 0 <= kept["value_range"][0] < 400 and 1000 < kept["value_range"][1] < 2000
    (entry,) = results["evaluations"]
    assert entry["data"]["train"]["size"] == 24 and entry["data"]["test"]["size"] == 8
    assert (run / "figures" / "views.png").exists() and (run / "neighbors.npz").exists()

    model, processor = (kind.from_pretrained(run / "encoder") for kind in (AutoModel, AutoImageProcessor))
    assert model.config.preprocessing == kept
    recipe = load_recipe(run / "recipe.yaml")
    images = load_training_images(recipe)
    expected = extract_features(model.eval(), images, device="cpu", progress=False)
    files = sorted(folder.rglob("*.png" if channels == 1 else "*.npy"))
    with torch.no_grad():
        x_BCHW = processor([str(file) for file in files], return_tensors="pt").pixel_values
        (clean_BCHW,) = images.clean([np.arange(len(images))])
        torch.testing.assert_close(x_BCHW, clean_BCHW, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(x_BCHW).pooler_output, expected)

    # What would be pushed is loaded in a process without this package, and proven on files of the set's kind.
    assert main(["push", str(run), "ada/other", "--dry-run", "--license", "apache-2.0"]) == 0
    assert main(["evaluate", str(run), "--output", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["evaluations"] == results["evaluations"]
    data, like = load_encoder(str(run)).prepare(recipe.data)
    train, _ = load_labeled(data, like=like)
    assert train.preprocessing.to_dict() == kept


def specs(name: str, channels: int, **views: Any) -> Recipe:
    return recipe_from_dict(tree(Path("pictures"), channels, **views) | {"method": {"name": name}})


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_explicit_views_that_need_color_are_refused_by_name(channels: int, tmp_path: Path, capsys) -> None:
    gray = {"saturation": 0, "hue": 0, "grayscale": 0}
    with pytest.raises(InputError, match=rf"^views.specs: hue need RGB images, not {channels} channel"):
        view_specs(specs("simclr", channels, specs=[gray | {"hue": 0.1}]))
    with pytest.raises(InputError, match="^views.specs: saturation, hue, grayscale need RGB images"):
        view_specs(specs("simclr", channels, specs=[gray, {}]))
    asked = {"local_count": 2, "local_specs": [gray | {"size": 8, "grayscale": 0.5}]}
    with pytest.raises(InputError, match="^views.*: grayscale need RGB images"):
        view_specs(specs("dino", channels, **asked))
    views, _ = view_specs(specs("simclr", channels, specs=[gray | {"channel_brightness": 0.4, "noise": 0.5}]))
    assert [view.channel_brightness for view in views] == [0.4, 0.4]

    path = write_recipe(tmp_path / "r.yaml", tree(write_images(tmp_path / "pictures", channels), channels, specs=[{}]))
    assert main(["train", path, "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf-ssl-or: error: views.specs: saturation, hue")


@pytest.mark.parametrize("name", available_methods())
def test_default_views_lose_color_alone(name: str) -> None:
    own = get_method(name).views
    colored, plain = (view_specs(specs(name, channels))[0] for channels in (3, 6))
    assert colored == [own[i % len(own)] for i in range(len(colored))]
    for before, after in zip(colored, plain, strict=True):
        assert after.saturation == after.hue == after.grayscale == 0
        left = [name for name in vars(before) if name not in ("saturation", "hue", "grayscale")]
        assert [getattr(before, name) for name in left] == [getattr(after, name) for name in left]


def test_files_of_other_channels_are_named(tmp_path: Path, capsys) -> None:
    path = write_recipe(tmp_path / "r.yaml", tree(write_images(tmp_path / "pictures", 6), 5))
    assert main(["train", path, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "00.npy: an array of shape (20, 22, 6), not of 5 channels" in error
