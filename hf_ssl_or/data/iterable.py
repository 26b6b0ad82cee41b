"""Iterable data sets: read once to their end, into a file that is then read by number."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import iterable_dataset
from datasets.utils.file_utils import xopen

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.decode import progress_bar
from hf_ssl_or.data.hf_dataset import (
    Column,
    Places,
    TableSource,
    find_array_column,
    find_image_column,
    find_label_column,
)
from hf_ssl_or.data.labels import encode_labels
from hf_ssl_or.data.map_style import split_item
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import to_pixels

_ROWS = 64  # that are written at a time
_SCHEMA = pa.schema({"image": pa.binary()})
_logger = logging.getLogger(__name__)


def read_stream(dataset: Any, arguments: DataArguments, num_channels: int) -> TableSource:
    """Reads an iterable data set to its end, into a file below the folder of the cache; its name is its content's key.

    Args:
        dataset: Of `datasets` or of torch; encoded images are kept as they are.
        arguments: Name the columns, or do not, and the folder.
        num_channels: Channels that the encoder takes.

    Raises:
        InputError: It has no end, holds no images, or the file cannot be written.
    """
    name = type(dataset).__name__
    class_names = None
    if isinstance(dataset, datasets.IterableDataset):
        if _is_endless(dataset._ex_iterable):
            raise InputError(f"data: this {name} repeats without an end; give .take(n) of it, or leave out .repeat()")
        dataset, class_names = _declared(dataset, arguments)
    folder = arguments.cache_folder() / "iterables"
    temporary = folder / f"{uuid.uuid4().hex}.part"
    labels: list[Any] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = _write(_images(dataset, arguments, name, num_channels, labels), temporary, name)
        path = temporary.rename(folder / f"{key}.arrow")
    except OSError as error:
        raise InputError(
            f"data.cache_dir: cannot keep the images of this {name} in {folder} ({error.strerror or error}); make "
            "room there, or name another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    table = datasets.Dataset.from_file(str(path))
    labels_N, class_names = encode_labels(labels, class_names)
    places = Places(np.arange(len(table)), name, in_lists=False)
    column = Column(("image",), None, table.features["image"])
    return TableSource(table, column, places, name, None, labels_N, class_names)


def _is_endless(examples: Any) -> bool:
    """Returns whether an iterable repeats for ever and nothing after that takes a number of its examples."""
    while examples is not None and not isinstance(examples, iterable_dataset.TakeExamplesIterable):
        if isinstance(examples, iterable_dataset.RepeatExamplesIterable) and examples.num_times is None:
            return True
        examples = getattr(examples, "ex_iterable", None)
    return False


def _declared(dataset: datasets.IterableDataset, arguments: DataArguments) -> tuple[Iterable[Any], list[str] | None]:
    """Returns image and label of each row, the image as it is stored, and the names of the classes.

    Where no columns are declared, returns the rows as they are.
    """
    dataset, features = dataset.with_format(None), dataset.features
    if features is None:
        return dataset, None
    label_key = find_label_column(features, arguments)
    names = getattr(features.get(label_key), "names", None)
    if (array := find_array_column(features, arguments)) is not None:
        key, dtype = array
        return ((np.array(row[key], dtype=dtype), row.get(label_key)) for row in dataset), names
    column = find_image_column(features, arguments)
    if column.inner is not None:
        raise InputError(f"data.image_column: {column.name!r} holds lists; map the set to one image per row")

    def walk(row: Any) -> Any:
        value = functools.reduce(lambda value, key: None if value is None else value[key], column.outer, row)
        if isinstance(value, dict) and value["bytes"] is None and "://" in (value["path"] or ""):
            with xopen(value["path"], "rb") as file:  # a file on the Hub, or in an archive there
                return file.read()
        return value

    return ((walk(row), row.get(label_key)) for row in dataset.decode(False)), names


def _images(
    items: Iterable[Any], arguments: DataArguments, name: str, num_channels: int, labels: list[Any]
) -> Iterator[bytes]:
    """Yields images as the bytes of a file, and adds their labels to a list."""
    with progress_bar(f"reading {name}", None) as advance:
        for i, item in enumerate(_until_the_end(items, name)):
            image, label = split_item(item, arguments, f"row {i} of {name}")
            labels.append(label)
            yield _as_bytes(image, num_channels)
            advance(1)


def _until_the_end(items: Iterable[Any], name: str) -> Iterator[Any]:
    count = 0
    try:
        for item in items:
            yield item
            count += 1
    except GeneratorExit:
        raise
    except Exception as error:  # of a function of the program, or of a server
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data: {name} fails after {count} rows: {reason}") from error


def _as_bytes(image: Any, num_channels: int) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).read_bytes()
        except OSError:  # it is counted, and named, when all are decoded
            return b""
    try:
        pixels = to_pixels(image, num_channels)
    except (ValueError, OSError):  # what is wrong is said when all are decoded
        pixels = np.asarray(image)
    file = io.BytesIO()
    np.save(file, pixels, allow_pickle=False)
    return file.getvalue()


def _write(images: Iterator[bytes], path: Path, name: str) -> str:
    """Writes images as a table of the `datasets` library; returns a key of the content."""
    digest, count = hashlib.sha256(), 0
    with open(path, "xb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        while rows := list(itertools.islice(images, _ROWS)):
            for content in rows:
                digest.update(len(content).to_bytes(8, "little") + content)
            writer.write_batch(pa.record_batch([pa.array(rows, pa.binary())], schema=_SCHEMA))
            count += len(rows)
    _logger.info("%s: read to its end, %d images, into %s", name, count, path.parent)
    return digest.hexdigest()[:32]
