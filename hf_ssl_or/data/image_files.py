"""Image files: which names are images, which files are left out, and a source over paths."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from hf_ssl_or.data.labels import content_key
from hf_ssl_or.errors import InputError
from hf_ssl_or.models import image_conversion
from hf_ssl_or.models.image_conversion import open_image

# Formats that Pillow registers but hands to other programs, has no pixels of, or only passes on.
_NOT_RASTER = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC")
_METADATA = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".md", ".rst", ".html", ".pdf", ".db",
    ".ini", ".log", ".py", ".sh", ".cls", ".lock",
)  # fmt: skip
_METADATA_NAMES = ("license", "licence", "readme", "copying", "notice", "authors", "citation", "changelog", "makefile")
_HEIF, _MEDICAL = "pip install pillow-heif reads", "pip install 'hf-ssl-or[medical]' reads"
_HINTS = {".heic": _HEIF, ".heif": _HEIF, ".dcm": _MEDICAL, ".dicom": _MEDICAL}
_logger = logging.getLogger(__name__)


def image_extensions() -> frozenset[str]:
    """Returns the extensions of images that can be opened here: Pillow's and its plug-ins', arrays, TIFF, DICOM."""
    pillow = (name for name, form in Image.registered_extensions().items() if form in Image.OPEN)
    raster = {name for name in pillow if Image.EXTENSION[name] not in _NOT_RASTER}
    medical = {".dcm", ".dicom"} if image_conversion.pydicom is not None else set()
    return frozenset(raster | medical | {".npy", ".npz", ".tif", ".tiff"})


def extension(path: str) -> str:
    """Returns the last extension of a path in lower case."""
    return os.path.splitext(path)[1].lower()


def printable(text: str) -> str:
    """Returns a name from outside for a message of one line."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:200])


def report_left_out(name: str, files: Iterable[str]) -> None:
    """Logs in one line, by extension, which files of a data set are not read; metadata and hidden files as a note."""
    kinds: Counter[str] = Counter()
    metadata: Counter[str] = Counter()
    for path in map(PurePosixPath, files):
        if path.name.startswith("."):
            metadata["hidden"] += 1
        elif path.suffix.lower() in _METADATA or path.name.lower() in _METADATA_NAMES:
            metadata[path.suffix or path.name] += 1
        else:
            kinds[path.suffix or "no extension"] += 1
    if kinds:
        _logger.warning("%s: left out %s%s", name, _count(kinds), _advice(kinds))
    if metadata:
        _logger.info("%s: left out %s, which are no images", name, _count(metadata))


def _count(kinds: Counter[str]) -> str:
    listed = ", ".join(f"{printable(kind)} ({count:,})" for kind, count in kinds.most_common())
    return f"{kinds.total():,} file{'s' * (kinds.total() > 1)}: {listed}"


def _advice(kinds: Iterable[str]) -> str:
    """Returns what to install for the kinds that a package reads."""
    by_hint: dict[str, list[str]] = {}
    for kind in kinds:
        by_hint.setdefault(_HINTS.get(kind.lower(), ""), []).append(kind)
    if "" not in by_hint and len(by_hint) == 1:
        return f"; {next(iter(by_hint))} them"
    return "".join(f"; {hint} {', '.join(names)}" for hint, names in by_hint.items() if hint)


class FileSource:
    """Images at paths.

    A file that is missing, or a link that leads nowhere, is an image that cannot be read.

    Args:
        name: What the user calls the data set.
        root: Folder that the paths start from.
        paths: Paths of the images, relative to it.
        labels: int64, (n,), or None.
        class_names: Names of the labels, or None.
        places: Says where path i is written, for messages, if anywhere.
        key: What else the content depends on.

    Raises:
        InputError: What bears the name of an image is no file (a pipe, a device).
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Sequence[str],
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        *,
        places: Callable[[int], str] | None = None,
        key: str = "",
    ) -> None:
        self.name, self.labels, self.class_names = name, labels, class_names
        self._root, self._paths, self._places = root, paths, places
        self.fingerprint = content_key(file_key((path, root / path) for path in paths) + key, labels)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens image i."""
        if not self._paths[i]:
            raise ValueError("the cell is empty")
        return open_image(self._root / self._paths[i])

    def describe(self, i: int) -> str:
        """Returns the path of image i, and where it is written."""
        path = str(self._root / self._paths[i])
        return path if self._places is None else f"{path} ({self._places(i)})"


def file_key(files: Iterable[tuple[str, Path]]) -> str:
    """Hashes names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=12)
    for name, path in files:
        try:
            found = path.stat()
        except (OSError, ValueError):  # missing, or a name that no file can have
            state = "missing"
        else:
            is_folder = stat.S_ISDIR(found.st_mode)  # which is an image that cannot be read
            if not is_folder and not stat.S_ISREG(found.st_mode):
                raise InputError(f"data.dataset: {path} is no file (a pipe or a device); remove it")
            state = "folder" if is_folder else f"{found.st_size}:{found.st_mtime_ns}"
        digest.update(f"{name}:{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def path_inside(folder: Path, path: str, place: str) -> str:
    """Returns a path that a list or a column holds, relative to the folder of the list or data set.

    Args:
        folder: The folder, which the path must not leave.
        path: Relative to the folder, or absolute.
        place: Where the path is written, for the message.

    Raises:
        InputError: It is a URL, or leads out of the folder.
    """
    if "://" in path or path.startswith("data:"):
        raise InputError(
            f"data.dataset: {place}: {printable(path)} is a URL; copy the images here and write their paths"
        )
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        full = os.path.normpath(os.path.join(root, path))
        if os.path.commonpath([root, full]) == root:
            return os.path.relpath(full, root)
    raise InputError(
        f"data.dataset: {place}: {printable(path)} is outside of {folder}; move the list or the images, so that the "
        "images are below its folder"
    )
