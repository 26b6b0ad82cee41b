"""Folders and globs of images: what they hold, and which of their folders are splits and classes."""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hf_ssl_or.data.image_files import FileSource, extension, image_extensions, printable, report_left_out
from hf_ssl_or.data.labels import encode_labels
from hf_ssl_or.data.splits import SPLITS, common_folders, splits_in
from hf_ssl_or.data.webdataset import expand_braces
from hf_ssl_or.errors import InputError

_NONE: frozenset[str] = frozenset()
_logger = logging.getLogger(__name__)


@dataclass
class ImageFolder:
    """What a folder or a glob holds.

    Attributes:
        name: What the user calls it.
        root: The folder; of a glob, the part before its first sign.
        images: Paths of the images below it, with slashes, sorted.
        others: Paths of the other files.
        splits: Paths of the images of each split, under the library's name and the folder's own; empty without splits.
        unused: Paths of images that are in none of the splits.
        class_folders: Folder of an image -> the same without those that only lead to a split; "" if none is left.
    """

    name: str
    root: Path
    images: list[str]
    others: list[str]
    splits: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    class_folders: dict[str, str] = field(default_factory=dict)

    def source(self, split: str | None) -> FileSource:
        """Opens a split, or all images, and logs which files are left out.

        If every image is in one of two or more subfolders these are the classes; else the images are unlabeled.

        Raises:
            InputError: What bears the name of an image is no file (a pipe, a device).
        """
        paths = self.images if split is None else self.splits[split]
        if self.splits and split is not None:
            report_left_out(self.name, (path for path in self.others if _may_be_of(os.path.dirname(path), split)))
        else:
            report_left_out(self.name, self.others)
        if self.unused:
            where = Counter(path.split("/")[0] if "/" in path else "no folder" for path in self.unused)
            named = ", ".join(f"{printable(name)} ({count:,})" for name, count in where.most_common(10))
            _logger.warning("%s: left out %d images that are in no split: %s", self.name, len(self.unused), named)
        labels, class_names = None, None
        folders = [os.path.dirname(path) for path in paths]
        classes = [self.class_folders.get(folder, folder).split("/", 1)[0] for folder in folders]
        if all(classes) and len(set(classes)) > 1:
            labels, class_names = encode_labels(classes)
        return FileSource(self.name, self.root, paths, labels, class_names)


def open_folder(name: str, folder: Path, *, find_splits: bool = True) -> ImageFolder:
    """Lists the images of a folder, at any depth; hidden files and folders are left out.

    Args:
        name: What the user calls it.
        folder: Where it is.
        find_splits: Whether folders and files whose names say so are splits, as for the `datasets` library.

    Raises:
        InputError: A folder cannot be read, or it holds tar files only, or its names leave open what is a split.
    """
    found = ImageFolder(name, folder, *_images_and_others(_walk(folder)))
    tars = [path for path in found.others if extension(path) == ".tar"]
    if tars and not found.images:
        raise InputError(
            f"data.dataset: {name} holds no images, but tar files ({len(tars)}); name them by a pattern: "
            f"data.dataset='{_tar_pattern(folder, tars)}'"
        )
    return _with_splits(found, is_glob=False) if find_splits else found


def open_glob(name: str, pattern: str, *, find_splits: bool = True) -> ImageFolder:
    """Lists the images that a pattern matches: *, ?, [abc], {a,b}, {00..09}, and ** for any folders.

    A name that braces spell out may also be that of a folder, for all that it holds.

    Raises:
        InputError: It matches folders only.
    """
    root = os.path.dirname(re.split(r"[*?\[{]", pattern, maxsplit=1)[0])
    in_loop = functools.cache(_in_loop)
    found: set[str] = set()
    folders = 0
    for option in expand_braces(pattern):
        if not glob.has_magic(option):
            is_folder = os.path.isdir(option)
            found.update(os.path.join(option, path) for path in _walk(Path(option)) if is_folder)
            found.update([] if is_folder else [option])
            continue
        for path in glob.iglob(option, recursive=True):
            if os.path.isdir(path):
                folders += 1
            elif not in_loop(os.path.dirname(path)):
                found.add(path)
    if folders and not found:
        raise InputError(f"data.dataset: {name} matches folders only; write {name.rstrip('/')}/** for their files")
    paths = (Path(os.path.relpath(path, root or ".")).as_posix() for path in found)
    listed = ImageFolder(name, Path(root), *_images_and_others(paths))
    return _with_splits(listed, is_glob=True) if find_splits else listed


def _walk(folder: Path) -> Iterator[str]:
    """Lists the files below a folder by path relative to it, with slashes; hidden folders are left out.

    Links to folders are followed, but for those that lead back to a folder that they are in.
    """
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(root, name)]
        inner = "" if root == str(folder) else Path(root).relative_to(folder).as_posix() + "/"
        yield from (inner + name for name in files)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"data.dataset: cannot read the folder {error.filename} ({error.strerror})") from error


