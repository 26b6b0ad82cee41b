"""WebDataset shards: tar files in which the files of a sample share a name.

A sample's name ends at the first dot of a file's name, and the rest is a field: `a.jpg`, `a.seg.png` and `a.cls` are
three fields of the sample `a`, of which the first image in the file is read (arrays in .npy and .npz only where there
is no other), or the one that `data.image_column` names. Two things depart from this, because names such as
`2024.05.00-plate.png` and `2024.05.01-plate.png` would be fields of one sample:

* Where the part between the first dot and the last has a dot or begins with a digit, it belongs to the name.
* Fields such as `a.left.png` and `a.right.png` without an `a.png` are refused unless `data.image_column` names one.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hf_ssl_or.data.image_files import extension, file_key, image_extensions, printable, report_left_out
from hf_ssl_or.data.labels import content_key, encode_labels
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.models.image_conversion import open_image

_ARRAYS = (".npy", ".npz")


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


def sample_and_field(path: str) -> tuple[str, str]:
    """Returns the name of the sample that a file is of, and which of its fields the file is: see above."""
    folder, _, file = path.rpartition("/")
    sample, _, rest = file.partition(".")
    middle, _, last = rest.rpartition(".")
    if middle and not re.fullmatch(r"[^\d.][^.]*", middle):
        sample, rest = f"{sample}.{middle}", last
    return f"{folder}/{sample}" if folder else sample, rest.lower()


def is_visible_file(member: tarfile.TarInfo) -> bool:
    """Returns whether a member of a tar file is a file that is not hidden."""
    return member.isfile() and not os.path.basename(member.name).startswith(".")


def choose_image(paths: Sequence[str], wanted: str | None, shard: str) -> int | None:
    """Returns which image of one sample is read; None if the wanted field is not among them.

    Args:
        paths: Paths of the images of a sample, at least one, in the order of the file.
        wanted: The field to read, with or without the extension; None follows the rule above.
        shard: Where the sample is, for the message.

    Raises:
        InputError: The names do not say which one is the sample's.
    """
    fields = [sample_and_field(path)[1] for path in paths]
    if wanted is not None:
        return next((k for k, name in enumerate(fields) if wanted.lower() in (name, os.path.splitext(name)[0])), None)
    pictures = [k for k, path in enumerate(paths) if extension(path) not in _ARRAYS] or list(range(len(paths)))
    is_plain = any("." not in fields[k] for k in pictures)
    if len({fields[k] for k in pictures}) < len(pictures) or (len(pictures) > 1 and not is_plain):
        first, second = (printable(paths[k]) for k in pictures[:2])
        raise InputError(
            f"data.dataset: {first} and {second} in {shard} count as one sample, whose name ends at the first dot; "
            f"name the field to read (data.image_column={printable(fields[pictures[0]])}), or use names without dots"
        )
    return pictures[0]


class TarSource:
    """WebDataset shards, uncompressed: images at known places of the files, and `.cls` labels if all images have one.

    Args:
        name: What the user calls the set.
        shards: The files.
        image_field: Which field of the samples is read, see `choose_image`.

    Raises:
        InputError: A shard is not a tar file, is cut off, or is damaged between its files; names of its images
            collide; or no sample has the field.
    """

    def __init__(self, name: str, shards: list[Path], image_field: str | None = None) -> None:
        self.name, self._shards = name, shards
        self._members: list[tuple[int, int, int, str]] = []  # shard, offset, bytes, name
        labels: list[int | str | None] = []
        others: list[str] = []
        for number, shard in enumerate(shards):
            images, found, left_out = _index_shard(shard, image_field)
            self._members += [(number, image.offset_data, image.size, image.name) for image in images]
            labels += found
            others += left_out
        report_left_out(name, others)
        self.labels, self.class_names = encode_labels(labels)
        files = file_key((shard.name, shard) for shard in shards)
        self.fingerprint = content_key(f"{files}/{image_field}", self.labels)

    def __len__(self) -> int:
        return len(self._members)

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens image i."""
        shard, offset, size, _ = self._members[i]
        with open(self._shards[shard], "rb") as file:
            file.seek(offset)
            return open_image(file.read(size))

    def describe(self, i: int) -> str:
        """Returns the shard of image i, and its name there."""
        shard, _, _, name = self._members[i]
        return f"{name} in {self._shards[shard]}"


def _index_shard(
    shard: Path, image_field: str | None
) -> tuple[list[tarfile.TarInfo], list[int | str | None], list[str]]:
    """Reads the headers of a shard: its images, their labels, and the names of other files."""
    samples: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, int | str] = {}
    others, known = [], image_extensions()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in filter(is_visible_file, archive):
                if extension(member.name) in known:
                    samples.setdefault(sample_and_field(member.name)[0], []).append(member)
                elif extension(member.name) == ".cls":
                    content = archive.extractfile(member)
                    assert content is not None  # a member that is a file has content
                    text = content.read().decode().strip()
                    labels[_stem(member)] = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text
                else:
                    others.append(member.name)
            _check_end(archive, shard)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.dataset: cannot read {shard} as an uncompressed tar file: {error}") from error
    images: list[tarfile.TarInfo] = []
    found: list[int | str | None] = []
    for sample, members in samples.items():
        chosen = choose_image([member.name for member in members], image_field, str(shard))
        if chosen is not None:
            images.append(members[chosen])
            found.append(labels.get(_stem(members[chosen]), labels.get(sample)))
    if samples and not images:
        fields = {sample_and_field(member.name)[1] for members in samples.values() for member in members}
        raise unknown("data.image_column", str(image_field), fields)
    return images, found, others


def _stem(member: tarfile.TarInfo) -> str:
    return member.name.rpartition(".")[0]


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
