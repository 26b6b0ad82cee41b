"""What kind of pixels a set has, measured on a sample, and what becomes of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_source import ImageReader
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing, ValueRange, is_eight_bit, to_pixels, upright_size
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.structures import ViewSpec

_SAMPLE, _VALUES = 256, 4096  # images, and pixels of each, that a range of values is measured on
_EIGHT_BIT_SAMPLE = 32  # images after which a set counts as one of 8 bits
_PERCENTILES = (0.01, 99.99)  # of all values: a few dead or hot pixels do not set the range
_CLIPPED = 0.01  # share of the pixels outside of the range that is worth a warning
_GAP = 32  # ratio between the brightest pixels of two groups of images that is worth a warning
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PixelKind:
    """What is known of a set's pixels before all are decoded.

    Attributes:
        eight_bit: Whether they are uint8.
        dtype: Type that keeps them all.
        value_range: What becomes 0 and 1.
        median_size: Median height and width of the originals.
    """

    eight_bit: bool
    dtype: str
    value_range: ValueRange
    median_size: tuple[int, int]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PixelKind:
        """Makes it from JSON."""
        pairs: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**pairs)


def measure_kind(
    sample: Iterable[tuple[ImageReader, int]], value_range: ValueRange | Literal["auto"], num_channels: int, name: str
) -> PixelKind:
    """Measures types, values and sizes of a sample of images.

    Args:
        sample: Readers and rows; what cannot be read is passed over.
        value_range: "auto" measures the range of others than 8-bit pixels, by percentiles; "dtype", or (low, high).
        num_channels: Channels of the set.
        name: What messages call the set.

    Raises:
        InputError: 8-bit images and others are mixed, or all values are equal.
    """
    firsts: dict[str, str] = {}  # type of the pixels -> the first image of it
    values: list[np.ndarray] = []
    tops: list[tuple[float, str]] = []
    sizes: list[tuple[int, int]] = []
    for reader, row in sample:
        try:
            image = reader.read(row)
            size = upright_size(image)
            eight_bit = is_eight_bit(image)  # which its header says: it need not be decoded
            pixels = np.empty((1, 1), np.uint8) if eight_bit else to_pixels(image, num_channels)
        except Exception:  # it is counted, and named, when all are decoded
            continue
        sizes.append(size or pixels.shape[:2])
        firsts.setdefault(pixels.dtype.name, reader.describe(row))
        if len(sizes) >= _EIGHT_BIT_SAMPLE and firsts.keys() == {"uint8"}:
            break  # others that may come are found when all are decoded
        if pixels.dtype != np.uint8:
            flat = pixels.reshape(-1)
            values.append(flat[np.linspace(0, len(flat) - 1, num=min(_VALUES, len(flat)), dtype=np.int64)])
            tops.append((float(np.percentile(values[-1], 99)), reader.describe(row)))
    height, width = np.median(sizes, axis=0) if sizes else (1, 1)
    median_size = int(height), int(width)
    if value_range == "dtype":
        return PixelKind(eight_bit="uint8" in firsts, dtype="float32", value_range="dtype", median_size=median_size)
    if "uint8" in firsts and len(firsts) > 1:
        other = next(kind for kind in firsts if kind != "uint8")
        raise InputError(
            f"data.value_range: {name} has two ranges of values: {firsts['uint8']} is of uint8, {firsts[other]} of "
            f"{other}; convert one kind, or set data.value_range=dtype to take each type's own range"
        )
    if not values:
        explicit = (0.0, 255.0) if value_range == "auto" else value_range
        return PixelKind(eight_bit=True, dtype="uint8", value_range=explicit, median_size=median_size)
    measured = _measured_range(np.concatenate(values).astype(np.float64), tops, value_range, name)
    dtype = next(iter(firsts)) if len(firsts) == 1 else "float32"
    return PixelKind(eight_bit=False, dtype=dtype, value_range=measured, median_size=median_size)


def _measured_range(
    values: np.ndarray, tops: list[tuple[float, str]], value_range: tuple[float, float] | Literal["auto"], name: str
) -> tuple[float, float]:
    """Measures the range of values, or compares the one that was given with them."""
    if value_range != "auto":
        low, high = value_range
        share = float(((values < low) | (values > high)).mean())
        if share > _CLIPPED:
            _logger.warning(
                "data.value_range: [%g, %g] clips %.1f %% of the pixels of %s, which lie from %g to %g",
                *(low, high, 100 * share, name, values.min(), values.max()),
            )
        return value_range
    low, high = (float(bound) for bound in np.percentile(values, _PERCENTILES))
    if low == high:
        low, high = float(values.min()), float(values.max())
    if low == high:
        raise InputError(f"data.dataset: all pixels of {name} have the value {low:g}: there is nothing to learn")
    positive = sorted(top for top in tops if top[0] > 0)
    for k in range(1, len(positive)):
        (dark, first), (bright, second) = positive[k - 1], positive[k]
        if bright > _GAP * dark and min(k, len(positive) - k) >= max(2, 0.05 * len(positive)):
            _logger.warning(
                "data.value_range: %s seems to have two ranges of values, up to %g (%s) and from %g (%s) on; one, "
                "[%g, %g], is used for both",
                *(name, dark, first, bright, second, low, high),
            )
    return low, high


def sample_rows(rows: np.ndarray) -> np.ndarray:
    """Returns the rows that a kind is measured on, the same in every run."""
    return np.sort(rows[keyed_permutation(len(rows), "pixel kind")[:_SAMPLE]])


def preprocessing_of(arguments: DataArguments, kind: PixelKind, num_channels: int) -> Preprocessing:
    """Returns what the arguments and a kind of pixels make of images; without a mean, one of zeros."""
    mean = arguments.mean or [0.0] * num_channels
    std = arguments.std or [1.0] * num_channels
    if len(mean) != num_channels:
        raise InputError(f"data.mean, data.std: {len(mean)} numbers for images of {num_channels} channels")
    return Preprocessing(
        image_size=arguments.image_size,
        num_channels=num_channels,
        crop_pct=arguments.crop_pct,
        interpolation=arguments.interpolation,
        eight_bit=kind.eight_bit,
        value_range=kind.value_range,
        mean=tuple(mean),
        std=tuple(std),
    )


def kept_dtype(preprocessing: Preprocessing, kind: PixelKind) -> str:
    """Returns the type in which a set's pixels are stored."""
    if preprocessing.eight_bit and preprocessing.value_range != "dtype":
        return "uint8"
    return "float32" if kind.dtype == "uint8" else kind.dtype


def default_bound(image_size: int, views: Sequence[ViewSpec | Callable] = (ViewSpec(),)) -> int:
    """Returns the shorter side from which the median crop of every view has as many pixels as the view.

    A function that makes views counts as the default spec.
    """
    specs = [view if isinstance(view, ViewSpec) else ViewSpec() for view in views]
    sides = [(spec.size or image_size) / math.sqrt(sum(spec.crop_scale) / 2) for spec in specs]
    return max(image_size, math.ceil(max(sides)))


def wanted_range(arguments: DataArguments) -> Any:
    """Returns the range of values that the arguments ask for."""
    wanted = arguments.value_range
    return wanted if isinstance(wanted, str) else (float(wanted[0]), float(wanted[1]))
