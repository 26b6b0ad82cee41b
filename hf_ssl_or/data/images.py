"""A set of square uint8 images with labels, and the same decoded step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_ssl_or.data.decode import DecodeJob, decode, note_unreadable
from hf_ssl_or.data.order import Order, ShuffledOrder
from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import keyed_permutation


@dataclass(kw_only=True)
class ImageSet:
    """Images of a run, decoded.

    Attributes:
        images: uint8, (n, 3, S, S): in memory, on a device, or a file mapped into memory.
        labels: int64, (n,), or None for unlabelled images.
        class_names: Names of the labels, or None.
        mean: Mean per channel of images in [0, 1] that views are normalised with.
        std: Standard deviation per channel.
        name: What the user calls the data set.
        fingerprint: Key of the content: the source, which images of it, and their size.
        image_size: Side of views that name no size; S may be larger.
    """

    images: Tensor
    labels: Tensor | None
    class_names: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    fingerprint: str
    image_size: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def source_size(self) -> int:
        """Side S of the stored images in pixels."""
        return self.images.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all decoded images."""
        return len(self) * 3 * self.source_size**2

    def batch(self, index_B: Tensor | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Gives images by index on a device: uint8, (B, 3, S, S)."""
        index, device = torch.as_tensor(index_B), torch.device(device)
        if self.images.device.type == "cpu" and device.type == "cuda":  # through pinned memory: the host need not wait
            out = torch.empty(len(index), *self.images.shape[1:], dtype=torch.uint8, pin_memory=True)
            return torch.index_select(self.images, 0, index.cpu(), out=out).to(device, non_blocking=True)
        if self.images.device.type == "cuda" and index.device.type == "cpu":
            index = index.pin_memory()
        return self.images.index_select(0, index.to(self.images.device, non_blocking=True)).to(device)

    def stream(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Gives one batch after the other."""
        for index_B in indices:
            yield self.batch(index_B, device)

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """Gives a set of some of the images, a copy in memory, with the same statistics."""
        index = torch.as_tensor(indices).cpu()
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.batch(index, self.images.device), labels=labels)

    def sample(self, size: int, *key: int | str) -> ImageSet:
        """Gives a set of at most `size` images, at random by the key, in the order of the set."""
        return self.subset(np.sort(keyed_permutation(len(self), *key)[:size]))

    def order(self, batch_size: int, seed: int) -> Order:
        """Gives the order in which a run takes the images."""
        return ShuffledOrder(len(self), batch_size, seed)

    def to(self, device: torch.device | str) -> ImageSet:
        """Gives the set with its pixels on a device."""
        return dataclasses.replace(self, images=self.images.to(device))


@dataclass(kw_only=True)
class StreamedImageSet(ImageSet):
    """A set that is decoded again in each step, by worker processes that run ahead; `images` is empty, (0, 3, S, S).

    An image that cannot be read is replaced by the next one of the set.

    Attributes:
        job: What is decoded.
    """

    job: DecodeJob
    _failures: dict[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.job.rows)

    def batch(self, index_B: Tensor | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Decodes images in this process."""
        decoder = _Decoder(self.job)
        return self._count(*_collate([decoder[int(i)] for i in torch.as_tensor(index_B).cpu()])).to(device)

    def stream(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Decodes one batch after the other, ahead of time."""
        loader = DataLoader(
            _Decoder(self.job),
            batch_sampler=(index_B.tolist() for index_B in indices),
            num_workers=self.job.workers,
            collate_fn=_collate,
            pin_memory=torch.device(device).type == "cuda",
        )
        for images_BCHW, failures in _watched(loader):
            yield self._count(images_BCHW, failures).to(device, non_blocking=True)

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """Gives a set of some of the images."""
        index = torch.as_tensor(indices).cpu()
        labels = None if self.labels is None else self.labels[index]
        job = dataclasses.replace(self.job, rows=self.job.rows[index.numpy()])
        return dataclasses.replace(self, job=job, labels=labels)

    def to(self, device: torch.device | str) -> ImageSet:
        """Gives the set itself: it has no pixels to move."""
        return self

    def _count(self, images_BCHW: Tensor, failures: dict[int, str]) -> Tensor:
        note_unreadable(self._failures, failures, self.job.source.name, len(self), self.job.max_corrupt)
        return images_BCHW


def _watched(loader: Iterable[Any]) -> Iterator[Any]:
    """Says in one line that a worker died, which torch says in one of several errors."""
    try:
        yield from loader
    except (RuntimeError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "data: a process that decodes images was killed (often for want of memory); "
            "set fewer data.num_workers and continue with --resume"
        ) from error


class _Decoder(Dataset):
    """Decodes the i-th image of a job, or the next one that can be read; says which could not."""

    def __init__(self, job: DecodeJob) -> None:
        self.job = job

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[int, str]]:
        failures: dict[int, str] = {}
        rows = self.job.rows
        for place in range(i, i + len(rows)):
            row = int(rows[place % len(rows)])
            image = decode(self.job.source, row, self.job.side)
            if isinstance(image, np.ndarray):
                return image, failures
            failures[row] = image
        raise self.job.too_many(list(failures.values()))


def _collate(items: list[tuple[np.ndarray, dict[int, str]]]) -> tuple[Tensor, dict[int, str]]:
    failures = {row: reason for _, found in items for row, reason in found.items()}
    return torch.from_numpy(np.stack([image for image, _ in items])), failures
