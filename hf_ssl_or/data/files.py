"""Data sets as files: folders of images, and WebDataset shards."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from hf_ssl_or.data.labels import encode_labels
from hf_ssl_or.errors import InputError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
_MOST_SHARDS = 1_000_000
_SPLITS = ("train", "test", "val", "valid", "validation", "unlabeled", "unlabelled")


def folder_splits(folder: Path) -> list[str]:
    """Names the subfolders that are splits; a class may be called "test" among classes of other names."""
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    splits = [name for name in _SPLITS if name in folders]
    return splits if len(splits) == len(folders) or len(splits) > 1 else []


class FolderSource:
    """A folder of images, at any depth, in sorted order.

    If every image is in one of two or more subfolders these are the classes; else the images are unlabelled.

    Raises:
        InputError: What bears the name of an image is no file (a pipe, a device).
        OSError: A folder or a file cannot be looked at; none is passed over.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self._paths = sorted(_image_paths(folder))
        self.labels, self.class_names = None, None
        if self._paths and all("/" in path for path in self._paths):
            classes = [path.split("/", 1)[0] for path in self._paths]
            if len(set(classes)) > 1:
                self.labels, self.class_names = encode_labels(classes)
        self.fingerprint = _file_key((path, folder / path) for path in self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, i: int) -> Image.Image:
        """Opens image i without decoding it."""
        return Image.open(io.BytesIO((self._folder / self._paths[i]).read_bytes()))

    def describe(self, i: int) -> str:
        """Gives the path of image i."""
        return str(self._folder / self._paths[i])


def _image_paths(folder: Path) -> list[str]:
    """Lists images below a folder by path relative to it, with slashes; hidden files and folders are left out.

    Links to folders are followed, but for those that lead back to a folder that they are in.
    """
    paths = []
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(root, name)]
        names = [name for name in files if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)]
        paths += [Path(root, name).relative_to(folder).as_posix() for name in names]
    return paths


def _raise(error: OSError) -> None:
    raise error


def _leads_back(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    if not os.path.islink(path):
        return False
    there, here = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath([there, here]) == there


def _file_key(files: Iterable[tuple[str, Path]]) -> str:
    """Hashes names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=12)
    for name, path in files:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"data.dataset: {path} is no file (a pipe or a device); remove it")
        digest.update(f"{name}:{found.st_size}:{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset: tar files in which a sample's files share the name up to the first dot


def expand_shards(pattern: str, split: str) -> list[Path]:
    """Lists the shards of a pattern: {split}, {000..009} and {a,b} are filled in, then * and ? are looked up."""
    names = expand_braces(os.path.expanduser(pattern.replace("{split}", split)))
    return [Path(path) for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]


def expand_braces(pattern: str) -> list[str]:
    """Fills in {000..009} and {a,b}, in every combination."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = span.groups()
        options = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        options = found[1].split(",")
    ends = expand_braces(pattern[found.end() :])
    return [pattern[: found.start()] + option + end for option in options for end in ends]


class TarSource:
    """WebDataset shards, uncompressed: images at known places of the files, and `.cls` labels if all images have one.

    Raises:
        InputError: A shard is not a tar file, or is cut off, or damaged between its files.
    """

    def __init__(self, name: str, shards: list[Path]) -> None:
        self.name, self._shards = name, shards
        self._members: list[tuple[int, int, int, str]] = []  # shard, offset, bytes, name
        labels: list[int | str | None] = []
        for number, shard in enumerate(shards):
            members, found = _index_shard(number, shard)
            self._members += members
            labels += found
        self.labels, self.class_names = encode_labels(labels)
        self.fingerprint = _file_key((shard.name, shard) for shard in shards)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, i: int) -> Image.Image:
        """Opens image i without decoding it."""
        shard, offset, size, _ = self._members[i]
        with open(self._shards[shard], "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size)))

    def describe(self, i: int) -> str:
        """Says in which shard image i is, and its name there."""
        shard, _, _, name = self._members[i]
        return f"{name} in {self._shards[shard]}"


def _index_shard(number: int, shard: Path) -> tuple[list[tuple[int, int, int, str]], list[int | str | None]]:
    """Reads the headers of a shard: where its images are, and their labels."""
    images: dict[str, tuple[int, int, int, str]] = {}
    labels: dict[str, int | str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile() or file.startswith("."):
                    continue
                if f".{extension.lower()}".endswith(IMAGE_EXTENSIONS):
                    images.setdefault(key, (number, member.offset_data, member.size, member.name))
                elif extension == "cls":
                    content = archive.extractfile(member)
                    assert content is not None  # a member that is a file has content
                    text = content.read().decode().strip()
                    labels[key] = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text
            _check_end(archive, shard)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.dataset: cannot read {shard} as an uncompressed tar file: {error}") from error
    return list(images.values()), [labels.get(key) for key in images]


def _check_end(archive: tarfile.TarFile, shard: Path) -> None:
    """Looks for the block of zeros that ends an archive: the tar module takes a damaged header for the end."""
    with open(shard, "rb") as file:
        file.seek(archive.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise InputError(
            f"data.dataset: {shard} is cut off or damaged at byte {archive.offset:,} (no further file and no end mark "
            "there); write it anew"
        )
