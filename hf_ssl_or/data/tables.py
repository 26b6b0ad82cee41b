"""Data sets as tables: the Hub's, folders of parquet, and what `save_to_disk` wrote."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.labels import encode_labels
from hf_ssl_or.errors import InputError, unknown

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")


def load_tables(arguments: DataArguments) -> datasets.DatasetDict:
    """Loads all splits with the `datasets` library.

    Raises:
        InputError: The library cannot find or read the set.
    """
    folder = Path(arguments.dataset).expanduser()
    try:
        if is_saved(folder):
            loaded = datasets.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.is_dir() else arguments.dataset
            loaded = datasets.load_dataset(path, arguments.dataset_config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data.dataset: cannot load {arguments.dataset!r}: {reason}") from error
    if isinstance(loaded, datasets.Dataset):
        return datasets.DatasetDict({arguments.train_split: loaded})
    return loaded


def is_saved(folder: Path) -> bool:
    """Says whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


class TableSource:
    """A split of a Hugging Face data set.

    Raises:
        InputError: A column is not there, or none holds images.
    """

    def __init__(self, table: datasets.Dataset, arguments: DataArguments, split: str) -> None:
        self.name, self._split = arguments.dataset, split
        self._column = image_column(table.features, arguments)
        self._cells = table.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self.labels, self.class_names = _labels(table, arguments)
        self.fingerprint = self._content_key(table)

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, i: int) -> Image.Image:
        """Opens image i without decoding it."""
        cell = self._cells[i][self._column]
        if cell is None:
            raise ValueError("the cell is empty")
        return Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))

    def describe(self, i: int) -> str:
        """Says which row image i is."""
        return f"row {i} of split {self._split!r}, column {self._column!r}"

    def _content_key(self, table: datasets.Dataset) -> str:
        """Hashes what is known without reading all: the prepared files' names and sizes, the schema, and 32 rows."""
        files = [Path(file["filename"]) for file in table.cache_files]
        parts = ["/".join(file.parts[-3:]) + f":{file.stat().st_size}" for file in files]
        digest = hashlib.blake2b(digest_size=12)
        for part in (*parts, self._column, str(table.features), str(len(table))):
            digest.update(part.encode() + b"\0")
        for i in np.linspace(0, len(table) - 1, num=min(32, len(table)), dtype=np.int64):
            cell = self._cells[int(i)][self._column] or {}
            digest.update(str(cell.get("path")).encode() + (cell.get("bytes") or b""))
        return digest.hexdigest()


def image_column(features: datasets.Features, arguments: DataArguments) -> str:
    """Names the column of the images: the one that the arguments name, or the one that looks like it.

    Raises:
        InputError: There is none.
    """
    if arguments.image_column is not None:
        if arguments.image_column not in features:
            raise unknown("data.image_column", arguments.image_column, features)
        return arguments.image_column
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    stored = [name for name, feature in features.items() if _holds_bytes(feature)]
    candidates = images or [name for name in _IMAGE_COLUMNS if name in stored] or stored
    if not candidates:
        raise InputError(f"data.image_column: no column of images among {', '.join(features)}; name the one that is")
    return candidates[0]


def _holds_bytes(feature: Any) -> bool:
    """Says whether images may be in a column that another library wrote: plain bytes, or bytes beside a path."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _labels(table: datasets.Dataset, arguments: DataArguments) -> tuple[np.ndarray | None, list[str] | None]:
    features, name = table.features, arguments.label_column
    if name is None:
        classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        name = next((column for column in (*_LABEL_COLUMNS, *classes) if column in features), None)
    if name is None:
        return None, None
    if name not in features:
        raise unknown("data.label_column", name, features)
    if not isinstance(features[name], (datasets.ClassLabel, datasets.Value)):
        if arguments.label_column is None:
            return None, None
        raise InputError(f"data.label_column: {name!r} holds {type(features[name]).__name__}, not one label per image")
    names = features[name].names if isinstance(features[name], datasets.ClassLabel) else None
    return encode_labels(table[name][:], names)
