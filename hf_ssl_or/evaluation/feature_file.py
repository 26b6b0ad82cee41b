"""Features as a file: parquet or .npz, with what they were made from; and the parts of a file that is being made.

Columns of parquet (and arrays of .npz): features, file (files), row (rows), label (labels), class_name (class_names,
one per class), and what `curation` adds: neighbor_rows, neighbor_similarities, duplicate_group, outlier_score.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_ssl_or.errors import InputError

FORMATS = (".parquet", ".npz")
BASE_COLUMNS = ("features", "file", "row", "label", "class_name")
_ARRAY_NAMES = {"file": "files", "row": "rows", "label": "labels"}  # where an array is not called as its column
_ROW_GROUP = 4096
_KEY = b"hf_ssl_or"
_UNREADABLE = b"unreadable"
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile)


def fixed_lists(values_NK: np.ndarray) -> pa.Array:
    """Returns a column of lists of one length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NK.reshape(-1)), values_NK.shape[1])


def make_table(
    features_NF: np.ndarray,
    files: Sequence[str],
    rows_N: np.ndarray,
    labels_N: np.ndarray | None,
    class_names: Sequence[str] | None,
    unreadable: dict[int, str] | None = None,
) -> pa.Table:
    """Makes a table of features.

    Args:
        features_NF: float32.
        files: Which image each is of.
        rows_N: Its place in the source, int64.
        labels_N: Labels, int64.
        class_names: Names of the labels.
        unreadable: Rows that could not be read on the way, and what is wrong with them.
    """
    columns = {"features": fixed_lists(features_NF), "file": pa.array(files, pa.string()), "row": pa.array(rows_N)}
    if labels_N is not None:
        columns["label"] = pa.array(labels_N)
        if class_names is not None:
            columns["class_name"] = pa.array([class_names[label] for label in labels_N], pa.string())
    return pa.table(columns).replace_schema_metadata({_UNREADABLE: json.dumps(unreadable or {})})


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of lists of one length as a matrix."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).reshape(-1, width) if parts else np.empty((0, width), np.float32)


def join_tables(tables: Iterable[pa.Table], columns: dict[str, pa.Array]) -> pa.Table:
    """Puts tables of features below each other, and further columns of all images beside them."""
    table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    return _with_columns(table, columns, 0)


def arrays_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Returns the columns as the arrays of an .npz file; class names are not among them."""
    arrays = {}
    for name in table.column_names:
        column = table[name]
        if name == "class_name":
            continue
        if pa.types.is_fixed_size_list(column.type):
            values = matrix(column)
        elif pa.types.is_string(column.type):
            values = np.array(column.to_pylist(), dtype=np.str_)
        else:
            values = column.to_numpy()
        arrays[_ARRAY_NAMES.get(name, name)] = values
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# The file


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Reads what a file of features was made from; None if it is no such file."""
    try:
        if path.suffix == ".parquet":
            return json.loads(pq.read_schema(path).metadata[_KEY])
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["metadata"]))
    except _DAMAGE:
        return None


def read_arrays(path: Path, *, features: bool) -> dict[str, np.ndarray]:
    """Reads the arrays of a file: `features` alone, or all others.

    Raises:
        InputError: It is no file of features.
    """
    try:
        if path.suffix == ".parquet":
            names = [name for name in pq.read_schema(path).names if (name == "features") == features]
            return arrays_of(pq.read_table(path, columns=names))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if (name == "features") == features}
    except _DAMAGE as error:
        raise InputError(f"{path}: cannot be read as features ({error})") from error


