"""The proof of a push goes from image files of the encoder's kind to features, by the code that is pushed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.sample_files import write_samples
from hf_ssl_or.hub.verify import prove
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.image_conversion import Preprocessing, to_pixels
from hf_ssl_or.models.image_processing_ssl import build_image_processor

SIX: dict[str, Any] = {
    "num_channels": 6,
    "eight_bit": False,
    "value_range": [-1, 3],
    "mean": [0.4] * 6,
    "std": [1] * 6,
}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    options = {"image_size": 32, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "num_channels": 6}
    create_encoder("resnet18", **options).save_pretrained(tmp_path / "encoder")
    build_image_processor(Preprocessing(image_size=32, **SIX)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_six_channels_of_floats(encoder: Path, tmp_path: Path) -> None:
    pushed = shutil.copytree(encoder, tmp_path / "pushed")
    assert prove(pushed, encoder) == 0
    settings = json.loads((pushed / "preprocessor_config.json").read_text())
    (pushed / "preprocessor_config.json").write_text(json.dumps(settings | {"value_range": [-1, 2.9]}))
    with pytest.raises(InputError, match="what would be pushed gives other features"):
        prove(pushed, encoder)


def test_an_image_processor_of_other_channels(encoder: Path) -> None:
    build_image_processor(Preprocessing(image_size=32)).save_pretrained(encoder)
    with pytest.raises(InputError, match="its image processor makes 3 channels, its model takes 6; not pushed"):
        prove(encoder, encoder)


@pytest.mark.parametrize(
    ("settings", "kinds", "dtype"),
    [
        ({}, [".png", ".png", ".jpg"], "uint8"),
        ({"num_channels": 1, "mean": [0], "std": [1]}, [".png"] * 3, "uint8"),
        (
            {"num_channels": 1, "mean": [0], "std": [1], "eight_bit": False, "value_range": [0, 4095]},
            [".png"] * 3,
            "uint16",
        ),
        ({"eight_bit": False, "value_range": "dtype"}, [".npy"] * 3, "uint16"),
        (SIX, [".npy"] * 3, "float32"),
    ],
)
def test_samples_are_of_the_encoders_kind(
    settings: dict[str, Any], kinds: list[str], dtype: str, tmp_path: Path
) -> None:
    preprocessing = Preprocessing(image_size=32, **settings)
    pictures = [torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    files = write_samples(preprocessing, pictures, tmp_path)
    assert [file.suffix for file in files] == kinds
    pixels = [to_pixels(file, preprocessing.num_channels) for file in files]
    assert {array.dtype.name for array in pixels} == {dtype}
    turned = kinds[2] == ".jpg"
    assert [array.shape[:2] for array in pixels] == [(20, 24), (20, 48), (24, 40) if turned else (40, 24)]
    assert all(preprocessing.tensor(file).shape == (preprocessing.num_channels, 32, 32) for file in files)
