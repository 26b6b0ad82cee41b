from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from hf_ssl_or.data.resize_matrices import apply_lines, blur_matrix, crop_matrix

BOXES = [(0, 0, 40, 40), (3, 5, 7, 11), (10, 0, 30, 13), (39, 39, 1, 1), (0, 8, 40, 32)]  # top, left, height, width


@pytest.mark.parametrize("size", [8, 32, 40, 64])
def test_crop_and_resize_are_torchvision(size):
    """Small and large crops, so that both enlarging and antialiased shrinking are seen."""
    images = torch.rand(len(BOXES), 3, 40, 40, dtype=torch.float64)
    top, left, height, width = torch.tensor(BOXES, dtype=torch.float64).unbind(1)
    result = apply_lines(images, crop_matrix(top, height, size, 40), crop_matrix(left, width, size, 40))
    for image, box, ours in zip(images, BOXES, result, strict=True):
        wanted = TF.resized_crop(image, *box, size=[size, size], antialias=True)
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)


def test_bytes_are_within_one_level_of_torchvision():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (len(BOXES), 3, 40, 40), dtype=torch.uint8)
    top, left, height, width = torch.tensor(BOXES, dtype=torch.float32).unbind(1)
    result = apply_lines(images, crop_matrix(top, height, 24, 40), crop_matrix(left, width, 24, 40))
    for image, box, ours in zip(images, BOXES, result, strict=True):
        wanted = TF.resized_crop(image, *box, size=[24, 24], antialias=True)
        assert (ours - wanted.float()).abs().max() < 1.1  # torchvision rounds after each of two passes


def test_flip_mirrors_the_crop():
    images, start = torch.rand(2, 3, 16, 16), torch.tensor([2.0, 2.0])
    rows = crop_matrix(start, torch.tensor([9.0, 9.0]), 12, 16)
    columns = crop_matrix(start, torch.tensor([11.0, 11.0]), 12, 16, torch.tensor([0.0, 1.0]))
    images[1] = images[0]
    result = apply_lines(images, rows, columns)
    torch.testing.assert_close(result[1], result[0].flip(-1))


@pytest.mark.parametrize(("size", "radius"), [(9, 8), (20, 3), (32, 8)])
def test_blur_is_torchvision(size, radius):
    images, sigmas = torch.rand(3, 3, size, size, dtype=torch.float64), torch.tensor([0.1, 0.8, 2.0]).double()
    matrix = blur_matrix(sigmas, radius, size)
    for image, sigma, ours in zip(images, sigmas, apply_lines(images, matrix, matrix), strict=True):
        wanted = TF.gaussian_blur(image, [2 * radius + 1] * 2, [float(sigma)] * 2)
        torch.testing.assert_close(ours, wanted, atol=1e-7, rtol=0)
