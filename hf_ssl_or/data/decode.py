"""Decodes the images of a split with threads, leaves out what cannot be read, and measures the pixels on the way."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import Progress

from hf_ssl_or.data.pixels import to_square
from hf_ssl_or.data.sources import ImageReader, ImageSource
from hf_ssl_or.distributed import rank
from hf_ssl_or.errors import InputError

_LAYOUT = 1  # part of every key: a change of how images are decoded makes older files void
_TASK = 64  # images that a thread decodes at a time
_logger = logging.getLogger(__name__)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class DecodeJob:
    """Which images are wanted, and how.

    Attributes:
        source: Where they are.
        rows: Which of them.
        side: Side of the squares in pixels.
        workers: Threads.
        max_corrupt: Share of the images that may be unreadable.
    """

    source: ImageSource
    rows: np.ndarray
    side: int
    workers: int
    max_corrupt: float

    @property
    def nbytes(self) -> int:
        """Bytes of all decoded images."""
        return len(self.rows) * 3 * self.side**2

    def key(self) -> str:
        """Hash of what the result depends on."""
        digest = hashlib.blake2b(f"{_LAYOUT}/{self.source.fingerprint}/{self.side}/".encode(), digest_size=12)
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def too_many(self, failures: list[str]) -> InputError:
        """Makes the error for more unreadable images than allowed."""
        return too_many_unreadable(self.source.name, len(self.rows), self.max_corrupt, failures)


@dataclass
class Tally:
    """What decoding found. It is stored as JSON beside the images.

    Attributes:
        count: Images that could be read.
        unreadable: Place among the wanted rows -> which image it is and what is wrong.
        pixels: Pixels per channel.
        sums: Sum of the bytes of each channel.
        square_sums: Sum of their squares.
    """

    count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)  # keys are words because JSON has no others
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    square_sums: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, images_NCHW: np.ndarray) -> None:
        """Counts readable images."""
        bytes_3P = images_NCHW.transpose(1, 0, 2, 3).reshape(3, -1).astype(np.uint32)
        self.count += len(images_NCHW)
        self.pixels += bytes_3P.shape[1]
        for channel, values_P in enumerate(bytes_3P):
            self.sums[channel] += int(values_P.sum(dtype=np.uint64))
            self.square_sums[channel] += int(np.square(values_P).sum(dtype=np.uint64))

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel over all pixels in [0, 1], rounded to 4 digits."""
        means = [total / self.pixels for total in self.sums]
        variances = [total / self.pixels - mean**2 for total, mean in zip(self.square_sums, means, strict=True)]
        stds = [max(variance, 1.0) ** 0.5 for variance in variances]  # at least one grey level: it is divided by
        return tuple(round(mean / 255, 4) for mean in means), tuple(round(std / 255, 4) for std in stds)


def decode_all(job: DecodeJob, tally: Tally) -> Iterator[np.ndarray]:
    """Decodes images in order and counts them into `tally`; gives (k, 3, S, S) arrays of those that can be read.

    Raises:
        InputError: More images than allowed cannot be read.
    """
    hidden = rank() > 0 or not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(job.workers) as pool,
        Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress,
    ):
        bar = progress.add_task(f"decoding {job.source.name}", total=len(job.rows))
        for start, decoded in _in_order(job, pool):
            images = [image for image in decoded if isinstance(image, np.ndarray)]
            failed = {str(start + k): reason for k, reason in enumerate(decoded) if isinstance(reason, str)}
            tally.unreadable.update(failed)
            if len(tally.unreadable) > job.max_corrupt * len(job.rows):
                pool.shutdown(cancel_futures=True)
                raise job.too_many(list(tally.unreadable.values()))
            if images:
                images_KCHW = np.stack(images)
                tally.add(images_KCHW)
                yield images_KCHW
            progress.advance(bar, len(decoded))
    if tally.unreadable:
        named = "; ".join(list(tally.unreadable.values())[:3])
        _logger.warning("%s: left out %d unreadable images: %s", job.source.name, len(tally.unreadable), named)


def _in_order(job: DecodeJob, pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[np.ndarray | str]]]:
    """Runs a few tasks ahead, so that finished images do not fill the memory while their predecessors are written."""
    running: deque[tuple[int, Future[list[np.ndarray | str]]]] = deque()
    for start in range(0, len(job.rows), _TASK):
        running.append((start, pool.submit(_decode_some, job, start)))
        if len(running) > 4 * job.workers:
            first, future = running.popleft()
            yield first, future.result()
    for first, future in running:
        yield first, future.result()


def _decode_some(job: DecodeJob, start: int) -> list[np.ndarray | str]:
    return [decode(job.source, int(row), job.side) for row in job.rows[start : start + _TASK]]


def decode(source: ImageReader, row: int, side: int) -> np.ndarray | str:
    """Reads an image as a uint8 square, (3, side, side), or says which one cannot be read and why."""
    try:
        return to_square(source.read(row), side)
    except Exception as error:  # a decoder fails on foreign bytes in more ways than can be listed
        reason = str(error).strip() or type(error).__name__
        return f"{source.describe(row)}: {reason.splitlines()[0]}"


def note_unreadable(known: dict[int, str], found: dict[int, str], name: str, n: int, max_corrupt: float) -> None:
    """Adds images that a streamed set has found to be unreadable to those known, and names the new ones in the log.

    Raises:
        InputError: They are more than allowed.
    """
    new = {row: reason for row, reason in found.items() if row not in known}
    for reason in dict.fromkeys(new.values()).keys() - known.values():
        _logger.warning("the next image takes the place of %s", reason)
    known |= new
    if len(known) > max_corrupt * n:
        raise too_many_unreadable(name, n, max_corrupt, list(known.values()))


def too_many_unreadable(name: str, n: int, max_corrupt: float, failures: list[str]) -> InputError:
    """Makes the error for more unreadable images than allowed, which names the first."""
    return InputError(
        f"{name}: {len(failures)} or more of {n} images cannot be read, and data.max_corrupt={max_corrupt:g} allows "
        f"{int(max_corrupt * n)}; the first is {failures[0]}"
    )


def stored_side(source: ImageReader, rows: np.ndarray, image_size: int) -> int:
    """Chooses the side of the squares: the views' own for small originals, a margin for the crops of large ones.

    A crop of a fifth of the area has 0.45 of the side: from squares of the views' own size it would be enlarged 2.2
    times. The margin of 1.15 (to a multiple of 4) softens that at 1.3 times the bytes.
    """
    sides = []
    for row in rows[np.linspace(0, len(rows) - 1, num=min(16, len(rows)), dtype=np.int64)]:
        with contextlib.suppress(Exception):  # an unreadable image is counted when all are decoded
            image = source.read(int(row))
            sides.append(min(image.shape[:2]) if isinstance(image, np.ndarray) else min(image.size))
    return image_size if not sides or np.median(sides) <= 96 else 4 * round(1.15 * image_size / 4)
