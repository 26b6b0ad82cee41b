"""Data sets of torch: objects with a length, whose items are images, or hold one."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.decode import progress_bar
from hf_ssl_or.data.image_files import extension, image_extensions, printable
from hf_ssl_or.data.in_memory import check_image, hash_image
from hf_ssl_or.data.labels import LABEL_COLUMNS, content_key, encode_labels
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.image_conversion import open_image

_IMAGE_KEYS = ("image", "img", "pixel_values", "picture", "photo", "jpg", "jpeg", "png", "webp")
_READ_TWICE = 8  # items that tell whether a set gives the same ones again
_MANY = 4096  # items that are worth starting worker processes for
_BATCH = 32

# The label of an item that cannot be read, which is left out later.
_UNREADABLE: Literal["unreadable"] = "unreadable"


def split_item(item: Any, arguments: DataArguments, place: str) -> tuple[Any, Any]:
    """Returns image and label of an item: of (image, label, ...), a dict with keys for them, or the image alone.

    Args:
        item: The item.
        arguments: Name the keys, or do not.
        place: Says which item it is, for messages.

    Returns:
        A PIL image, an array, a tensor, a path or encoded bytes; a number or a word, or None without a label.

    Raises:
        InputError: It holds no image.
    """
    label = None
    if isinstance(item, Mapping) and set(item) != {"bytes", "path"}:
        image_key = _key(item, arguments.image_column, _IMAGE_KEYS, "data.image_column", place)
        if image_key is None:
            raise InputError(f"{place}: no image under {', '.join(map(str, item))}; name its key in data.image_column")
        label_key = _key(item, arguments.label_column, LABEL_COLUMNS, "data.label_column", place)
        item, label = item[image_key], None if label_key is None else item[label_key]
    elif isinstance(item, list | tuple):
        if not item:
            raise InputError(f"{place}: an empty {type(item).__name__} holds no image")
        item, label = item[0], item[1] if len(item) > 1 else None
    if isinstance(item, Mapping):  # as the `datasets` library stores images
        item = item["path"] if item["bytes"] is None else item["bytes"]
    if isinstance(item, torch.Tensor) and item.dtype == torch.bfloat16:  # which numpy does not know
        item = item.float()
    check_image(item, place)
    if isinstance(item, str) and not os.path.lexists(item) and extension(item) not in image_extensions():
        raise InputError(f"{place}: {printable(item[:60])!r} is text, not an image or the path of one")
    return item, _plain_label(label)


def _key(item: Mapping, wanted: str | None, known: tuple[str, ...], setting: str, place: str) -> str | None:
    if wanted is None:
        return next((key for key in known if key in item), None)
    if wanted not in item:
        raise InputError(f"{place}: {unknown(setting, wanted, map(str, item))}")
    return wanted


def _plain_label(label: Any) -> int | float | str | None:
    """Returns a label as a number or a word, None for anything else (boxes, masks, several labels)."""
    if isinstance(label, torch.Tensor | np.ndarray | np.generic) and label.nbytes == label.itemsize:
        label = label.item()  # of one number
    return label if isinstance(label, int | float | str) else None


class MapSource:
    """Items of a map-style data set, read one at a time: such objects are rarely safe for threads.

    All items are read once when it is made, for their labels and for a key of the content.

    Args:
        dataset: Has `__len__` and `__getitem__`.
        arguments: Name the keys of items that are dicts, and say how many processes read.
        name: What messages call it.

    Raises:
        InputError: An item holds no image, but text or something else.
    """

    def __init__(self, dataset: Any, arguments: DataArguments, name: str) -> None:
        self.name, self._dataset, self._arguments, self._lock = name, dataset, arguments, threading.Lock()
        try:
            self._length = len(dataset)
        except TypeError as error:
            raise InputError(f"{name}: has no length (__len__); give a list of its items") from error
        digests, labels = self._read_all()
        self.labels, self.class_names = _encoded(labels, _class_names(dataset))
        self.fingerprint = content_key(hashlib.sha256(b"".join(digests)).hexdigest(), self.labels)
        rows = {int(row) for row in np.linspace(0, self._length - 1, num=_READ_TWICE)}
        if self._length and any(self._examine(row)[0] != digests[row] for row in rows):
            warnings.warn(
                f"{name}: reads differently each time, so that resuming in another process cannot be promised to be "
                "exact; leave out its random transforms: `views` makes the views",
                stacklevel=4,
            )

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def read(self, i: int) -> Any:
        """Reads item i, and opens its image."""
        with self._lock:
            item = self._dataset[i]
        image, _ = split_item(item, self._arguments, self.describe(i))
        return open_image(image) if isinstance(image, str | os.PathLike | bytes) else image

    def describe(self, i: int) -> str:
        """Returns what messages call item i."""
        return f"item {i} of {self.name}"

    def _read_all(self) -> tuple[list[bytes], list[Any]]:
        """Returns a digest and the label of each item, read by worker processes where they are many."""
        workers = self._arguments.workers() if self._length >= _MANY else 0
        batches = [range(i, min(i + _BATCH, self._length)) for i in range(0, self._length, _BATCH)]
        loader = DataLoader(
            _Examiner(self), sampler=batches, batch_size=None, num_workers=workers, collate_fn=lambda found: found
        )
        found: list[tuple[bytes, Any]] = []
        with progress_bar(f"reading {self.name}", self._length) as advance:
            for part in loader:
                if isinstance(part, str):
                    raise InputError(part)
                found += part
                advance(len(part))
        return [digest for digest, _ in found], [label for _, label in found]

    def _examine(self, i: int) -> tuple[bytes, Any]:
        digest = hashlib.sha256()
        try:
            image, label = split_item(self._dataset[i], self._arguments, self.describe(i))
            hash_image(digest, image)
        except InputError:
            raise
        except Exception as error:  # it is counted, and named, when all are decoded
            digest.update(repr(error).encode())
            label = _UNREADABLE
        return digest.digest(), label


class _Examiner(Dataset):
    """Reads batches of items in worker processes; an error is returned in words, which torch would wrap."""

    def __init__(self, source: MapSource) -> None:
        self._source = source

    def __getitem__(self, rows: range) -> list[tuple[bytes, Any]] | str:
        try:
            return [self._source._examine(i) for i in rows]
        except InputError as error:
            return str(error)


def _encoded(labels: list[Any], names: list[str] | None) -> tuple[np.ndarray | None, list[str] | None]:
    """Encodes labels; what cannot be read has that of another item until it is left out."""
    known = [label for label in labels if label is not _UNREADABLE]
    if not known or any(label is None for label in known):
        return None, None
    if names is not None and not all(isinstance(label, int) and 0 <= label < len(names) for label in known):
        names = None  # a transform of the targets has changed what they mean
    return encode_labels([known[0] if label is _UNREADABLE else label for label in labels], names)


def _class_names(dataset: Any) -> list[str] | None:
    """Returns the `classes` of a data set, or of the one that it is a part of."""
    while dataset is not None:
        names = getattr(dataset, "classes", None)
        if isinstance(names, list | tuple):
            return [str(name) for name in names]
        dataset = getattr(dataset, "dataset", None)
    return None
