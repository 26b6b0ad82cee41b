"""One page of one or more runs: a single file that needs no network, with the figures inside."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_ssl_or.errors import InputError
from hf_ssl_or.report import tables
from hf_ssl_or.report.curves import plot_collapse, plot_losses, plot_throughput
from hf_ssl_or.report.embeddings import check_umap, plot_embedding, plot_neighbors
from hf_ssl_or.report.filters import plot_errors, plot_filters
from hf_ssl_or.report.spectrum_plots import plot_spectra_compared, plot_spectra_of_runs
from hf_ssl_or.report.style import Drawn, page_colors, style
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.reader import RunRecord, read_runs

_PAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture of views that one or more runs share."""

    names: list[str]
    source: str


def write_report(
    folders: Sequence[Path], *, output: Path | None = None, figures: Path | None = None, umap: bool = False
) -> tuple[Path, list[Path]]:
    """Draws the figures of runs and writes one HTML page.

    Args:
        folders: Folders of 1 to 10 runs, finished or not.
        output: The page; None writes `report.html` into the folder of one run, or into the current one.
        figures: Where PNG and SVG files go; None takes `figures/` in the folder of one run, or beside the page.
        umap: Also draws features by UMAP.

    Returns:
        The page, and the figures' files.

    Raises:
        InputError: A folder is no run's, there are too many, UMAP is missing, or a file cannot be written.
    """
    if umap:
        check_umap()
    runs = read_runs(folders)
    alone = runs[0].folder if len(runs) == 1 else None
    output = output or (alone or Path()) / layout.REPORT
    figures = figures or (alone or output.parent) / layout.FIGURES
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figures.mkdir(parents=True, exist_ok=True)
        sections = plot_figures(runs, figures, umap=umap)
        output.write_text(render_page(runs, sections, base=output.parent), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename or output}: cannot be written ({error.strerror or error})") from error
    return output, [file for drawn in sections.values() for figure in drawn for file in figure.files]


def plot_figures(runs: Sequence[RunRecord], folder: Path, *, umap: bool = False) -> dict[str, list[Drawn]]:
    """Draws whatever the runs hold, by section of the page."""
    with style():
        sections: dict[str, list[Drawn | None]] = {
            "training": [plot_losses(runs, folder), plot_throughput(runs, folder)],
            "collapse": [plot_collapse(runs, folder)],
            "spectra": [plot_spectra_compared(runs, folder), plot_spectra_of_runs(runs, folder)],
            "weights": [plot_errors(runs, folder), plot_filters(runs, folder)],
            "pictures": [*_neighbors(runs, folder), *plot_embedding(runs, folder, umap=umap)],
        }
    return {name: [figure for figure in drawn if figure] for name, drawn in sections.items()}


def _neighbors(runs: Sequence[RunRecord], folder: Path) -> Iterator[Drawn | None]:
    for i, run in enumerate(runs, 1):
        file, of = ("neighbors", "") if len(runs) == 1 else (f"neighbors-{i}", f" of {run.name}")
        yield plot_neighbors(run, folder, file, title=f"Nearest neighbors{of}")


def render_page(runs: Sequence[RunRecord], sections: dict[str, list[Drawn]], *, base: Path) -> str:
    """Renders the page; `base` is the folder that links start from."""
    return render(
        "page.html",
        title=f"Report on {runs[0].name}" if len(runs) == 1 else f"Report on {len(runs)} runs",
        runs=runs,
        sections={name: [on_page(figure, base) for figure in drawn] for name, drawn in sections.items()},
        previews=_previews(runs),
        facts=tables.facts(runs),
        summary=tables.summary(runs),
        evaluations=tables.evaluations(runs),
        differences=tables.recipe_differences(runs),
        environments=tables.environments(runs),
        recipes={run.name: clean_lines(yaml.safe_dump(run.recipe, sort_keys=False, width=100)) for run in runs},
    )


def render(template: str, **values: Any) -> str:
    """Renders a page of this folder that extends `frame.html`."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_PAGE / "page.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        css=Markup(page_colors() + (_PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=importlib.metadata.version("hf-ssl-or"),
        **values,
    )


def clean_lines(text: str) -> str:
    """Cleans text of several lines."""
    return "\n".join(map(printable, text.splitlines()))


def on_page(figure: Drawn, base: Path) -> dict[str, Any]:
    """Returns a figure as `parts.html` shows it, with links from the folder `base`."""
    links = {file.suffix.removeprefix(".").upper(): quote(_relative(file, base)) for file in figure.files}
    return {"figure": figure, "svg": Markup(figure.svg), "links": links}


def _relative(file: Path, base: Path) -> str:
    return Path(os.path.relpath(file.resolve(), base.resolve())).as_posix()


def _previews(runs: Sequence[RunRecord]) -> list[Preview]:
    """Returns each picture of views once, with the runs that share it."""
    names: dict[bytes, list[str]] = {}
    for run in runs:
        if run.views_picture is not None:
            names.setdefault(run.views_picture, []).append(run.name)
    return [
        Preview(names=shared, source=f"data:image/png;base64,{base64.b64encode(picture).decode()}")
        for picture, shared in names.items()
    ]