def read_tables(path: Path) -> Iterator[pa.Table]:
    """Yields the features of a file, without what curation added, some at a time."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            names = [name for name in BASE_COLUMNS if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=names)
        return
    with np.load(path, allow_pickle=False) as file:
        labels = file["labels"] if "labels" in file.files else None
        classes = file["class_names"].tolist() if "class_names" in file.files else None
        yield make_table(file["features"], file["files"].tolist(), file["rows"], labels, classes)


def write_features(
    path: Path, tables: Iterable[pa.Table], columns: dict[str, pa.Array], metadata: dict[str, Any]
) -> None:
    """Writes parquet, a few thousand images at a time, or .npz, and has it on the disk when it returns.

    Args:
        path: The file.
        tables: Features, some at a time.
        columns: Further columns of all images.
        metadata: What they were made from, plain JSON values.
    """
    if path.suffix == ".npz":
        arrays = arrays_of(join_tables(tables, columns)) | {"metadata": np.array(json.dumps(metadata))}
        if metadata["class_names"] is not None:
            arrays["class_names"] = np.array(metadata["class_names"], dtype=np.str_)
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    else:
        _write_parquet(path, tables, columns, metadata)
    sync(path)


def _write_parquet(
    path: Path, tables: Iterable[pa.Table], columns: dict[str, pa.Array], metadata: dict[str, Any]
) -> None:
    start, writer = 0, None
    with contextlib.ExitStack() as stack:
        for group in _groups(tables):
            table = _with_columns(group, columns, start).replace_schema_metadata({_KEY: json.dumps(metadata)})
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, use_dictionary=["class_name"])
                stack.enter_context(writer)
            writer.write_table(table, row_group_size=len(table))
            start += len(table)


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Puts tables together until they make a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table.replace_schema_metadata(None))
        if sum(map(len, waiting)) >= _ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _with_columns(table: pa.Table, columns: dict[str, pa.Array], start: int) -> pa.Table:
    for name, column in columns.items():
        table = table.append_column(name, column.slice(start, len(table)))
    return table


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


class Parts:
    """A folder beside the output with the features that are done: numbered parquet files, each all there or not.

    Args:
        folder: The folder; made if absent.
        made_from: What the features are made from. Those of a folder that were made from something else are not taken.
        overwrite: Deletes those.

    Attributes:
        count: Parts that are done.

    Raises:
        InputError: The folder holds other features, and is not to be overwritten; or it is not one of ours.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], *, overwrite: bool) -> None:
        self.folder, self._key = folder, folder / "made_from.json"
        known = self._read_key()
        if known is not None and known != made_from:
            if not overwrite:
                raise other_features(folder, known, made_from)
            for path in folder.glob("[0-9]*.parquet"):
                path.unlink()
        if known != made_from:
            self._write(self._key, lambda path: path.write_text(json.dumps(made_from)))
        self.count = next(number for number in itertools.count() if not self._path(number).exists())

    def __iter__(self) -> Iterator[pa.Table]:
        for number in range(self.count):
            try:
                yield pq.read_table(self._path(number))
            except _DAMAGE as error:
                raise InputError(
                    f"{self._path(number)}: is damaged ({error}); delete it and those after it"
                ) from error

    def append(self, table: pa.Table) -> None:
        """Writes the next part."""
        self._write(self._path(self.count), lambda path: pq.write_table(table, path, use_dictionary=False))
        self.count += 1

    def unreadable(self) -> dict[int, str]:
        """Returns the rows that could not be read while the parts were made, and what is wrong with them."""
        found: dict[int, str] = {}
        for number in range(self.count):
            known = json.loads(pq.read_schema(self._path(number)).metadata[_UNREADABLE])
            found |= {int(row): reason for row, reason in known.items()}
        return found

    def finish(self, output: Path) -> None:
        """Renames `unfinished` to the output and deletes the parts."""
        os.replace(self.unfinished(output), output)
        sync(output.parent)
        self.remove()

    def unfinished(self, output: Path) -> Path:
        """Returns the name of the output until it is complete."""
        return self.folder / f"unfinished{output.suffix}"

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.parquet"

    def _read_key(self) -> dict[str, Any] | None:
        if self._key.exists():
            return json.loads(self._key.read_text())
        foreign = [path.name for path in self.folder.iterdir() if path.name != ".lock" and path.suffix != ".tmp"]
        if foreign:
            raise InputError(
                f"{self.folder}: is in the way, and holds {foreign[0]}; move it, or name another --output"
            )
        return None

    def _write(self, path: Path, write: Any) -> None:
        temporary = path.with_suffix(".tmp")
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(self.folder)


def other_features(path: Path, known: dict[str, Any] | None, wanted: dict[str, Any]) -> InputError:
    """Makes the error for a file or folder that holds something else than is wanted, and says what differs."""
    if known is None:
        return InputError(f"{path}: exists and holds no features; --overwrite replaces it")
    name = next(name for name in wanted if known.get(name) != wanted[name])
    theirs, ours = (_shown(values.get(name)) for values in (known, wanted))
    detail = f" ({theirs}, not {ours})" if theirs != ours else ""
    return InputError(f"{path}: holds features of another {name.replace('_', ' ')}{detail}; --overwrite replaces them")


def _shown(value: Any) -> str:
    return str(value.get("name", "")) if isinstance(value, dict) else str(value)
