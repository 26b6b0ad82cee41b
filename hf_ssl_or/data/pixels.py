"""One image of any kind becomes a square of RGB bytes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def to_square(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Resizes the shorter side to `side` and takes the centre: uint8, (3, side, side).

    An image of that size comes out with the bytes it has.

    Args:
        image: A picture in any of PIL's modes, opened but not necessarily decoded, or a uint8 array (H, W, 3).
        side: Pixels of the result's sides.

    Raises:
        ValueError, OSError: The image cannot be decoded, or has floating-point pixels.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.format == "JPEG":
        image.draft(None, (2 * side, 2 * side))  # decodes a large picture at 1/2, 1/4 or 1/8 of its size
    image = to_rgb(image)
    width, height = image.size
    if (width, height) != (side, side):
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB, upright: transparency becomes white, 16 bits become 8.

    Raises:
        ValueError: The pixels are floating-point numbers, whose range is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels: store the image with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
