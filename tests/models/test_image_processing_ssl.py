from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import get_imports

from hf_ssl_or.models import SSLImageProcessor, SSLResNetConfig, image_conversion
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.models.image_processing_ssl import build_image_processor, preprocessing_of

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def settings(**more: Any) -> Preprocessing:
    return Preprocessing(**{"image_size": 32, "mean": MEAN, "std": STD} | more)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepare(preprocessing: Preprocessing, image: Any) -> torch.Tensor:
    return build_image_processor(preprocessing)(image, return_tensors="pt").pixel_values


@pytest.mark.parametrize("size", [(32, 32), (40, 50), (100, 20), (8, 9)])
@pytest.mark.parametrize(("crop_pct", "interpolation"), [(1.0, "bilinear"), (0.875, "bicubic"), (0.7, "lanczos")])
def test_any_image_becomes_a_normalized_square(size: tuple[int, int], crop_pct: float, interpolation: str) -> None:
    image = picture(*size)
    pixels = prepare(settings(crop_pct=crop_pct, interpolation=interpolation), image)
    resize = v2.Resize(int(32 / crop_pct), v2.InterpolationMode(interpolation))
    cropped = v2.Compose([resize, v2.CenterCrop(32), v2.PILToTensor()])(image)
    expected = v2.functional.normalize(cropped / 255, MEAN, STD)
    torch.testing.assert_close(pixels[0], expected, atol=1e-6, rtol=0)


def test_gray_images_become_color() -> None:
    pixels = prepare(settings(image_size=16), picture(20, 20).convert("L"))
    assert pixels.shape == (1, 3, 16, 16)


def test_one_channel() -> None:
    preprocessing = settings(image_size=16, num_channels=1, mean=[0.5], std=[0.5])
    assert prepare(preprocessing, picture(20, 20).convert("L")).shape == (1, 1, 16, 16)


def test_other_channels_and_values() -> None:
    preprocessing = settings(num_channels=6, mean=[0.1] * 6, std=[0.5] * 6, eight_bit=False, value_range=[100, 3100])
    values = np.random.default_rng(0).uniform(0, 4000, (32, 32, 6)).astype(np.float32)
    expected = (np.clip((values - 100) / 3000, 0, 1) - 0.1) / 0.5
    torch.testing.assert_close(prepare(preprocessing, values)[0], torch.from_numpy(expected).permute(2, 0, 1))


def test_files_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="their values mean something else"):
        prepare(settings(), Image.fromarray(np.full((32, 32), 4000, dtype=np.uint16)))


def test_save_and_load(tmp_path) -> None:
    preprocessing = settings(crop_pct=0.9, interpolation="bicubic")
    processor = build_image_processor(preprocessing)
    processor.save_pretrained(tmp_path)
    SSLResNetConfig().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SSLImageProcessor
    assert (dict(loaded.crop_size), dict(loaded.size)) == ({"height": 32, "width": 32}, {"shortest_edge": 35})
    assert preprocessing_of(loaded) == preprocessing
    image = picture(40, 50)
    pixels = [p(image, return_tensors="pt").pixel_values for p in (processor, loaded)]
    assert torch.equal(*pixels)


def test_the_folder_needs_no_reader_of_special_files(tmp_path) -> None:
    """transformers refuses a folder of the Hub whose code imports, outside of a try, what is not installed."""
    build_image_processor(settings()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {
        *("image_conversion.py", "image_processing_ssl.py", "pipeline_ssl.py"),
    }
    needed = {name for path in tmp_path.glob("*.py") for name in get_imports(path)}
    assert not needed & {"pillow_heif", "pydicom", "tifffile", "imagecodecs"}
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"image_size": 0}, "image_size"),
        ({"std": [0.5]}, "std"),
        ({"num_channels": 1, "mean": [0.5], "std": [0.0]}, "std"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"value_range": [1, 1]}, "value_range"),
        ({"num_channels": image_conversion.MAX_CHANNELS + 1}, "num_channels"),
    ],
)
def test_errors_name_the_field(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_image_processor(settings(**changed))