def _leads_back(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    if not os.path.islink(path):
        return False
    there, here = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath([there, here]) == there


def _in_loop(folder: str) -> bool:
    parent, name = os.path.split(folder)
    return bool(name) and (_leads_back(parent, name) or _in_loop(parent))


def _images_and_others(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    known = image_extensions()
    images: list[str] = []
    others: list[str] = []
    for path in sorted(paths):
        is_image = extension(path) in known and not os.path.basename(path).startswith(".")
        (images if is_image else others).append(path)
    return images, others


def _tar_pattern(folder: Path, tars: list[str]) -> str:
    """Returns a pattern of the tar files beside the first one."""
    inner = os.path.dirname(tars[0])
    names = [os.path.basename(path) for path in tars if os.path.dirname(path) == inner]
    of_splits = len(names) > 1 and {name[:4] for name in names} >= {"trai", "test"}
    return str(folder / inner / ("{split}*.tar" if of_splits else "*.tar"))


# ---------------------------------------------------------------------------------------------------------------------
# Splits: the outermost folder with the name of one says it; without such folders, the names of the files


@functools.lru_cache(10_000)
def _split_place(folder: str) -> int | None:
    """Returns which part of the path of a folder has the name of a split."""
    return next((k for k, part in enumerate(folder.split("/")) if splits_in(part)), None)


def _may_be_of(folder: str, split: str) -> bool:
    place = _split_place(folder)
    part = "" if place is None else folder.split("/")[place]
    return place is None or split == part or split in splits_in(part)


def _with_splits(found: ImageFolder, *, is_glob: bool) -> ImageFolder:
    """Finds the splits; a glob says itself which files are meant: what reads like one split among others is none."""
    folders = sorted({os.path.dirname(path) for path in found.images})
    parts = {folder: folder.split("/") for folder in folders}
    places = {folder: place for folder in folders if (place := _split_place(folder)) is not None}
    if not places:
        return _with_splits_of_files(found)
    own = {folder: parts[folder][place] for folder, place in places.items()}
    splits = _NONE.union(*map(splits_in, own.values()))
    doubtful = {folder: place for folder, place in places.items() if len(splits_in(own[folder])) > 1}
    others = {parts[folder][0] for folder in folders if folder and folder not in places}
    if not doubtful and len(splits) == 1 and others:
        doubtful = places
    named = sorted({printable("/".join(parts[folder][: place + 1])) for folder, place in doubtful.items()})
    # A train is also a class of pictures, and where no folder reads like another split none can leak.
    are_classes = splits == {"train"} and len(others) > 1 and not any("/" in folder for folder in folders)
    if doubtful and (is_glob or are_classes):
        _logger.warning("%s: no split, but read as a folder like the others: %s", found.name, ", ".join(named))
        return found
    if doubtful:
        others -= {parts[folder][0] for folder in doubtful}
        beside = (
            f" beside {', '.join(map(printable, sorted(others)[:5]))}{' ...' if len(others) > 5 else ''}"
            if others
            else ""
        )
        meant = " or ".join(sorted(_NONE.union(*(splits_in(own[folder]) for folder in doubtful))))
        raise InputError(
            f"data.dataset: in {found.name}, {', '.join(named[:5])}{beside} may be a split ({meant}) or not; name "
            f"the folder to train on, rename it, or write {found.root}/**/* if it is one like the others"
        )
    common = common_folders([tuple(parts[folder][:place]) for folder, place in places.items()])
    found.class_folders = {
        folder: "/".join(parts[folder][common:place] + parts[folder][place + 1 :]) for folder, place in places.items()
    }
    found.unused = [path for path in found.images if os.path.dirname(path) not in places]
    names = [split for split in SPLITS if split in splits]
    for name in (*names, *sorted(set(own.values()) - set(names))):
        of_split = {folder for folder in places if name == own[folder] or name in splits_in(own[folder])}
        found.splits[name] = [path for path in found.images if os.path.dirname(path) in of_split]
    return found


def _with_splits_of_files(found: ImageFolder) -> ImageFolder:
    """Splits by the names of the files where all have that of a split."""
    named = {path: names for path in found.images if (names := splits_in(os.path.basename(path)) - {"unlabeled"})}
    splits = _NONE.union(*set(named.values()))
    if not splits - {"train"}:
        return found
    if len(named) == len(found.images) and all(len(names) == 1 for names in named.values()):
        found.splits = {name: [path for path in named if name in named[path]] for name in SPLITS if name in splits}
        return found
    examples = ", ".join(printable(next(path for path in named if split in named[path])) for split in sorted(splits))
    count = f"{len(named)} of {len(found.images)} files are named like splits"
    if "train" in splits and 2 * len(named) > len(found.images):
        raise InputError(
            f"data.dataset: in {found.name}, {count}, such as {examples}; put each split into a folder of "
            "its name, or write a pattern of the files to train on"
        )
    _logger.warning("%s: %s (%s), and are read as images like the others", found.name, count, examples)
    return found
