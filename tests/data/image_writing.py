"""Small images of one color, written as files, and read back as numbers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_source import ImageSource
from hf_ssl_or.data.sources import load_source
from hf_ssl_or.models.image_conversion import to_pixels


def picture(value: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (value, 255 - value, 7))


def png(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    return file.getvalue()


def values(source: ImageSource) -> list[int]:
    """The numbers of all images of a source."""
    return [int(np.asarray(to_pixels(source.read(i)))[0, 0, 0]) for i in range(len(source))]


def save(folder: Path, *names: str) -> Path:
    """Writes image 0, 1, ... under names below a folder."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(folder / name, "JPEG" if name.lower().endswith(".jpg") else "PNG")
    return folder


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def load(dataset: object, split: str = "train", **more: object) -> ImageSource:
    return load_source(DataArguments(dataset=str(dataset), **more), split)
