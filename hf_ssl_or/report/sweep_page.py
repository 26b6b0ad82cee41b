"""What is drawn of a sweep: tables as Markdown, figures, and one HTML page."""

from __future__ import annotations

from pathlib import Path

from hf_ssl_or.errors import InputError
from hf_ssl_or.report import sweep_tables
from hf_ssl_or.report.html import on_page, render
from hf_ssl_or.report.style import Drawn, style
from hf_ssl_or.report.sweep_plots import plot_sweep
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.results import read_record
from hf_ssl_or.runs.sweep_results import MARK, TABLE, SweepResults


def is_sweep(folder: Path) -> bool:
    """Says whether a folder is a sweep's."""
    return (folder / MARK).is_file()


def write_sweep_report(
    root: Path, *, output: Path | None = None, figures: Path | None = None
) -> tuple[Path, list[Path]]:
    """Draws a sweep from its `results.json`: `table.md`, figures and one HTML page.

    Args:
        root: Folder of the sweep.
        output: The page; None writes `report.html` into the sweep's folder.
        figures: Where PNG and SVG files go; None takes `figures/` there.

    Returns:
        The page, and the figures' files.

    Raises:
        InputError: The results are missing, damaged or of another version, or a file cannot be written.
    """
    results = read_record(SweepResults, root / layout.RESULTS)
    output, figures = output or root / layout.REPORT, figures or root / layout.FIGURES
    try:
        (root / TABLE).write_text(sweep_tables.markdown(results), encoding="utf-8")
        output.parent.mkdir(parents=True, exist_ok=True)
        figures.mkdir(parents=True, exist_ok=True)
        with style():
            drawn = plot_sweep(results, figures)
        output.write_text(render_sweep(results, drawn, base=output.parent), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename or output}: cannot be written ({error.strerror or error})") from error
    return output, [file for figure in drawn for file in figure.files]


def render_sweep(results: SweepResults, drawn: list[Drawn], *, base: Path) -> str:
    """Renders the page; `base` is the folder that links start from."""
    return render(
        "sweep.html",
        title=f"Sweep {printable(results.name)}",
        values=sweep_tables.values_table(results),
        differences=sweep_tables.differences_table(results),
        times=sweep_tables.time_table(results),
        changes=sweep_tables.changes_table(results),
        environments=sweep_tables.environments_table(results),
        drawn=[on_page(figure, base) for figure in drawn],
    )
