"""How every figure looks, and how it is written: PNG and SVG files, and SVG that takes the colors of the page.

Colors are those of Okabe and Ito, which color-blind readers tell apart, darkened where white paper needs it; runs
differ by marker too. Sizes are in inches, so that lines and letters have one size in all figures.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

INK, FAINT, PAPER = "#1b1f24", "#c8cdd3", "#fefefe"
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#b3589a", "#3a97d3"),
    *("#b07d00", "#59636e", "#8c2d04", "#5b3fa0", "#7f8a00"),
)
DARK_COLORS = (
    *("#4aa8e0", "#f0803c", "#2fc79a", "#dd8fc4", "#86ccf5"),
    *("#e0b040", "#a9b4c0", "#d9764f", "#a896f0", "#c5cf4a"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
LONGEST_NAME = 30

_CHARACTER = 0.068  # inches, of a letter of the legend
_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titley": 1.03,  # which spares matplotlib the search for a place
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": PAPER,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.color": INK,
    "text.parse_math": False,  # names of runs and layers are text, also with a dollar sign
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as files and for the page.

    Attributes:
        name: Name of its files.
        title: Heading.
        alt: What it shows, in words.
        caption: How to read it.
        svg: SVG to be put into a page.
        files: The files.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    files: tuple[Path, ...]


def style() -> Any:
    """Returns the context in which figures are made and saved."""
    return matplotlib.rc_context(_RC)


def color(i: int) -> str:
    """Color of the i-th run, stage or class."""
    return COLORS[i % len(COLORS)]


def run_style(i: int) -> dict[str, Any]:
    """Color, marker and dashes of the i-th run's curves."""
    return {"color": color(i), "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}


def page_colors() -> str:
    """Returns the colors as variables of the page's style, for light paper and dark."""
    pairs = zip(COLORS, DARK_COLORS, strict=True)
    lines = [f"--c{i}: light-dark({light}, {dark});" for i, (light, dark) in enumerate(pairs)]
    return f":root {{ {' '.join(lines)} }}\n"


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """Cuts the middle out of a long name."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[-(longest - 1 - head) :]}"


def panels(
    n: int,
    *,
    columns: int = 3,
    width: float = 3.2,
    height: float = 2.1,
    left: float = 0.7,
    gap: tuple[float, float] = (0.72, 0.72),
    top: float = 0.35,
    bottom: float = 0.5,
    right: float = 0.12,
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of n panels in rows.

    Args:
        n: Number of panels.
        columns: Panels of a row, at most.
        width: Width of a panel's axes in inches.
        height: Height of a panel's axes in inches.
        left: Margin for the labels of the first column.
        gap: Width and height between panels.
        top: Margin for titles and, above them, a legend.
        bottom: Margin for the labels of the last row.
        right: Margin of the last column.
    """
    columns = min(n, columns)
    rows = -(-n // columns)
    size = left + columns * width + (columns - 1) * gap[0] + right, top + rows * height + (rows - 1) * gap[1] + bottom
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axes = []
    for i in range(n):
        row, column = divmod(i, columns)
        x = left + column * (width + gap[0])
        y = size[1] - top - row * (height + gap[1]) - height
        axes.append(figure.add_axes((x / size[0], y / size[1], width / size[0], height / size[1])))
    return figure, axes


def legend_height(labels: Sequence[str], width: float) -> float:
    """Returns the inches that `add_legend` takes in a figure of a width in inches; 0 for at most one label."""
    return 0.0 if len(labels) < 2 else 0.12 + 0.2 * -(-len(labels) // _legend_columns(labels, width))


def add_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Puts a legend over the panels, unless there is one label only."""
    if len(labels) < 2:
        return
    columns = _legend_columns(labels, figure.get_figwidth())
    figure.legend(
        handles, labels, loc="upper left", ncols=columns, borderaxespad=0.3, handlelength=2.6, columnspacing=1.4
    )


def _legend_columns(labels: Sequence[str], width: float) -> int:
    entry = 0.55 + _CHARACTER * max(map(len, labels))
    return max(1, min(len(labels), int((width - 0.2) / entry)))


def plot_curve(axes: Axes, x: Sequence[float], y: Sequence[float], i: int) -> None:
    """Draws the i-th run's curve; a lone point is seen too, and markers stay few."""
    axes.plot(x, y, **run_style(i), markevery=max(1, len(x) // 8))


def set_ticks(axes: Axes, *, log: str = "") -> None:
    """Returns axes few ticks with short labels; called when the limits are final.

    Args:
        axes: The axes.
        log: The axes that are logarithmic, say "xy".
    """
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in log:
            low, high = (float(np.log10(limit)) for limit in axis.get_view_interval())
            powers = 10.0 ** np.arange(np.floor(low), np.ceil(high) + 1, max(1, round((high - low) / 6)))
            steps = (1, 2, 5) if high - low < 1.6 else (1,)
            axis.set_major_locator(FixedLocator([step * power for power in powers for step in steps]))
            axis.set_major_formatter(FuncFormatter(_decimal if len(steps) > 1 else _power_of_ten))
            axis.set_minor_locator(NullLocator())
        else:
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(_decimal))


def _decimal(value: float, _: int) -> str:
    return f"{value:.5g}".replace("e-0", "e-").replace("e+0", "e")


def _power_of_ten(value: float, _: int) -> str:
    power = round(float(np.log10(value)))
    superscripts = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    return f"{10**power}" if 0 <= power <= 3 else f"10{str(power).translate(superscripts)}"


def is_wide(values: Sequence[float]) -> bool:
    """Says whether values want a logarithmic axis: positive, over more than two powers of ten."""
    finite = [value for value in values if np.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 100 * min(finite)


def save(figure: Figure, folder: Path, name: str, *, title: str, alt: str, caption: str, dpi: int = 144) -> Drawn:
    """Writes a figure as PNG and SVG, and makes the SVG of the page from the latter."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's fonts know more than the PNG's
        figure.savefig(png, dpi=dpi)
        figure.savefig(buffer, format="svg", dpi=dpi, metadata={"Date": None})
    svg.write_text(buffer.getvalue(), encoding="utf-8")
    inline = inline_svg(buffer.getvalue(), name)
    return Drawn(name=name, title=title, alt=alt, caption=caption, svg=inline, files=(png, svg))


_COLOR = re.compile(r"(fill|stroke|stop-color): (#[0-9a-f]{6})")
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    PAPER: "none",
    **{color: f"var(--c{i})" for i, color in enumerate(COLORS)},
}


def inline_svg(text: str, prefix: str) -> str:
    """Makes matplotlib's SVG fit for a page: without prolog, with ids of its own, in the colors of the page's theme.

    The page names `--ink`, `--faint` and `--c0` to `--c9`; other colors stay as they are.
    """
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)  # a style would be the whole page's
    head, rest = svg.split(">", 1)
    width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]
    view_box = re.search(r'viewBox="[^"]+"', head)[0]  # type: ignore[index]
    rest = re.sub(r'(<[^<>]*? id=")', rf"\1{prefix}-", rest)
    rest = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}-", rest)
    rest = _COLOR.sub(lambda found: f"{found[1]}: {_VARIABLES.get(found[2], found[2])}", rest)
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} {view_box} width="{width * 4 / 3:.0f}" aria-hidden="true" focusable="false">{rest}'
