"""Small shards of images whose first pixel says which row they are."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 8


def picture(row: int) -> bytes:
    """A PNG of SIDE x SIDE pixels: noise, and the row's number in the first pixel."""
    pixels = np.random.default_rng(row).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[0, 0] = row >> 16, row >> 8 & 255, row & 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows_of(images_BHWC) -> list[int]:
    red, green, blue = images_BHWC[:, 0, 0].long().T
    return (red << 16 | green << 8 | blue).tolist()


def write_tables(
    folder: Path, sizes: list[int], group: int, *, struct: bool = True, column: str = "image"
) -> list[Path]:
    """Writes parquet files of `sizes` rows in row groups of `group`, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, row = [], 0
    for number, size in enumerate(sizes):
        contents = [picture(row + i) for i in range(size)]
        cells = [{"bytes": content, "path": None} for content in contents] if struct else contents
        paths.append(folder / f"train-{number:05d}.parquet")
        table = pa.table({"id": list(range(row, row + size)), column: cells})
        pq.write_table(table, paths[-1], row_group_size=group, compression="none")
        row += size
    return paths


def write_tars(folder: Path, sizes: list[int]) -> list[Path]:
    """Writes WebDataset shards of `sizes` samples, each with an image, a caption and a class, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, row = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"train-{number:03d}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for i in range(row, row + size):
                name = f"some/{i:06d}" if i % 7 else f"some/{'long' * 30}-{i:06d}"  # which takes a header of its own
                for ending, content in ((".cls", b"3"), (".png", picture(i)), (".txt", b"words")):
                    member = tarfile.TarInfo(name + ending)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        row += size
    return paths
