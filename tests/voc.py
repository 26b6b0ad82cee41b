"""A tiny set in Pascal VOC's own format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""
SQUARE = ("dog", 0, (33, 17, 64, 48))  # from pixel 33 to pixel 64, counted from 1


def write_annotation(path: Path, objects: list[tuple[str, int, tuple[int, int, int, int]]]) -> None:
    """Writes an annotation of objects (name, difficult, corners from 1)."""
    found = "".join(OBJECT.format(name=name, difficult=difficult, box=box) for name, difficult, box in objects)
    path.write_text(f"<annotation><size><width>96</width><height>96</height></size>{found}</annotation>")


def write_voc(root: Path, year: str = "2007", **splits: list[str]) -> Path:
    """Writes VOC of one year under `root`, images of 96 pixels with a bright square, and returns its folder."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    pixels = np.full((96, 96, 3), 50, np.uint8)
    pixels[16:48, 32:64] = 220
    for split, names in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            write_annotation(folder / "Annotations" / f"{name}.xml", [SQUARE])
    return folder
