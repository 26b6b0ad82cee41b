from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from hf_ssl_or.data import color


@pytest.fixture
def images() -> torch.Tensor:
    """Random images with the hard cases of hue: grey, black, white, saturated, and ties between channels."""
    images = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    images[0, :, :2] = torch.tensor([0.0, 0.5, 1.0, 0.25]).repeat(5)[None, None]
    images[1, :, 0] = torch.eye(3).repeat(1, 7)[:, :20]
    images[2, 1] = images[2, 0]
    images[3, 2] = images[3, 1]
    images[4, 2] = images[4, 0]
    return images


def blend(images: torch.Tensor, kind: str, factors: torch.Tensor) -> torch.Tensor:
    result, none = images.clone(), torch.zeros_like(factors)
    to_gray = 1 - factors if kind == "saturation" else none
    to_mean = 1 - factors if kind == "contrast" else none
    color.blend_(result, factors, to_gray, to_mean)
    return result


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_blend_is_torchvision(images, kind):
    factors = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 2.0])
    adjust = getattr(TF, f"adjust_{kind}")
    wanted = torch.stack([adjust(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(blend(images, kind, factors), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [-0.5, -0.3, -0.1, 0.0, 0.05, 0.4, 0.5])
def test_hue_is_torchvision(images, shift):
    result = images.clone()
    color.shift_hue_(result, torch.full((6,), shift))
    torch.testing.assert_close(result, TF.adjust_hue(images, shift), atol=2e-5, rtol=0)


def test_hue_takes_a_shift_of_its_own_for_each_image(images):
    shifts, result = torch.linspace(-0.4, 0.4, 6), images.clone()
    color.shift_hue_(result, shifts)
    wanted = torch.stack([TF.adjust_hue(image, float(s)) for image, s in zip(images, shifts, strict=True)])
    torch.testing.assert_close(result, wanted, atol=2e-5, rtol=0)


def test_gray_is_torchvision(images):
    before = images.clone()
    torch.testing.assert_close(color.gray(images), TF.rgb_to_grayscale(images), atol=1e-6, rtol=0)
    assert torch.equal(images, before)


def test_solarize_is_torchvision_and_spares_infinite_thresholds(images):
    thresholds, result = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0, float("inf")]), images.clone()
    color.solarize_(result, thresholds)
    for k in range(5):
        torch.testing.assert_close(result[k], TF.solarize(images[k], float(thresholds[k])), atol=0, rtol=0)
    assert torch.equal(result[5], images[5])
