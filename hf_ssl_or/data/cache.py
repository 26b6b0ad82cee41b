"""Loads a split: decodes it once, into memory or into a file that this and later runs map into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.images import ImageSet, StreamedImageSet, decode, unreadable_message
from hf_ssl_or.data.sources import ImageSource, load_source
from hf_ssl_or.distributed import rank
from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import keyed_permutation

_SMALL_BYTES = 64 * 2**20  # "auto": decoded again in each run rather than stored
_MEMORY_BYTES = 2**30  # "none": held in memory rather than decoded in each step
_LAYOUT = 1  # part of a file's key: a change of how images are decoded makes older files void
_TASK = 64  # images that a thread decodes at a time
_logger = logging.getLogger(__name__)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def load_images(arguments: DataArguments, split: str, *, statistics: Statistics | None = None) -> ImageSet:
    """Loads a split as uint8 squares, decoding it if no earlier run has.

    Of several processes on a machine let one go first, or each decodes the set (the files stay sound either way).

    Args:
        arguments: Settings of the data; `fraction` concerns the training split only.
        split: Name of the split.
        statistics: Mean and standard deviation to take over, say those of the training images; None takes those of
            the arguments, else measures them on these images.

    Raises:
        InputError: The set, the split or a column is not there, too many images cannot be read, or the folder of the
            cache cannot be written.
    """
    source = load_source(arguments, split)
    fraction = arguments.fraction if split == arguments.train_split else 1.0
    rows = choose_rows(source.labels, len(source), fraction, arguments.fraction_seed)
    job = _Job(source, rows, arguments.cache_size or _stored_side(source, rows, arguments.image_size), arguments)
    if statistics is None and arguments.mean is not None and arguments.std is not None:
        statistics = tuple(arguments.mean), tuple(arguments.std)
    if arguments.cache == "none" and job.nbytes > _MEMORY_BYTES:
        return _streamed(job, statistics or _sampled_statistics(job))
    to_disk = arguments.cache == "disk" or (arguments.cache == "auto" and job.nbytes > _SMALL_BYTES)
    images, tally = _from_disk(job) if to_disk and source.name != "shapes" else _in_memory(job)
    kept = np.delete(rows, [int(place) for place in tally.unreadable])
    return ImageSet(images=images, **_describe(job, kept, statistics or tally.statistics()))


def choose_rows(labels: np.ndarray | None, n: int, fraction: float, seed: int) -> np.ndarray:
    """Chooses a share of range(n), ascending; with labels, each class gives its share to within one image."""
    if fraction == 1:
        return np.arange(n)
    order = keyed_permutation(n, seed, "fraction")
    if labels is not None:
        # The k-th of a class's m images stands at (k + 1/2) / m of the way, so a prefix takes the same share of each.
        order = order[np.argsort(labels[order], kind="stable")]
        _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
        place = (np.arange(n) - np.repeat(start, count) + 0.5) / np.repeat(count, count)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[: max(1, round(fraction * n))])


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@dataclass(frozen=True)
class _Job:
    """Which images of a source are wanted, and how large."""

    source: ImageSource
    rows: np.ndarray
    side: int
    arguments: DataArguments

    @property
    def nbytes(self) -> int:
        return len(self.rows) * 3 * self.side**2

    def key(self) -> str:
        digest = hashlib.blake2b(f"{_LAYOUT}/{self.source.fingerprint}/{self.side}/".encode(), digest_size=12)
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass
class _Tally:
    """What decoding found: how many images, which places failed and why, and sums of pixels for the statistics."""

    count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)  # keys are words because JSON has no others
    pixels: int = 0
    sum: list[int] = field(default_factory=lambda: [0, 0, 0])
    sum_of_squares: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, images_NCHW: np.ndarray) -> None:
        channels = images_NCHW.transpose(1, 0, 2, 3).reshape(3, -1).astype(np.uint32)
        self.count += len(images_NCHW)
        self.pixels += channels.shape[1]
        self.sum = [old + int(new) for old, new in zip(self.sum, channels.sum(1, dtype=np.uint64), strict=True)]
        squares = np.square(channels).sum(1, dtype=np.uint64)
        self.sum_of_squares = [old + int(new) for old, new in zip(self.sum_of_squares, squares, strict=True)]

    def statistics(self) -> Statistics:
        """Mean and standard deviation per channel over all pixels in [0, 1], rounded to 4 digits."""
        mean = [total / self.pixels for total in self.sum]
        var = [total / self.pixels - m * m for total, m in zip(self.sum_of_squares, mean, strict=True)]
        std = [max(v, 1.0) ** 0.5 for v in var]  # at least one grey level: constant images must not divide by 0
        return tuple(round(m / 255, 4) for m in mean), tuple(round(s / 255, 4) for s in std)


def _decode_all(job: _Job, tally: _Tally) -> Iterator[np.ndarray]:
    """Decodes with threads, in order; gives (k, 3, S, S) arrays of those that can be read, and counts into `tally`."""
    n, workers = len(job.rows), job.arguments.workers()
    console = Console(stderr=True)
    hidden = rank() > 0 or not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(console=console, transient=True, disable=hidden) as progress,
    ):
        bar = progress.add_task(f"decoding {job.source.name}", total=n)
        starts, running = iter(range(0, n, _TASK)), deque()
        while True:
            while len(running) < 4 * workers and (start := next(starts, None)) is not None:
                running.append((start, pool.submit(_decode_some, job, start)))
            if not running:
                break
            start, future = running.popleft()
            decoded = future.result()
            images = [image for image in decoded if not isinstance(image, str)]
            failed = {str(start + k): reason for k, reason in enumerate(decoded) if isinstance(reason, str)}
            tally.unreadable.update(failed)
            if len(tally.unreadable) > job.arguments.max_corrupt * n:
                pool.shutdown(cancel_futures=True)
                raise InputError(unreadable_message(job.source.name, tally.unreadable, n, job.arguments.max_corrupt))
            if images:
                tally.add(np.stack(images))
                yield np.stack(images)
            progress.advance(bar, len(decoded))
    if tally.unreadable:
        named = "; ".join(list(tally.unreadable.values())[:3])
        _logger.warning("%s: left out %d unreadable images: %s", job.source.name, len(tally.unreadable), named)


def _decode_some(job: _Job, start: int) -> list[np.ndarray | str]:
    return [decode(job.source, int(row), job.side) for row in job.rows[start : start + _TASK]]


def _stored_side(source: ImageSource, rows: np.ndarray, image_size: int) -> int:
    """Side of the stored squares: no larger than needed for small originals, a margin for the crops of large ones."""
    sides = []
    for row in rows[np.linspace(0, len(rows) - 1, num=min(16, len(rows)), dtype=np.int64)]:
        with contextlib.suppress(Exception):  # an unreadable image is counted when all are decoded
            image = source.read(int(row))
            sides.append(min(image.shape[:2]) if isinstance(image, np.ndarray) else min(image.size))
    return image_size if not sides or np.median(sides) <= 96 else round(1.15 * image_size)


# ---------------------------------------------------------------------------------------------------------------------
# The three places where images can be


def _in_memory(job: _Job) -> tuple[Tensor, _Tally]:
    images, tally, count = torch.empty(len(job.rows), 3, job.side, job.side, dtype=torch.uint8), _Tally(), 0
    for some in _decode_all(job, tally):
        images[count : count + len(some)] = torch.from_numpy(some)
        count += len(some)
    return images[:count], tally


def _from_disk(job: _Job) -> tuple[Tensor, _Tally]:
    """Maps the file of an earlier run, or makes it: the side file is written last, so its presence says complete."""
    folder = job.arguments.cache_folder()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.source.name).strip("-.")[-60:]
    data, side_file = (folder / f"{name}-{job.side}px-{job.key()}.{end}" for end in ("uint8", "json"))
    tally = _read_tally(data, side_file, job)
    if tally is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tally = _write(job, data, side_file)
        except OSError as error:
            raise InputError(
                f"data.cache_dir: cannot write {job.nbytes / 2**30:.1f} GiB to {folder} ({error.strerror or error}); "
                "free space there, name another folder, or set data.cache to none"
            ) from error
    shape = (tally.count, 3, job.side, job.side)
    # Mapped privately: torch wants writable memory, and what is written there never reaches the file.
    return torch.from_file(str(data), shared=False, size=int(np.prod(shape)), dtype=torch.uint8).view(shape), tally


def _read_tally(data: Path, side_file: Path, job: _Job) -> _Tally | None:
    """Reads what was decoded; None if there is no file yet or its length is wrong."""
    try:
        tally = _Tally(**json.loads(side_file.read_text()))
        sound = data.stat().st_size == tally.count * 3 * job.side**2
    except (OSError, ValueError, TypeError):
        return None
    if not sound:
        _logger.warning("%s is damaged and is made again", data)
    return tally if sound else None


def _write(job: _Job, data: Path, side_file: Path) -> _Tally:
    tally = _Tally()
    with _replacing(data) as file:
        for some in _decode_all(job, tally):
            file.write(memoryview(some).cast("B"))
    with _replacing(side_file) as file:
        file.write(json.dumps(asdict(tally)).encode())
    return tally


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[object]:
    """Opens a file of a unique name beside `path` and renames it at the end: readers see all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _describe(job: _Job, rows: np.ndarray, statistics: Statistics) -> dict:
    labels = job.source.labels
    return {
        "labels": None if labels is None else torch.from_numpy(labels[rows]),
        "class_names": job.source.class_names,
        "mean": statistics[0],
        "std": statistics[1],
        "name": job.source.name,
        "fingerprint": job.key(),
        "image_size": job.arguments.image_size,
    }


def _sampled_statistics(job: _Job) -> Statistics:
    """Statistics of 4,096 images: decoding all of them once is what the user does not want."""
    rows = np.sort(job.rows[keyed_permutation(len(job.rows), "statistics")[:4096]])
    return _in_memory(_Job(job.source, rows, job.side, job.arguments))[1].statistics()


def _streamed(job: _Job, statistics: Statistics) -> StreamedImageSet:
    return StreamedImageSet(
        images=torch.empty(0, 3, job.side, job.side, dtype=torch.uint8),
        source=job.source,
        rows=job.rows,
        workers=job.arguments.workers(),
        max_corrupt=job.arguments.max_corrupt,
        **_describe(job, job.rows, statistics),
    )
