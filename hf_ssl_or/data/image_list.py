"""Lists of image files: CSV and JSON Lines with named columns, and plain text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_files import FileSource, extension, image_extensions, path_inside, printable
from hf_ssl_or.data.labels import LABEL_COLUMNS, encode_labels
from hf_ssl_or.errors import InputError, unknown

LIST_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".txt")
_PATH_COLUMNS = (
    "path", "paths", "file", "files", "file_path", "filepath", "file_name", "filename", "image", "images", "img",
    "image_path", "image_file", "image_name", "img_path", "picture", "photo",
)  # fmt: skip
_SPLIT_COLUMN = "split"

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of a list: its number, counted from 1 with the header; and what it says of an image."""

    number: int
    path: str
    label: str | int | float | None
    split: str | None


@dataclass(frozen=True)
class _Places:
    """Names the row of a list that an image is in; a class, because other processes get it."""

    file: str
    rows: list[int]

    def __call__(self, i: int) -> str:
        return f"row {self.rows[i]} of {self.file}"


class ImageList:
    """A list of images.

    Paths are relative to the list's folder, and must not leave it. A .csv or .tsv file begins with the names of its
    columns; each line of a .jsonl file is an object. `data.image_column` and `data.label_column` name the columns
    where their own names ("path", "file_name", "image" ...; "label", "class" ...) do not; a column "split" says the
    split. Each line of a .txt file is a path, with a label after a tab, or after spaces where the path's extension
    shows its end.

    Args:
        file: The list.
        arguments: Name the columns.

    Attributes:
        splits: The splits that the rows name; empty if they name none.

    Raises:
        InputError: The file cannot be read, or a row of it is wrong, or which column holds the paths is open.
    """

    def __init__(self, file: Path, arguments: DataArguments) -> None:
        self._file, self._name = file, arguments.dataset
        try:
            content = file.read_bytes()
            text = content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InputError(f"data.dataset: cannot read the list {file} ({reason})") from error
        records = {".txt": self._text_lines, ".jsonl": self._json_lines}.get(extension(file.name), self._table_rows)
        numbered = list(records(text))
        self._columns = self._find_columns(numbered, arguments)
        self._rows = [self._row(number, record) for number, record in numbered]
        self.splits = list(dict.fromkeys(row.split for row in self._rows if row.split is not None))
        without = next((row for row in self._rows if row.split is None), None)
        if without is not None and self.splits:
            raise self._wrong(without.number, f"no split in {_SPLIT_COLUMN!r}")
        self._key = f"{hashlib.sha256(content).hexdigest()}/{self._columns}"

    def source(self, split: str | None) -> FileSource:
        """Opens the images of a split, or all.

        Raises:
            InputError: A path leads out of the list's folder, or is a URL, a pipe or a device.
        """
        rows = [row for row in self._rows if split is None or row.split == split]
        folder = self._file.parent
        paths = [path_inside(folder, row.path, f"{self._file}, row {row.number}") for row in rows]
        labels, class_names = encode_labels(_numbers([row.label for row in rows]))
        places = _Places(str(self._file), [row.number for row in rows])
        return FileSource(
            self._name,
            folder,
            paths,
            labels,
            class_names,
            places=places,
            key=self._key,
        )

    def _wrong(self, number: int, what: str) -> InputError:
        return InputError(f"data.dataset: {self._file}, row {number}: {printable(what)}; correct or remove the row")

    # -----------------------------------------------------------------------------------------------------------------
    # Three formats, one form: the number of a row, and its values by column

    def _table_rows(self, text: str) -> Iterator[tuple[int, Record]]:
        signs = text.split("\n", 1)[0]
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=signs.count), strict=True)
        header: list[str] | None = None
        try:
            for cells in rows:
                if header is None:
                    header = [cell.strip() for cell in cells]
                    if len(set(header)) < len(header):
                        raise self._wrong(rows.line_num, f"two columns of one name among {', '.join(header)}")
                elif cells and len(cells) != len(header):
                    raise self._wrong(rows.line_num, f"{len(cells)} cells, where the header has {len(header)}")
                elif cells:
                    yield rows.line_num, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise self._wrong(rows.line_num, str(error)) from error

    def _json_lines(self, text: str) -> Iterator[tuple[int, Record]]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._wrong(number, f"not JSON ({error})") from error
            if not isinstance(record, dict):
                raise self._wrong(number, f"{type(record).__name__} instead of an object in braces")
            yield number, record

    def _text_lines(self, text: str) -> Iterator[tuple[int, Record]]:
        known = "|".join(re.escape(name) for name in sorted(image_extensions()))
        spaced = re.compile(rf"(.*(?:{known}))[ ]+([^ ]+)", re.IGNORECASE)
        for number, line in enumerate(text.split("\n"), 1):
            if not (line := line.strip()):
                continue
            path, tab, label = line.partition("\t")
            found = None if tab or extension(line) in image_extensions() else spaced.fullmatch(line)
            if found and not os.path.lexists(self._file.parent / line):
                path, label = found[1], found[2]
            yield number, {"path": path.strip(), "label": label.strip() or None}

    # -----------------------------------------------------------------------------------------------------------------
    # Columns

    def _find_columns(self, records: list[tuple[int, Record]], arguments: DataArguments) -> tuple[str, str | None]:
        """Returns the columns of the paths and of the labels."""
        if extension(self._file.name) == ".txt":
            return "path", "label"
        names = list(dict.fromkeys(name for _, record in records for name in record))
        for setting in ("image_column", "label_column"):
            wanted = getattr(arguments, setting)
            if names and wanted is not None and wanted not in names:
                raise unknown(f"data.{setting}", wanted, names)
        label = arguments.label_column or next((name for name in names if name.lower() in LABEL_COLUMNS), None)
        if arguments.image_column is not None or not names:
            return arguments.image_column or "", label
        paths = [name for name in names if name.lower() in _PATH_COLUMNS]
        if len(paths) != 1:
            listed = f"{', '.join(paths)} of" if paths else f"none of {', '.join(names)} in"
            raise InputError(f"data.image_column: name the column of the paths; {listed} {self._file} may be it")
        return paths[0], label

    def _row(self, number: int, record: Record) -> Row:
        path_column, label_column = self._columns
        path, split = record.get(path_column), record.get(_SPLIT_COLUMN)
        label = None if label_column is None else record.get(label_column)
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise self._wrong(number, f"no path in {path_column!r}")
        if label is not None and not isinstance(label, str | int | float):
            raise self._wrong(number, f"{label_column!r} holds {type(label).__name__}, not one label")
        if split is not None and not isinstance(split, str):
            raise self._wrong(number, f"{_SPLIT_COLUMN!r} holds {type(split).__name__}, not a name")
        return Row(number, path.strip(), label, None if split is None else split.strip())


def _numbers(labels: list[Any]) -> list[Any]:
    """Returns numbers for labels that are words of digits, so that 10 comes after 9."""
    are_numbers = all(isinstance(label, str) and re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return [int(label) for label in labels] if are_numbers else labels
