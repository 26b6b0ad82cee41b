"""A set of square uint8 images with labels, and the same set decoded step by step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_ssl_or.data.pixels import to_square
from hf_ssl_or.data.sources import ImageSource
from hf_ssl_or.errors import InputError

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImageSet:
    """Images of a run, decoded.

    Attributes:
        images: uint8, (n, 3, S, S): in memory, on a device, or a read-only file mapped into memory.
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
        """Bytes of all pixels."""
        return self.images.numel()

    def batch(self, index_B: Tensor | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Gives images by index on a device: uint8, (B, 3, S, S)."""
        index, device = torch.as_tensor(index_B), torch.device(device)
        if self.images.device.type == "cpu" and device.type == "cuda":  # pinned, for the host not to wait
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
        index = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.batch(index, self.images.device), labels=labels)

    def to(self, device: torch.device | str) -> ImageSet:
        """Gives the set with its pixels on a device; on the CPU it is the set itself."""
        device = torch.device(device)
        return (
            self
            if self.images.device.type == device.type
            else dataclasses.replace(self, images=self.images.to(device))
        )


@dataclass(kw_only=True)
class StreamedImageSet(ImageSet):
    """A set that is decoded again in each step, by worker processes that run ahead; `images` is empty.

    An image that cannot be read is replaced by the next one of the set.

    Attributes:
        source: Where the images are.
        rows: Which of them the set has.
        workers: Processes.
        max_corrupt: Share of the images that may be unreadable.
    """

    source: ImageSource
    rows: np.ndarray
    workers: int
    max_corrupt: float
    _unreadable: dict[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that all pixels would take."""
        return (
            len(self.rows) * self.images[:0].numel()
            if not len(self.rows)
            else len(self.rows) * 3 * self.source_size**2
        )

    def batch(self, index_B: Tensor | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Decodes images in this process."""
        decoder = _Decoder(self.source, self.rows, self.source_size)
        images_B, failed = _collate([decoder[int(i)] for i in torch.as_tensor(index_B).cpu()])
        self._count(failed)
        return images_B.to(device)

    def stream(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Decodes one batch after the other, ahead of time."""
        loader = DataLoader(
            _Decoder(self.source, self.rows, self.source_size),
            batch_sampler=(index_B.tolist() for index_B in indices),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.device(device).type == "cuda",
        )
        for images_BCHW, failed in loader:
            self._count(failed)
            yield images_BCHW.to(device, non_blocking=True)

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """Gives a set of some of the images."""
        index = torch.as_tensor(indices).cpu()
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, rows=self.rows[index.numpy()], labels=labels)

    def to(self, device: torch.device | str) -> ImageSet:
        """Gives the set itself: it has no pixels to move."""
        return self

    def _count(self, failed: dict[int, str]) -> None:
        for row, reason in failed.items():
            if row not in self._unreadable:
                self._unreadable[row] = reason
                _logger.warning("left out, the next image takes its place: %s", reason)
        if len(self._unreadable) > self.max_corrupt * len(self):
            raise InputError(unreadable_message(self.name, self._unreadable, len(self), self.max_corrupt))


class _Decoder(Dataset):
    """Decodes the i-th image of the set, or the next one that can be read."""

    def __init__(self, source: ImageSource, rows: np.ndarray, side: int) -> None:
        self.source, self.rows, self.side = source, rows, side

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict[int, str]]:
        failed: dict[int, str] = {}
        for step in range(len(self.rows)):
            row = int(self.rows[(i + step) % len(self.rows)])
            image = decode(self.source, row, self.side)
            if not isinstance(image, str):
                return image, failed
            failed[row] = image
        raise InputError(f"{self.source.name}: no image can be read")


def decode(source: ImageSource, row: int, side: int) -> np.ndarray | str:
    """Reads an image as a uint8 square, (3, side, side), or says which one cannot be read and why."""
    try:
        return to_square(source.read(row), side)
    except Exception as error:  # a decoder fails on foreign bytes in more ways than can be listed
        return f"{source.describe(row)} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def unreadable_message(name: str, unreadable: dict[int, str], n: int, max_corrupt: float) -> str:
    """Says how many images cannot be read, and names the first."""
    first = next(iter(unreadable.values()))
    return (
        f"{name}: {len(unreadable)} of {n} images cannot be read, more than data.max_corrupt={max_corrupt:g} allows; "
        f"the first is {first}"
    )


def _collate(items: list[tuple[np.ndarray, dict[int, str]]]) -> tuple[Tensor, dict[int, str]]:
    failed = {row: reason for _, more in items for row, reason in more.items()}
    return torch.from_numpy(np.stack([image for image, _ in items])), failed
