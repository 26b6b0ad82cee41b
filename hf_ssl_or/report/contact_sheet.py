"""A picture of what was found in a set of images: thumbnails with captions, in rows below headings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.curation import Findings
from hf_ssl_or.report.style import INK, PAPER, shorten

SIDE = 96  # pixels of a thumbnail
COLUMNS = 8
_GAP, _MARGIN, _LINE, _HEADING = 8, 12, 13, 30  # pixels
_LETTERS = 16  # of a caption's line
_FRAME = "#b3589a"
_GROUPS, _OUTLIERS, _QUERIES = 10, 16, 8  # of each, at most


@dataclass(frozen=True)
class Tile:
    """A thumbnail.

    Attributes:
        pixels: (H, W, 3) uint8.
        name: First line of the caption, shortened where it is too long.
        note: Second line.
        marked: Draws a frame, say around the image that the others of its row are compared with.
    """

    pixels: np.ndarray
    name: str
    note: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Section:
    """Rows of thumbnails below a heading; a row has at most `COLUMNS`."""

    heading: str
    rows: Sequence[Sequence[Tile]]


def plot_findings(
    findings: Findings,
    files: Sequence[str],
    thumbnails: Callable[[Sequence[int]], dict[int, np.ndarray]],
    path: Path,
) -> None:
    """Draws the largest groups of near-duplicates, the strongest outliers, and some images with their neighbors.

    Args:
        findings: What was found.
        files: Names of all images.
        thumbnails: Returns pictures (H, W, 3) uint8 of images, by their places.
        path: The PNG.

    Raises:
        InputError: It cannot be written.
    """
    planned = [*_duplicates(findings), *_outliers(findings), *_neighbors(findings)]
    pictures = thumbnails(sorted({int(i) for _, rows in planned for row in rows for i, _, _ in row}))

    def tile(i: int, note: str, marked: bool) -> Tile:
        return Tile(pictures[int(i)], _short(files[i]), note, marked)

    sections = [Section(heading, [[tile(*entry) for entry in row] for row in rows]) for heading, rows in planned]
    plot_contact_sheet(sections, path)


# A heading and its rows of (place of the image, note, whether it is marked).
_Plan = list[tuple[str, list[list[tuple[int, str, bool]]]]]


def _duplicates(findings: Findings) -> _Plan:
    if findings.duplicate_group is None:
        return []
    rows = []
    for members, cosines in findings.groups[:_GROUPS]:
        row = [(i, f"{cosine:.4f}", False) for i, cosine in zip(members, cosines, strict=True)][:COLUMNS]
        rows.append([(members[0], f"group of {len(members)}", True), *row[1:]])
    count = len(findings.groups)
    shown = "" if count <= _GROUPS else f", the largest {_GROUPS}"
    return [(f"Near-duplicates: {count:,} groups, cosine of at least {findings.threshold:.4f}{shown}", rows)]


def _outliers(findings: Findings) -> _Plan:
    score_N = findings.outlier_score
    if score_N is None:
        return []
    top = score_N.argsort(descending=True, stable=True)[:_OUTLIERS].tolist()
    tiles = [(i, f"{float(score_N[i]):.4f}", False) for i in top]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    return [("Outliers, by mean cosine distance to the nearest images", rows)]


def _neighbors(findings: Findings) -> _Plan:
    index_NK, cosine_NK = findings.neighbor_index, findings.neighbor_similarities
    if index_NK is None or cosine_NK is None:
        return []
    rows = []
    for query in torch.linspace(0, len(index_NK) - 1, min(_QUERIES, len(index_NK))).long().tolist():
        pairs = zip(index_NK[query].tolist(), cosine_NK[query].tolist(), strict=True)
        row = [(i, f"{cosine:.4f}", False) for i, cosine in pairs][: COLUMNS - 1]
        rows.append([(query, "", True), *row])
    return [("Some images and their nearest neighbors, by cosine", rows)]


def _short(file: str) -> str:
    """Returns what tells an image from the others of its set: the file's own name, or the row's number."""
    return file.split(" in ")[0].split(" of ")[0].rsplit("/", 1)[-1]


def plot_contact_sheet(sections: Sequence[Section], path: Path) -> None:
    """Writes a PNG.

    Args:
        sections: From the top.
        path: The file.

    Raises:
        InputError: It cannot be written.
    """
    row_height = SIDE + 2 * _LINE + _GAP
    width = 2 * _MARGIN + COLUMNS * SIDE + (COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + sum(_HEADING + row_height * len(section.rows) for section in sections)
    sheet = Image.new("RGB", (width, height), PAPER)
    canvas, y = ImageDraw.Draw(sheet), _MARGIN
    for section in sections:
        canvas.text((_MARGIN, y), section.heading, INK, font=_font(14, bold=True))
        y += _HEADING
        for row in section.rows:
            for column, tile in enumerate(row):
                _draw_tile(sheet, canvas, tile, _MARGIN + column * (SIDE + _GAP), y)
            y += row_height
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise InputError(f"{path}: the contact sheet cannot be written ({error.strerror or error})") from error


def _draw_tile(sheet: Image.Image, canvas: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    picture = Image.fromarray(tile.pixels)
    smaller = min(picture.size) < SIDE  # small images are enlarged with sharp edges, to be seen as they are
    filter_ = Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS
    sheet.paste(picture.resize((SIDE, SIDE), filter_), (x, y))
    if tile.marked:
        canvas.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1), outline=_FRAME, width=2)
    for line, text in enumerate((shorten(tile.name, _LETTERS), tile.note)):
        canvas.text((x, y + SIDE + 1 + line * _LINE), text, INK, font=_font(10))


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
