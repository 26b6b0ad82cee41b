"""Decoded images of any size, one after the other: in memory, or in a file that later runs map into memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data.decode import Decoded, DecodeJob, Tally, decode_all
from hf_ssl_or.errors import InputError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PixelStore:
    """Images as they were stored.

    Attributes:
        flat: Pixels, each image's as (H, W, C).
        starts_N: Where each image begins.
        sizes_N2: Height and width of each image.
        originals_N2: Height and width of each original.
        channels: C.
    """

    flat: np.ndarray
    starts_N: np.ndarray
    sizes_N2: np.ndarray
    originals_N2: np.ndarray
    channels: int

    @classmethod
    def one_after_the_other(
        cls, flat: np.ndarray, sizes_N2: np.ndarray, originals_N2: np.ndarray, channels: int
    ) -> PixelStore:
        """Makes a store of all the images in `flat`."""
        lengths_N = sizes_N2.astype(np.int64).prod(axis=1) * channels
        return cls(flat, np.cumsum(lengths_N) - lengths_N, sizes_N2, originals_N2, channels)

    def __len__(self) -> int:
        return len(self.sizes_N2)

    def __getitem__(self, i: int) -> np.ndarray:
        height, width = (int(side) for side in self.sizes_N2[i])
        start = int(self.starts_N[i])
        return self.flat[start : start + height * width * self.channels].reshape(height, width, self.channels)

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return int(self.sizes_N2.astype(np.int64).prod(axis=1).sum()) * self.channels * self.flat.itemsize

    @functools.cached_property
    def uniform_sizes(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Height and width of all images, and of all originals, if they are the same; else None."""
        both_N4 = np.concatenate([self.sizes_N2, self.originals_N2], axis=1)
        if not len(both_N4) or (both_N4 != both_N4[0]).any():
            return None
        height, width, original_height, original_width = (int(side) for side in both_N4[0])
        return (height, width), (original_height, original_width)

    def dense(self) -> Tensor:
        """Returns all images as one tensor (n, H, W, C), without a copy where they lie side by side.

        They must be of one size.
        """
        assert self.uniform_sizes is not None
        shape = (*self.uniform_sizes[0], self.channels)
        length = int(np.prod(shape))
        places_N, rest_N = np.divmod(self.starts_N, length)
        if not rest_N.any() and (np.diff(places_N) == 1).all():
            start = int(self.starts_N[0])
            return torch.from_numpy(self.flat[start : start + length * len(self)]).view(-1, *shape)
        return torch.from_numpy(np.stack([self[i] for i in range(len(self))]))

    def select(self, index: np.ndarray) -> PixelStore:
        """Returns a store of some of the images, in the same memory."""
        return PixelStore(
            self.flat, self.starts_N[index], self.sizes_N2[index], self.originals_N2[index], self.channels
        )


def decode_to_memory(job: DecodeJob) -> tuple[PixelStore, Tally]:
    """Decodes all images of a job into memory."""
    tally, parts, sizes = Tally(), [], _Sizes()
    for images in decode_all(job, tally):
        sizes.add(images)
        parts += [image.pixels.reshape(-1) for image in images]
    flat = np.concatenate(parts) if parts else np.empty(0, dtype=job.dtype)
    return PixelStore.one_after_the_other(flat, *sizes.arrays(), job.preprocessing.num_channels), tally


def decode_to_disk(job: DecodeJob, folder: Path, *, keep_pixels: bool = True) -> tuple[PixelStore, Tally]:
    """Maps the file of an earlier run into memory, or makes it.

    Args:
        job: What is decoded.
        folder: Where the file is.
        keep_pixels: False decodes and checks all images, but writes only which can be read, and their sizes: the
            pixels of the store are empty then.

    Raises:
        InputError: Too many images cannot be read, or the file cannot be written.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.source.name).strip("-.")[-60:]
    kind = "square" if job.square else "full" if keep_pixels else "checked"
    data = folder / f"{name}-{kind}-{job.key()}.{job.dtype}"
    tally = _read_tally(data, job, keep_pixels)
    if tally is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tally = _write(job, data, keep_pixels)
        except OSError as error:
            raise InputError(
                f"data.cache_dir: cannot write {job.source.name}, {len(job.rows):,} decoded images, to {folder} "
                f"({error.strerror or error}); make room there, name another folder, or set data.cache to none"
            ) from error
    both_N4 = np.fromfile(_sizes_path(data), dtype="<i4").reshape(-1, 4)
    flat = np.empty(0, dtype=job.dtype)
    if keep_pixels and tally.count:
        # Private mapping: torch wants memory that it may write to, and nothing written there reaches the file.
        flat = np.memmap(data, dtype=job.dtype, mode="c")
    return PixelStore.one_after_the_other(flat, both_N4[:, :2], both_N4[:, 2:], job.preprocessing.num_channels), tally


class _Sizes:
    """Collects heights and widths, of images and of originals."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, images: list[Decoded]) -> None:
        self._rows += [(*image.pixels.shape[:2], *image.original_size) for image in images]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        both_N4 = np.array(self._rows, dtype="<i4").reshape(-1, 4)
        return both_N4[:, :2], both_N4[:, 2:]


def _sizes_path(data: Path) -> Path:
    return data.with_suffix(".sizes")


def _read_tally(data: Path, job: DecodeJob, keep_pixels: bool) -> Tally | None:
    """Reads what an earlier run counted; None if it left no file, or one of another length."""
    try:
        note = json.loads(data.with_suffix(".json").read_bytes())
        lengths = [note.pop("sizes_bytes"), note.pop("data_bytes")]
        files = [_sizes_path(data), data][: 1 + keep_pixels]
        sound = note.pop("sha256") == _digest(note)
        sound &= all(path.stat().st_size == length for path, length in zip(files, lengths, strict=False))
    except OSError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        sound = False
    if not sound:
        _logger.warning("%s is damaged and is made again", data)
    return Tally(**note) if sound else None


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _write(job: DecodeJob, data: Path, keep_pixels: bool) -> Tally:
    """Writes the images, then their sizes and what was counted: a `.json` file says that all is complete."""
    tally, sizes, length = Tally(), _Sizes(), 0
    with replacing(data) if keep_pixels else contextlib.nullcontext() as file:
        for images in decode_all(job, tally):
            sizes.add(images)
            for image in images if file is not None else ():
                length += cast(BinaryIO, file).write(np.ascontiguousarray(image.pixels).data.cast("B"))
    both_N4 = np.concatenate(sizes.arrays(), axis=1)
    with replacing(_sizes_path(data)) as file:
        file.write(both_N4.tobytes())
    with replacing(data.with_suffix(".json")) as file:
        note = asdict(tally)
        lengths = {"sizes_bytes": both_N4.nbytes, "data_bytes": length}
        file.write(json.dumps({"sha256": _digest(note), **lengths, **note}).encode())
    return tally


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file of a unique name and renames it at the end: readers see all or nothing, whoever else writes."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
