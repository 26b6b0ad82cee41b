"""Where images come from: files, lists, shards, data sets of Hugging Face, or the built-in shapes; one interface."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import datasets

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.class_subset import keep_classes
from hf_ssl_or.data.hf_dataset import is_saved, load_tables, loading, open_table
from hf_ssl_or.data.image_files import extension
from hf_ssl_or.data.image_folder import ImageFolder, open_folder, open_glob
from hf_ssl_or.data.image_list import LIST_EXTENSIONS, ImageList
from hf_ssl_or.data.image_source import ImageSource
from hf_ssl_or.data.published import known_columns, own_split, resolve_dataset
from hf_ssl_or.data.shapes import ShapesSource
from hf_ssl_or.data.splits import SPLITS, find_split, splits_in
from hf_ssl_or.data.webdataset import TarSource, expand_braces, expand_shards
from hf_ssl_or.errors import InputError


def load_source(arguments: DataArguments, split: str) -> ImageSource:
    """Opens a split, by its own name or the one that the `datasets` library has for it.

    Raises:
        InputError: There is no such data set, split, column or class, or it holds no image.
    """
    resolved = resolve_dataset(arguments)
    splits, source_of = _open(resolved, arguments.dataset)
    source = keep_classes(source_of(_known_split(arguments, split, splits)), resolved.classes)
    if not len(source):
        raise InputError(f"data.dataset: there is no image in {arguments.dataset}, split {split!r}")
    return source


def list_splits(arguments: DataArguments) -> list[str]:
    """Names the splits of a data set, so that a run without test images can go without what is measured on them.

    A split has one name: that of the `datasets` library, or the one by which the arguments call it.
    """
    if arguments.streaming:
        return [arguments.train_split]
    splits, _ = _open(resolve_dataset(arguments), arguments.dataset)
    named = [split for split in splits if split in SPLITS or not splits_in(split) & set(splits)]
    wanted = (arguments.train_split, arguments.test_split)
    return named + [split for split in wanted if split not in named and _find(arguments, split, splits)]


def _open(arguments: DataArguments, name: str) -> tuple[list[str], Callable[[str], ImageSource]]:
    """Returns the splits of a data set, which the user calls `name`, and what opens one."""
    dataset, kind = arguments.dataset, _kind(arguments.dataset)
    train, both = arguments.train_split, list(dict.fromkeys((arguments.train_split, arguments.test_split)))
    if kind == "shapes":
        sizes = {arguments.test_split: arguments.shapes_test, train: arguments.shapes_train}
        return [split for split in both if sizes[split]], lambda split: ShapesSource(
            sizes[split], seed=0 if split == train else 1, size=arguments.image_size
        )
    if kind == "table":
        tables = load_tables(arguments)

        def source_of(split: str) -> ImageSource:
            table = tables[split]
            return open_table(table, known_columns(name, table.column_names, arguments), split)

        return list(tables), source_of
    if kind == "shards":
        splits = [split for split in both if _shards(arguments, split)] if "{split}" in dataset else [train]
        return splits, lambda split: TarSource(dataset, _shards(arguments, split), arguments.image_column)
    pattern = os.path.expanduser(dataset)
    if "{split}" in dataset:
        paths = {split: pattern.replace("{split}", split) for split in both}
        splits = [split for split in both if _exists(paths[split])]
        return splits, lambda split: _open_paths(kind, arguments, paths[split]).source(None)
    opened = _open_paths(kind, arguments, pattern)
    splits = list(opened.splits)
    return splits or [train], lambda split: opened.source(split if splits else None)


def _open_paths(kind: str, arguments: DataArguments, path: str) -> ImageFolder | ImageList:
    if kind == "list":
        return ImageList(Path(path), arguments)
    is_open = "{split}" not in arguments.dataset
    if os.path.isdir(path):
        return open_folder(arguments.dataset, Path(path), find_splits=is_open)
    return open_glob(arguments.dataset, path, find_splits=is_open)


def _exists(pattern: str) -> bool:
    return any(
        os.path.lexists(path) or next(glob.iglob(path, recursive=True), None) for path in expand_braces(pattern)
    )


def _kind(dataset: str) -> Literal["shapes", "shards", "folder", "list", "glob", "table"]:
    if dataset == "shapes":
        return "shapes"
    if "://" in dataset:
        raise InputError(
            f"data.dataset: {dataset.split('?')[0]} is elsewhere; set data.streaming=true, or copy it here"
        )
    if dataset.endswith((".tar", ".tar}")):
        return "shards"
    path = Path(dataset).expanduser()
    if path.is_dir():
        return "table" if is_saved(path) or any(path.rglob("*.parquet")) else "folder"
    if extension(dataset) in LIST_EXTENSIONS:
        if "{split}" not in dataset and not path.exists():
            raise InputError(f"data.dataset: there is no list {dataset}; name one, or write {{split}} for the split")
        return "list"
    if path.exists():
        raise InputError(f"data.dataset: {dataset} is a file; name the folder that it is in")
    if dataset.endswith((".parquet", ".parquet}")):
        raise InputError(f"data.dataset: name the folder of {dataset}, or set data.streaming=true for a pattern")
    if glob.has_magic(dataset) or "{" in dataset:
        return "glob"
    if dataset.startswith((".", "~", os.sep)) or dataset.count("/") > 1:
        raise InputError(f"data.dataset: there is no folder {dataset}")
    return "table"


def _known_split(arguments: DataArguments, split: str, splits: list[str]) -> str:
    """Returns the name by which the set knows a split."""
    found = _find(arguments, split, splits)
    if found is None:
        raise InputError(
            f"data: {arguments.dataset} has no split {split!r}; available: {', '.join(splits) or 'none'} "
            "(data.train_split and data.test_split name them)"
        )
    return found


def _find(arguments: DataArguments, split: str, splits: list[str]) -> str | None:
    return find_split(own_split(arguments.dataset, split, splits), splits)


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
    resolved = resolve_dataset(arguments)
    kind, folder = _kind(resolved.dataset), Path(resolved.dataset).expanduser()
    if kind in ("shapes", "list", "glob") or is_saved(folder):
        raise InputError(f"data.streaming: {arguments.dataset} is not made of shards; leave out data.streaming")
    with loading(arguments.dataset):
        path = str(folder) if folder.is_dir() else resolved.dataset
        files = datasets.load_dataset_builder(path, resolved.dataset_config).config.data_files or {}
    return list(files[_known_split(arguments, split, list(files))])
