"""Hugging Face data sets: the Hub's, folders of parquet, and what `save_to_disk` wrote."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_files import FileSource, extension, image_extensions, path_inside
from hf_ssl_or.data.labels import LABEL_COLUMNS, content_key, encode_labels
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.image_conversion import open_image

_BATCH = 64  # rows that are read at a time where all are read, which bounds the memory
_BYTES, _STRINGS = ("binary", "large_binary", "binary_view"), ("string", "large_string", "string_view")
_content_keys: dict[tuple[Any, ...], str] = {}  # of files that this process has read
_logger = logging.getLogger(__name__)


def load_tables(arguments: DataArguments) -> datasets.DatasetDict:
    """Loads all splits with the `datasets` library.

    Raises:
        InputError: The library cannot find or read the set.
    """
    folder = Path(arguments.dataset).expanduser()
    with loading(arguments.dataset):
        if is_saved(folder):
            loaded = datasets.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.is_dir() else arguments.dataset
            loaded = datasets.load_dataset(path, arguments.dataset_config)
    if isinstance(loaded, datasets.Dataset):
        return datasets.DatasetDict({arguments.train_split: loaded})
    return loaded


@contextlib.contextmanager
def loading(dataset: str) -> Iterator[None]:
    """Turns the errors of the `datasets` library into one of one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data.dataset: cannot load {dataset!r}: {reason}") from error


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Columns


@dataclass(frozen=True)
class Column:
    """A column that may hold images, perhaps within structs, or within one list per row.

    Attributes:
        outer: Keys from the table to the image or to the list, at least one.
        inner: Keys from an item of the list to the image; None without a list.
        feature: What the `datasets` library says of the image.
    """

    outer: tuple[str, ...]
    inner: tuple[str, ...] | None
    feature: Any

    @property
    def name(self) -> str:
        """What the user calls it: its keys with dots between them."""
        return ".".join((*self.outer, *(self.inner or ())))

    @property
    def holds_images(self) -> bool:
        """Whether it certainly does: it is declared so, or has the form that the library gives images."""
        return isinstance(self.feature, datasets.Image | dict)

    @property
    def holds_bytes(self) -> bool:
        """Whether its values are plain bytes."""
        return isinstance(self.feature, datasets.Value) and self.feature.dtype in _BYTES

    @property
    def holds_words(self) -> bool:
        """Whether its values are words, which may be paths."""
        return isinstance(self.feature, datasets.Value) and self.feature.dtype in _STRINGS

    def images(self, cells: pa.ChunkedArray) -> pa.ChunkedArray:
        """Returns the images in cells, one after the other."""
        if self.inner is None:
            return cells
        found = pc.list_flatten(cells)
        for key in self.inner:
            found = pc.struct_field(found, key)
        return found


class Cells:
    """The cells of a column as they are stored, without decoding: images, or lists of images."""

    def __init__(self, table: datasets.Dataset, column: Column) -> None:
        self._stored = table.select_columns([column.outer[0]]).with_format("arrow")
        self._keys = column.outer[1:]

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, start: int, stop: int) -> pa.ChunkedArray:
        """Reads rows start, ..., stop - 1."""
        found = self._stored[start:stop].column(0)
        for key in self._keys:
            found = pc.struct_field(found, key)
        return found

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[pa.ChunkedArray]:
        """Reads a range of rows, or all, a few at a time."""
        stop = len(self) if stop is None else stop
        for row in range(start, stop, _BATCH):
            yield self.read(row, min(row + _BATCH, stop))


def _columns(feature: Any, outer: tuple[str, ...], inner: tuple[str, ...] | None) -> Iterator[Column]:
    """Finds the columns in a column."""
    if isinstance(feature, dict) and set(feature) != {"bytes", "path"}:
        for key, value in feature.items():
            yield from _columns(value, *(((*outer, key), None) if inner is None else (outer, (*inner, key))))
    elif isinstance(feature, datasets.List | datasets.LargeList | list):
        if inner is None:  # lists of lists are left out
            yield from _columns(feature[0] if isinstance(feature, list) else feature.feature, outer, ())
    else:
        yield Column(outer, inner, feature)


