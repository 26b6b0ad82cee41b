"""Crop, resize, flip and blur as matrices: what is linear and separable becomes two batched products.

Row i of a matrix holds the weights with which the pixels of a source row make output pixel i. The triangle filter
widens when it shrinks (antialias), exactly as in torchvision's resize, so one form serves small and large crops.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def crop_matrix(
    start_N: Tensor, length_N: Tensor, size: int, source_size: int, flip_N: Tensor | None = None
) -> Tensor:
    """Weights that take [start, start + length) of a line of pixels, resize it, and flip it if asked.

    Args:
        start_N: Where each crop begins, in pixels; not a whole number where images are stored smaller than they were.
        length_N: Pixels of each crop.
        size: Pixels of the result.
        source_size: Pixels of the source.
        flip_N: 1 where the result runs backwards, 0 elsewhere.

    Returns:
        (N, size, source_size), each row summing to 1.
    """
    start_N11, length_N11 = start_N.view(-1, 1, 1), length_N.view(-1, 1, 1)
    out_1S1 = torch.arange(size, device=start_N.device, dtype=start_N.dtype).add_(0.5).view(1, -1, 1)
    pixel_11S = torch.arange(source_size, device=start_N.device, dtype=start_N.dtype).add_(0.5).view(1, 1, -1)
    if flip_N is not None:
        out_1S1 = torch.where(flip_N.view(-1, 1, 1) > 0, size - out_1S1, out_1S1)
    scale_N11 = length_N11 / size
    slope_N11 = scale_N11.clamp(min=1).reciprocal_()
    weight = (pixel_11S * slope_N11) - (start_N11 + out_1S1 * scale_N11) * slope_N11
    weight.abs_().neg_().add_(1).clamp_(min=0)
    # Every pixel that the crop touches, so that a crop inside of one pixel has one; of whole pixels just its own.
    weight.mul_((pixel_11S > start_N11.floor()) & (pixel_11S < (start_N11 + length_N11).ceil()))
    return weight.div_(weight.sum(-1, keepdim=True))


def resize_fast(pixels_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image by torch's kernel, for training: three times as fast as PIL's, and within a gray level of it.

    Args:
        pixels_HWC: Pixels, say a crop of an image.
        size: Height and width of the result.

    Returns:
        (*size, C), uint8 for uint8 and float32 for other types.
    """
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    pixels = pixels_HWC if pixels_HWC.dtype == np.uint8 else pixels_HWC.astype(np.float32)
    if not pixels.flags.writeable:  # torch warns of memory that it must not write to
        pixels = pixels.copy()
    x_1CHW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(x_1CHW, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def blur_matrix(sigma_N: Tensor, radius: int, size: int) -> Tensor:
    """Weights of a Gaussian blur of a line of pixels that is mirrored at its ends (without repeating the end pixel).

    Args:
        sigma_N: Standard deviation in pixels.
        radius: Half-width of the kernel, less than `size`; torchvision's `kernel_size` is 2 * radius + 1.
        size: Pixels of the line.

    Returns:
        (N, size, size), each row summing to 1.
    """
    offset_K = torch.arange(-radius, radius + 1, device=sigma_N.device, dtype=sigma_N.dtype)
    kernel_NK = (-0.5 * (offset_K / sigma_N[:, None]).square()).exp()
    kernel_NK = kernel_NK / kernel_NK.sum(-1, keepdim=True)
    spread = _mirrored_shifts(radius, size, str(sigma_N.device)).to(sigma_N.dtype)
    return (kernel_NK @ spread).view(-1, size, size)


@lru_cache(maxsize=8)
def _mirrored_shifts(radius: int, size: int, device: str) -> Tensor:
    """(2 * radius + 1, size * size): the matrix of a shift by each offset, on a mirrored line."""
    line = torch.arange(size, dtype=torch.float32).view(1, size)
    source = F.pad(line, (radius, radius), mode="reflect").long().view(-1).unfold(0, size, 1)  # (offset, i) -> pixel
    return F.one_hot(source, size).float().flatten(1).to(device)


def apply_lines(x_NCHW: Tensor, rows_NhH: Tensor, columns_NwW: Tensor) -> Tensor:
    """Applies a matrix to the columns and one to the rows of each image: (N, C, h, w).

    The result for one image is the same, bit by bit, in whatever batch it comes.
    """
    n, channels = x_NCHW.shape[:2]
    rows, columns = _padded(rows_NhH), _padded(columns_NwW)
    height, width = rows.shape[2], columns.shape[2]
    x = _padded(x_NCHW).transpose(1, 2).to(rows.dtype).reshape(n, height, channels * width)
    x = torch.bmm(rows, x).view(n, -1, channels, width).transpose(1, 2).reshape(n, -1, width)
    x = torch.bmm(x, columns.transpose(1, 2)).view(n, channels, rows.shape[1], columns.shape[1])
    return x[..., : rows_NhH.shape[1], : columns_NwW.shape[1]].contiguous()


def _padded(x: Tensor) -> Tensor:
    """Fills the last two axes with zeros to multiples of 4.

    Then every matrix of a batch begins at a multiple of 64 bytes. Where one does not, MKL takes another kernel, whose
    sums differ in the last bit, and an image's view would depend on its place in the batch.
    """
    below, right = -x.shape[-2] % 4, -x.shape[-1] % 4
    return F.pad(x, (0, right, 0, below)) if below or right else x
