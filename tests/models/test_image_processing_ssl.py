from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from transformers import AutoImageProcessor

from hf_ssl_or.models import SSLImageProcessor, SSLResNetConfig
from hf_ssl_or.models.image_processing_ssl import build_image_processor

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (40, 50), (100, 20), (8, 9)])
def test_any_image_becomes_a_normalised_square(size: tuple[int, int]) -> None:
    image = picture(*size)
    pixels = build_image_processor(32, MEAN, STD)(image, return_tensors="pt").pixel_values
    resized = tv.resize(tv.pil_to_tensor(image), [32, 32], antialias=True)
    expected = tv.normalize(resized / 255, MEAN, STD)
    torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)


def test_grey_images_become_colour() -> None:
    image = picture(20, 20).convert("L")
    assert build_image_processor(16, MEAN, STD)(image, return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


def test_one_channel() -> None:
    image = picture(20, 20).convert("L")
    assert build_image_processor(16, [0.5], [0.5])(image, return_tensors="pt").pixel_values.shape == (1, 1, 16, 16)


def test_save_and_load(tmp_path) -> None:
    processor = build_image_processor(32, MEAN, STD)
    processor.save_pretrained(tmp_path)
    SSLResNetConfig().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SSLImageProcessor
    assert (dict(loaded.size), list(loaded.image_mean)) == ({"height": 32, "width": 32}, MEAN)
    image = picture(40, 50)
    pixels = [p(image, return_tensors="pt").pixel_values for p in (processor, loaded)]
    assert torch.equal(*pixels)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, MEAN, STD), "image_size"),
        ((32, MEAN, [0.5]), "std"),
        ((32, [0.5], [0.0]), "std"),
    ],
)
def test_errors_name_the_field(arguments: tuple, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_image_processor(*arguments)