def find_image_column(
    features: datasets.Features,
    arguments: DataArguments,
    first_values: Callable[[Column], list[Any]] | None = None,
) -> Column:
    """Finds the column of the images: the one that the arguments name, or the only one that may be it.

    That is one declared as images; else one of bytes that can be opened; else one of words that are paths of images.

    Args:
        features: Of the data set.
        arguments: Name the column, or do not.
        first_values: Returns some values of a column. Without it, columns of bytes are not told apart, and none
            counts as paths.

    Raises:
        InputError: There is none, or there are several.
    """
    columns = {column.name: column for key in features for column in _columns(features[key], (key,), None)}
    if (wanted := arguments.image_column) is not None:
        if wanted not in columns:
            raise unknown("data.image_column", wanted, columns)
        if not columns[wanted].holds_images and not columns[wanted].holds_bytes and not columns[wanted].holds_words:
            raise InputError(
                f"data.image_column: {wanted!r} holds {columns[wanted].feature}, not images; name another"
            )
        return columns[wanted]
    found = [column for column in columns.values() if column.holds_images]
    if not found:
        found = [column for column in columns.values() if column.holds_bytes]
        if len(found) > 1 and first_values is not None:
            found = [column for column in found if any(map(_is_image, first_values(column)))] or found
    if not found and first_values is not None:
        words, known = [column for column in columns.values() if column.holds_words], image_extensions()
        found = [column for column in words if any(extension(value) in known for value in first_values(column))]
    if not found:
        raise InputError(f"data.image_column: no column of images among {', '.join(features)}; name the one that is")
    if len(found) > 1:
        names = ", ".join(column.name for column in found)
        raise InputError(f"data.image_column: several columns may hold the images: {names}; name the one to read")
    return found[0]


def _is_image(content: bytes) -> bool:
    try:
        open_image(content)
    except Exception:  # a decoder fails on foreign bytes in more ways than can be listed
        return False
    return True


def find_array_column(features: datasets.Features, arguments: DataArguments) -> tuple[str, str] | None:
    """Returns the column that holds an array per row, of 2 or 3 dimensions, and its type; None if there is none.

    It is the one that the arguments name, or the only one of a table without a column of images or of bytes.
    """
    found = {name: dtype for name, feature in features.items() if (dtype := _array_dtype(feature))}
    if (wanted := arguments.image_column) is not None:
        return (wanted, found[wanted]) if wanted in found else None
    columns = [column for key in features for column in _columns(features[key], (key,), None)]
    encoded = any(column.holds_images or column.holds_bytes for column in columns)
    return None if encoded or len(found) != 1 else next(iter(found.items()))


def _array_dtype(feature: Any) -> str | None:
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return str(feature.dtype)
    depth = 0
    while isinstance(feature, datasets.List | datasets.LargeList):
        depth, feature = depth + 1, feature.feature
    is_array = depth in (2, 3) and isinstance(feature, datasets.Value)
    return feature.dtype if is_array and feature.dtype.startswith(("uint", "int", "float")) else None


def find_label_column(features: datasets.Features, arguments: DataArguments) -> str | None:
    """Returns the column of the labels: the one that the arguments name, else one of a usual name or kind."""
    if arguments.label_column is not None:
        return arguments.label_column
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return next((column for column in (*LABEL_COLUMNS, *classes) if column in features), None)


def table_labels(table: datasets.Dataset, arguments: DataArguments) -> tuple[np.ndarray | None, list[str] | None]:
    """Returns the labels of a table's rows and their names, or None, None.

    Raises:
        InputError: The column that the arguments name is not there, or holds no labels.
    """
    features, name = table.features, find_label_column(table.features, arguments)
    if name is None:
        return None, None
    columns = {column.name: column for key in features for column in _columns(features[key], (key,), None)}
    if name not in columns and (name not in features or arguments.label_column is not None):
        raise unknown("data.label_column", name, columns)
    column = columns.get(name)
    if (
        column is None
        or column.inner is not None
        or not isinstance(column.feature, datasets.ClassLabel | datasets.Value)
    ):
        if arguments.label_column is None:
            return None, None
        raise InputError(f"data.label_column: {name!r} does not hold one label per row; name another column")
    names = column.feature.names if isinstance(column.feature, datasets.ClassLabel) else None
    return encode_labels(Cells(table, column).read(0, len(table)).to_pylist(), names)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def open_table(
    table: datasets.Dataset, arguments: DataArguments, split: str, *, in_program: bool = False
) -> TableSource | FileSource:
    """Opens a split of a data set, whose column holds encoded images or paths.

    Paths are relative to the folder of the data set, and must not leave it; those of a table that a program holds may
    lead anywhere. Of a list of images each counts, with the label of its row.

    Raises:
        InputError: A column is not there, or none or several hold images; or a path leads elsewhere.
    """
    labels, class_names = table_labels(table, arguments)
    column = find_image_column(table.features, arguments, lambda column: _first_values(table, column))
    cells, rows = Cells(table, column), np.arange(len(table))
    if column.inner is not None:
        lengths = [pc.list_value_length(batch).fill_null(0).to_numpy() for batch in cells.batches()]
        rows = np.repeat(rows, np.concatenate([*lengths, []]).astype(np.int64))
        labels = None if labels is None else labels[rows]
        _logger.info(
            "%s: each of the %d images in the lists of %r counts as one, with the label of its row",
            arguments.dataset,
            len(rows),
            column.name,
        )
    places = Places(rows, f"split {split!r}, column {column.name!r}", column.inner is not None)
    folder = Path(arguments.dataset).expanduser()
    local = folder if folder.is_dir() and not in_program else None
    paths = _paths(cells, column)
    if paths is None:
        return TableSource(table, column, places, arguments.dataset, local, labels, class_names)
    if local is not None:
        paths = [path and path_inside(local, path, places(i)) for i, path in enumerate(paths)]
    elif column.holds_words and not in_program:
        raise InputError(
            f"data.image_column: {column.name!r} holds paths, of files that {arguments.dataset} on the Hub does not "
            "bring; name another column, or a folder that holds the set and the files"
        )
    return FileSource(arguments.dataset, local or Path(), paths, labels, class_names, places=places)


