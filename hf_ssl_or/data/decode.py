"""Decodes the images of a split with threads, leaves out what cannot be read, and measures the pixels on the way."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TextColumn

from hf_ssl_or.data.image_source import ImageReader, ImageSource
from hf_ssl_or.data.resize_matrices import resize_fast
from hf_ssl_or.distributed import rank
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import (
    Preprocessing,
    dtype_range,
    of_kind,
    output_size,
    to_pixels,
    upright_size,
)

_LAYOUT = 2  # part of every key: a change of how images are decoded makes older files void
_TASK = 64  # images that a thread decodes at a time
_logger = logging.getLogger(__name__)

T = TypeVar("T")
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """Which images are wanted, and how.

    Attributes:
        source: Where they are.
        rows: Which of them.
        preprocessing: Channels and kind of the pixels, and the geometry of squares.
        dtype: Type of the pixels that are kept.
        square: Makes the squares that an encoder gets in evaluation, not full images.
        bound: Most pixels of the shorter side of full images; larger ones are resized. None for no bound.
        workers: Threads.
        max_corrupt: Share of the images that may be unreadable.
    """

    source: ImageSource
    rows: np.ndarray
    preprocessing: Preprocessing
    dtype: str = "uint8"
    square: bool = False
    bound: int | None = None
    workers: int = 1
    max_corrupt: float = 0.0

    def key(self) -> str:
        """Hash of what the result depends on."""
        p = self.preprocessing
        geometry = (p.image_size, p.crop_pct, p.interpolation) if self.square else self.bound
        kind = (p.num_channels, self.dtype, "dtype" if p.value_range == "dtype" else p.eight_bit)
        digest = hashlib.blake2b(f"{_LAYOUT}/{self.source.fingerprint}/{geometry}/{kind}".encode(), digest_size=12)
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def too_many(self, failures: Sequence[str]) -> InputError:
        """Makes the error for more unreadable images than allowed."""
        return too_many_unreadable(self.source.name, len(self.rows), self.max_corrupt, failures)


@dataclass(frozen=True)
class Decoded:
    """One image: its pixels (H, W, C), and the height and width of the original."""

    pixels: np.ndarray
    original_size: tuple[int, int]


def decode(source: ImageReader, row: int, job: DecodeJob) -> Decoded | str:
    """Reads an image, or says which one cannot be read and why."""
    return _attempt(source, row, lambda image: _decode_square(image, job) if job.square else _decode_full(image, job))


def decode_for_boxes(
    source: ImageReader, row: int, job: DecodeJob, least_side: Callable[[tuple[int, int]], int]
) -> Decoded | str:
    """Reads an image as small as the crops allow that are cut out of it.

    Args:
        source: Where the image is.
        row: Which one.
        job: How it is decoded.
        least_side: Says how many pixels the shorter side of an original of a given height and width must keep.
    """

    def convert(image: Any) -> Decoded:
        size = upright_size(image)
        pixels = _converted(image, job, None if size is None else least_side(size))
        return Decoded(_as_stored(pixels, job), size or pixels.shape[:2])

    return _attempt(source, row, convert)


def first_readable(
    job: DecodeJob, place: int, attempt: Callable[[int], T | str], failures: dict[int, str]
) -> tuple[T, int]:
    """Returns what an attempt makes of the image at a place, or of the next one that can be read, and its place.

    Args:
        job: The images.
        place: Which of its rows comes first.
        attempt: Takes a row; says in words what is wrong with the image.
        failures: Gets the rows that cannot be read.

    Raises:
        InputError: None of the images can be read.
    """
    n = len(job.rows)
    for i in range(place, place + n):
        row = int(job.rows[i % n])
        found = attempt(row)
        if not isinstance(found, str):
            return found, i % n
        failures[row] = found
    raise job.too_many(list(failures.values()))


def _attempt(source: ImageReader, row: int, convert: Callable[[Any], Decoded]) -> Decoded | str:
    try:
        return convert(source.read(row))
    except Exception as error:  # a decoder fails on foreign bytes in more ways than can be listed
        reason = str(error).strip() or type(error).__name__
        return f"{source.describe(row)}: {reason.splitlines()[0]}"


def _decode_square(image: Any, job: DecodeJob) -> Decoded:
    pixels = job.preprocessing.square(image)
    return Decoded(_as_stored(pixels, job), pixels.shape[:2])


def _decode_full(image: Any, job: DecodeJob) -> Decoded:
    size = upright_size(image)
    pixels = _converted(image, job, None if job.bound is None else 2 * job.bound)
    original_size = size or pixels.shape[:2]
    if job.bound is not None and min(pixels.shape[:2]) > job.bound:
        pixels = resize_fast(pixels, output_size(original_size, job.bound))
    return Decoded(_as_stored(pixels, job), original_size)


def _converted(image: Any, job: DecodeJob, least: int | None) -> np.ndarray:
    p = job.preprocessing
    return of_kind(to_pixels(image, p.num_channels, least=least), p.value_range, p.eight_bit)


def _as_stored(pixels: np.ndarray, job: DecodeJob) -> np.ndarray:
    """Converts pixels to the type that is kept; where values would be lost the image is refused."""
    if pixels.dtype.name == job.dtype:
        return pixels
    if job.dtype == "float32":
        return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float32)
    rounded, (low, high) = np.rint(pixels), dtype_range(job.dtype)
    if rounded.min() < low or rounded.max() > high or pixels.dtype.kind in "ui":
        raise ValueError(f"{pixels.dtype} pixels in a set of {job.dtype} ones")
    return rounded.astype(job.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# All images of a split


@dataclass
class Tally:
    """What decoding found. It is stored as JSON beside the images.

    Attributes:
        count: Images that could be read.
        unreadable: Place among the wanted rows -> which image it is and what is wrong.
        pixels: Pixels per channel.
        sums: Sum of the values of each channel, scaled to [0, 1] (of uint8, of the bytes).
        square_sums: Sum of their squares.
    """

    count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)  # keys are words because JSON has no others
    pixels: int = 0
    sums: list[float] = field(default_factory=list)
    square_sums: list[float] = field(default_factory=list)

    def add(self, images: Sequence[np.ndarray], preprocessing: Preprocessing) -> None:
        """Counts readable images."""
        channels = preprocessing.num_channels
        self.sums, self.square_sums = self.sums or [0.0] * channels, self.square_sums or [0.0] * channels
        self.count += len(images)
        together = len({image.dtype for image in images}) == 1 and images[0].size < 2**16
        for values_PC in [np.concatenate([x.reshape(-1, channels) for x in images])] if together else images:
            values_PC = values_PC.reshape(-1, channels)
            self.pixels += len(values_PC)
            for channel in range(channels):
                total, squares = _sums(values_PC[:, channel], preprocessing)
                self.sums[channel] += total
                self.square_sums[channel] += squares

    def statistics(self, preprocessing: Preprocessing) -> Statistics:
        """Mean and standard deviation of each channel over all pixels in [0, 1], rounded to 4 digits."""
        unit = 255 if preprocessing.eight_bit and preprocessing.value_range == (0, 255) else 1
        means = [total / self.pixels for total in self.sums]
        variances = [total / self.pixels - mean**2 for total, mean in zip(self.square_sums, means, strict=True)]
        stds = [max(variance, (unit / 255) ** 2) ** 0.5 for variance in variances]  # one gray level: it is divided by
        return tuple(round(mean / unit, 4) for mean in means), tuple(round(std / unit, 4) for std in stds)


def _sums(values_P: np.ndarray, preprocessing: Preprocessing) -> tuple[float, float]:
    if preprocessing.eight_bit and preprocessing.value_range == (0, 255):  # exact, by counting each byte
        counts, levels = np.array(Image.fromarray(values_P[None]).histogram()), np.arange(256)
        return float(counts @ levels), float(counts @ levels**2)
    low, high = _range_of(values_P, preprocessing)
    scaled_P = ((values_P.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return float(scaled_P.sum()), float(scaled_P @ scaled_P)


def _range_of(values: np.ndarray, preprocessing: Preprocessing) -> tuple[float, float]:
    value_range = preprocessing.value_range
    return dtype_range(values.dtype.name) if value_range == "dtype" else value_range


def decode_all(job: DecodeJob, tally: Tally) -> Iterator[list[Decoded]]:
    """Decodes images in order and counts them into `tally`; yields those that can be read, some at a time.

    Raises:
        InputError: More images than allowed cannot be read.
    """
    with (
        ThreadPoolExecutor(job.workers) as pool,
        progress_bar(f"decoding {job.source.name}", len(job.rows)) as advance,
    ):
        for start, results in _in_order(job, pool):
            images = [image for image in results if isinstance(image, Decoded)]
            failed = {str(start + k): reason for k, reason in enumerate(results) if isinstance(reason, str)}
            tally.unreadable.update(failed)
            if len(tally.unreadable) > job.max_corrupt * len(job.rows):
                pool.shutdown(cancel_futures=True)
                raise job.too_many(list(tally.unreadable.values()))
            if images:
                tally.add([image.pixels for image in images], job.preprocessing)
                yield images
            advance(len(results))
    if tally.unreadable:
        named = "; ".join(list(tally.unreadable.values())[:3])
        _logger.warning("%s: left out %d unreadable images: %s", job.source.name, len(tally.unreadable), named)


@contextlib.contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a bar on the first process's terminal, or a count where the total is unknown; yields what advances it."""
    hidden = rank() > 0 or not sys.stderr.isatty()
    columns = (
        Progress.get_default_columns() if total is not None else (TextColumn("{task.description} {task.completed:,}"),)
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda count: progress.advance(bar, count)


def _in_order(job: DecodeJob, pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[Decoded | str]]]:
    """Runs a few tasks ahead, so that finished images do not fill the memory while their predecessors are written."""
    running: deque[tuple[int, Future[list[Decoded | str]]]] = deque()
    for start in range(0, len(job.rows), _TASK):
        running.append((start, pool.submit(_decode_some, job, start)))
        if len(running) > 4 * job.workers:
            first, future = running.popleft()
            yield first, future.result()
    for first, future in running:
        yield first, future.result()


def _decode_some(job: DecodeJob, start: int) -> list[Decoded | str]:
    return [decode(job.source, int(row), job) for row in job.rows[start : start + _TASK]]


def note_unreadable(known: dict[int, str], found: dict[int, str], name: str, n: int, max_corrupt: float) -> None:
    """Adds images that training has found to be unreadable to those known, and names the new ones in the log.

    Raises:
        InputError: They are more than allowed.
    """
    new = {row: reason for row, reason in found.items() if row not in known}
    for reason in dict.fromkeys(new.values()).keys() - known.values():
        _logger.warning("the next image takes the place of %s", reason)
    known |= new
    if len(known) > max_corrupt * n:
        raise too_many_unreadable(name, n, max_corrupt, list(known.values()))


def too_many_unreadable(name: str, n: int, max_corrupt: float, failures: Sequence[str]) -> InputError:
    """Makes the error for more unreadable images than allowed, which names the first."""
    return InputError(
        f"{name}: {len(failures)} or more of {n} images cannot be read, and data.max_corrupt={max_corrupt:g} allows "
        f"{int(max_corrupt * n)}; the first is {failures[0]}"
    )
