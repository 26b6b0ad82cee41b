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

from hf_ssl_or.data.image_files import FileSource, extension, image_extensions, report_left_out
from hf_ssl_or.data.labels import encode_labels
from hf_ssl_or.data.splits import SPLITS, common_folders, splits_in
from hf_ssl_or.data.webdataset import expand_braces
from hf_ssl_or.errors import InputError

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
        class_paths: Path of an image -> the same without the folders that only lead to a split.
    """

    name: str
    root: Path
    images: list[str]
    others: list[str]
    splits: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    class_paths: dict[str, str] = field(default_factory=dict)

    def source(self, split: str | None) -> FileSource:
        """Opens a split, or all images, and logs which files are left out.

        If every image is in one of two or more subfolders these are the classes; else the images are unlabelled.

        Raises:
            InputError: What bears the name of an image is no file (a pipe, a device).
        """
        paths = self.images if split is None else self.splits[split]
        if self.splits and split is not None:
            report_left_out(self.name, (path for path in self.others if _may_be_of(path, split)))
        else:
            report_left_out(self.name, self.others)
        if self.unused:
            where = Counter(path.split("/")[0] if "/" in path else "no folder" for path in self.unused)
            named = ", ".join(f"{name} ({count:,})" for name, count in where.most_common(10))
            _logger.warning("%s: left out %d images that are in no split: %s", self.name, len(self.unused), named)
        labels, class_names = None, None
        inner = [self.class_paths.get(path, path) for path in paths]
        if inner and all("/" in path for path in inner):
            classes = [path.split("/", 1)[0] for path in inner]
            if len(set(classes)) > 1:
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


def _split_place(path: str) -> int | None:
    """Returns which of the folders of a path has the name of a split."""
    return next((k for k, part in enumerate(path.split("/")[:-1]) if splits_in(part)), None)


def _may_be_of(path: str, split: str) -> bool:
    place = _split_place(path)
    part = "" if place is None else path.split("/")[place]
    return place is None or split == part or split in splits_in(part)


def _with_splits(found: ImageFolder, *, is_glob: bool) -> ImageFolder:
    """Finds the splits; a glob says itself which files are meant: what reads like one split among others is none."""
    places = {path: place for path in found.images if (place := _split_place(path)) is not None}
    if not places:
        return _with_splits_of_files(found)
    folders = {"/".join(path.split("/")[: place + 1]) for path, place in places.items()}
    options = {folder: splits_in(os.path.basename(folder)) for folder in sorted(folders)}
    splits = frozenset[str]().union(*options.values())
    unused = [path for path in found.images if path not in places]
    others = sorted({path.split("/")[0] for path in unused if "/" in path} - {path.split("/")[0] for path in folders})
    doubtful = [folder for folder in options if len(options[folder]) > 1]
    if not doubtful and len(splits) == 1 and any("/" in path for path in unused):
        doubtful = list(options)
    # A train is also a class of pictures, and where no folder reads like another split none can leak.
    are_classes = splits == {"train"} and len(others) > 1 and all(path.count("/") == 1 for path in found.images)
    if doubtful and (is_glob or are_classes):
        _logger.warning("%s: no split, but taken for a folder like the others: %s", found.name, ", ".join(doubtful))
        return found
    if doubtful:
        beside = f" beside {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
        meant = " or ".join(sorted(frozenset[str]().union(*(options[folder] for folder in doubtful))))
        raise InputError(
            f"data.dataset: in {found.name}, {', '.join(doubtful[:5])}{beside} may be a split ({meant}) or not; name "
            f"the folder to train on, rename it, or write {found.root}/*/* if each folder is a class"
        )
    parts = {path: path.split("/") for path in places}
    common = common_folders([tuple(parts[path][:place]) for path, place in places.items()])
    class_paths = {
        path: "/".join(parts[path][common:place] + parts[path][place + 1 :]) for path, place in places.items()
    }
    own = {path: parts[path][place] for path, place in places.items()}
    names = [split for split in SPLITS if split in splits]
    members = {split: [path for path in places if split in splits_in(own[path])] for split in names}
    for name in sorted(set(own.values()) - set(names)):
        members[name] = [path for path in places if own[path] == name]
    found.splits, found.unused, found.class_paths = members, unused, class_paths
    return found


def _with_splits_of_files(found: ImageFolder) -> ImageFolder:
    """Splits by the names of the files where all have that of a split."""
    of_file = {path: splits_in(os.path.basename(path)) - {"unlabeled"} for path in found.images}
    named = {path: splits for path, splits in of_file.items() if splits}
    splits = frozenset[str]().union(*named.values())
    if not splits - {"train"}:
        return found
    if len(named) == len(found.images) and all(len(options) == 1 for options in named.values()):
        found.splits = {name: [path for path in named if name in named[path]] for name in SPLITS if name in splits}
        return found
    examples = ", ".join(next(path for path in named if split in named[path]) for split in sorted(splits))
    if "train" in splits and 2 * len(named) > len(found.images):
        raise InputError(
            f"data.dataset: in {found.name}, {len(named)} of {len(found.images)} files are named like splits, such as "
            f"{examples}; put each split into a folder of its name"
        )
    _logger.warning(
        "%s: %d of %d files are named like splits (%s), and are taken for images like the others",
        found.name,
        len(named),
        len(found.images),
        examples,
    )
    return found
