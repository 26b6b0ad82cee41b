"""Where images come from: the Hub, parquet, folders, WebDataset shards, or the built-in shapes; one interface."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import datasets
import numpy as np
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.files import FolderSource, TarSource, expand_braces, expand_shards, folder_splits
from hf_ssl_or.data.shapes import ShapesSource
from hf_ssl_or.data.tables import TableSource, is_saved, load_tables
from hf_ssl_or.errors import InputError


class ImageReader(Protocol):
    """Images that are opened by number."""

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens image i: a PIL image that need not be decoded yet, or a uint8 array (H, W, 3)."""
        ...

    def describe(self, i: int) -> str:
        """Says where image i is, for messages."""
        ...


class ImageSource(ImageReader, Protocol):
    """A split of a data set.

    Attributes:
        name: What the user calls it.
        fingerprint: Changes when the content does.
        labels: int64, (n,), or None where an image has none.
        class_names: Names of the labels, or None.
    """

    name: str
    fingerprint: str
    labels: np.ndarray | None
    class_names: list[str] | None

    def __len__(self) -> int: ...


class ListSource:
    """Images that are in memory already: PIL images, or arrays.

    Args:
        images: The images.
        name: What the user calls them.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(self, images: Sequence[Any] | np.ndarray, *, name: str = "images") -> None:
        self.name, self._images = name, images
        digest = hashlib.blake2b(digest_size=12)
        for image in images:
            array = np.asarray(image)
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> Any:
        """Returns image i."""
        return self._images[i]

    def describe(self, i: int) -> str:
        """Says which image i is."""
        return f"image {i} of {self.name}"


def load_source(arguments: DataArguments, split: str) -> ImageSource:
    """Opens a split.

    Raises:
        InputError: There is no such data set, split or column, or it holds no image.
    """
    kind, folder = _kind(arguments.dataset), Path(arguments.dataset).expanduser()
    source: ImageSource
    if kind == "table":
        tables = load_tables(arguments)
        _check_split(arguments, split, list(tables))
        source = TableSource(tables[split], arguments, split)
    else:
        _check_split(arguments, split, list_splits(arguments))
        if kind == "shapes":
            train = split == arguments.train_split
            n = arguments.shapes_train if train else arguments.shapes_test
            source = ShapesSource(n, seed=0 if train else 1, size=arguments.image_size)
        elif kind == "shards":
            source = TarSource(arguments.dataset, _shards(arguments, split))
        else:
            source = FolderSource(arguments.dataset, folder / split if folder_splits(folder) else folder)
    if not len(source):
        raise InputError(f"data.dataset: there is no image in {arguments.dataset}, split {split!r}")
    return source


def list_splits(arguments: DataArguments) -> list[str]:
    """Names the splits of a data set, so that a run without test images can go without what is measured on them."""
    if arguments.streaming:
        return [arguments.train_split]
    kind, both = _kind(arguments.dataset), [arguments.train_split, arguments.test_split]
    if kind == "table":
        return list(load_tables(arguments))
    if kind == "shapes":
        return both if arguments.shapes_test else both[:1]
    if kind == "shards":
        return [split for split in both if _shards(arguments, split)] if "{split}" in arguments.dataset else both[:1]
    return folder_splits(Path(arguments.dataset).expanduser()) or both[:1]


def _kind(dataset: str) -> Literal["shapes", "shards", "folder", "table"]:
    if dataset == "shapes":
        return "shapes"
    if "://" in dataset:
        raise InputError(
            f"data.dataset: {dataset.split('?')[0]} is elsewhere; set data.streaming=true, or copy it here"
        )
    if dataset.endswith((".tar", ".tar}")):
        return "shards"
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        return "table" if is_saved(folder) or any(folder.rglob("*.parquet")) else "folder"
    if folder.exists():
        raise InputError(f"data.dataset: {dataset} is a file; name the folder that it is in")
    if dataset.startswith((".", "~", os.sep)) or dataset.count("/") > 1:
        raise InputError(f"data.dataset: there is no folder {dataset}")
    return "table"


def _check_split(arguments: DataArguments, split: str, splits: list[str]) -> None:
    if split not in splits:
        raise InputError(
            f"data: {arguments.dataset} has no split {split!r}; available: {', '.join(splits) or 'none'} "
            "(data.train_split and data.test_split name them)"
        )


def _shards(arguments: DataArguments, split: str) -> list[Path]:
    """Lists the shards of a split; a split of which there is none has none."""
    shards = expand_shards(arguments.dataset, split)
    missing = [shard for shard in shards if not shard.exists()]
    if missing and len(missing) < len(shards):
        raise InputError(f"data.dataset: {len(missing)} of {len(shards)} shards are missing, the first: {missing[0]}")
    return [] if missing else shards


# ---------------------------------------------------------------------------------------------------------------------
# Shards that are streamed


def list_shards(arguments: DataArguments, split: str) -> list[str]:
    """Lists the paths and URLs of the parquet and tar files of a split, in order.

    Raises:
        InputError: There is no such set or split, or it is made of other files.
    """
    pattern = arguments.dataset
    if "://" in pattern or pattern.endswith((".tar", ".tar}", ".parquet", ".parquet}")):
        urls = (
            _expand_urls(pattern, split) if "://" in pattern else [str(path) for path in expand_shards(pattern, split)]
        )
    else:
        urls = _resolved_files(arguments, split)
    odd = next((url for url in urls if not url.split("?")[0].endswith((".parquet", ".tar"))), None)
    if odd or not urls:
        raise InputError(
            f"data.streaming: reads .parquet and uncompressed .tar files, and {pattern} has "
            f"{odd.split('?')[0] if odd else 'none'}; leave out data.streaming, or write the images into such files"
        )
    return urls


def _expand_urls(pattern: str, split: str) -> list[str]:
    parts = urlsplit(pattern)
    if parts.password is not None:
        raise InputError("data.dataset: leave the password out of the address: a run's files would hold it")
    if any(sign in parts.path for sign in "*["):
        raise InputError(f"data.dataset: {parts.path} on a server cannot be looked up; write it as {{000..009}}")
    return expand_braces(pattern.replace("{split}", split))


def _resolved_files(arguments: DataArguments, split: str) -> list[str]:
    """Lists the files that the `datasets` library finds for a split of a folder or a Hub id."""
    kind, folder = _kind(arguments.dataset), Path(arguments.dataset).expanduser()
    if kind == "shapes" or is_saved(folder):
        raise InputError(f"data.streaming: {arguments.dataset} is not made of shards; leave out data.streaming")
    try:
        path = str(folder) if folder.is_dir() else arguments.dataset
        files = datasets.load_dataset_builder(path, arguments.dataset_config).config.data_files or {}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data.dataset: cannot load {arguments.dataset!r}: {reason}") from error
    _check_split(arguments, split, list(files))
    return list(files[split])