@dataclass(frozen=True)
class Places:
    """Names the row of each image, and its place in a row of several.

    Attributes:
        rows: Row of each image, ascending.
        of: Names split and column.
        in_lists: Whether rows hold several images.
    """

    rows: np.ndarray
    of: str
    in_lists: bool

    def within(self, i: int) -> int:
        """Returns the place of image i in the list of its row."""
        return int(i - np.searchsorted(self.rows, self.rows[i]))

    def __call__(self, i: int) -> str:
        """Returns where image i is."""
        return f"row {self.rows[i]} of {self.of}" + (f", image {self.within(i)}" if self.in_lists else "")


class TableSource:
    """Encoded images of a split of a Hugging Face data set; `open_table` makes it.

    Args:
        table: The split.
        column: Column of the images.
        places: Where the images are.
        name: What the user calls the set.
        folder: Where it is; None for one of the Hub.
        labels: int64, (n,), or None.
        class_names: Names of the labels, or None.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        column: Column,
        places: Places,
        name: str,
        folder: Path | None,
        labels: np.ndarray | None,
        class_names: list[str] | None,
    ) -> None:
        self.name, self.labels, self.class_names = name, labels, class_names
        self._cells, self._column, self._places, self._folder = Cells(table, column), column, places, folder
        self.fingerprint = content_key(_content_key(table, column), places.rows, labels)

    def __len__(self) -> int:
        return len(self._places.rows)

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens image i."""
        row = int(self._places.rows[i])
        cell = self._cells.read(row, row + 1)[0]
        value = cell.as_py() if self._column.inner is None else cell[self._places.within(i)].as_py()
        for key in self._column.inner or ():
            value = None if value is None else value[key]
        if isinstance(value, dict):
            path, value = value["path"], value["bytes"]
            if value is None and path is not None:
                value = path if self._folder is None else self._folder / path_inside(self._folder, path, "the cell")
        if value is None:
            raise ValueError("the cell is empty")
        return open_image(value)

    def describe(self, i: int) -> str:
        """Returns the row of image i."""
        return self._places(i)


def _first_values(table: datasets.Dataset, column: Column) -> list[Any]:
    cells = Cells(table, column).read(0, min(_BATCH, len(table)))
    return column.images(cells).drop_null().slice(0, 3).to_pylist()


def _paths(cells: Cells, column: Column) -> list[str] | None:
    """Lists the paths of the images where no image's bytes are in the set; an empty cell has the path ""."""
    found: list[str | None] = []
    for batch in map(column.images, cells.batches()):
        if pa.types.is_struct(batch.type):
            if pc.struct_field(batch, "bytes").null_count < len(batch):
                return None
            batch = pc.struct_field(batch, "path")
        elif column.holds_bytes:
            return None
        found += batch.to_pylist()
    return [path or "" for path in found] if any(found) else None


def _content_key(table: datasets.Dataset, column: Column) -> str:
    """Hashes the stored images, about 1 GB/s per core; what this process has hashed it remembers by its files.

    The library keeps sets of the Hub under the commit that they are from, which says as much without reading them.
    """
    files = [Path(file["filename"]) for file in table.cache_files]
    if files and all(re.fullmatch("[0-9a-f]{40}", file.parent.name) for file in files):
        commit = "/".join(files[0].parts[-5:-1])
        return f"{commit}/{table._fingerprint}/{column.name}"
    states = [(str(file), found.st_ino, found.st_size, found.st_mtime_ns) for file in files if (found := file.stat())]
    known = (*states, table._fingerprint, column.name)
    if not files or known not in _content_keys:
        _content_keys[known] = _hash_images(Cells(table, column), column)
    return f"{_content_keys[known]}/{column.name}"


def _hash_images(cells: Cells, column: Column) -> str:
    step = max(_BATCH, -(-len(cells) // 1024))

    def hash_rows(start: int) -> bytes:
        digest = hashlib.sha256()
        for batch in map(column.images, cells.batches(start, min(start + step, len(cells)))):
            digest.update(pa.RecordBatch.from_arrays([batch.combine_chunks()], ["image"]).serialize())
        return digest.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(hash_rows, range(0, len(cells), step)))).hexdigest()
