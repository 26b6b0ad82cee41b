"""Image files of the kind that an encoder takes, for the checks that go from a file to features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hf_ssl_or.models.image_conversion import Preprocessing

_TURNED, _TURN = 0x0112, 6  # the tag of EXIF that says how a camera was held, and a quarter turn


def write_samples(preprocessing: Preprocessing, pictures: Sequence[np.ndarray], folder: Path) -> list[Path]:
    """Writes a square image, a wide and a tall one; in color one of them is transparent and one stored sideways.

    Args:
        preprocessing: Channels and range of the values.
        pictures: What to show, (H, W, 3) uint8, all of one size.
        folder: Where to.
    """
    first, last = pictures[0], pictures[-1]
    shown = [first, np.concatenate([first, last], axis=1), np.concatenate([last, first], axis=0)]
    files = []
    for number, picture in enumerate(shown):
        pixels = _of_kind(picture, preprocessing)
        if preprocessing.num_channels == 3 and pixels.dtype == np.uint8:
            files.append(_write_color(pixels, number, folder))
        elif preprocessing.num_channels == 1 and pixels.dtype != np.float32:
            files.append(folder / f"sample{number}.png")
            Image.fromarray(pixels[..., 0]).save(files[-1])
        else:
            files.append(folder / f"sample{number}.npy")
            np.save(files[-1], pixels)
    return files


def _of_kind(picture: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Spreads a picture over the range of values, in as many channels as wanted."""
    pixels = picture[..., np.arange(preprocessing.num_channels) % 3]
    if preprocessing.eight_bit:
        return pixels
    low, high = (0, 65535) if preprocessing.value_range == "dtype" else preprocessing.value_range
    values = low + pixels.astype(np.float32) * ((high - low) / 255)
    return values.astype(np.uint16 if low >= 0 and high <= 65535 and high - low >= 255 else np.float32)


def _write_color(pixels: np.ndarray, number: int, folder: Path) -> Path:
    image, path = Image.fromarray(pixels), folder / f"sample{number}.{'jpg' if number == 2 else 'png'}"
    if number == 1:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    if number == 2:
        exif[_TURNED] = _TURN
    image.save(path, exif=exif)
    return path
