"""Spectra, filters and features of chosen arms of a sweep, drawn as those of runs are."""

from __future__ import annotations

from pathlib import Path

from hf_ssl_or.report.embeddings import plot_points
from hf_ssl_or.report.filters import plot_correlations
from hf_ssl_or.report.spectrum_plots import plot_last_spectra
from hf_ssl_or.report.style import Drawn
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.representations import Representations
from hf_ssl_or.runs.sweep_results import SweepResults


def plot_representations(results: SweepResults, folder: Path) -> list[Drawn]:
    """Draws what the sweep keeps of its arms' first seeds; nothing where it keeps nothing."""
    kept = {printable(arm.name): arm.runs[0].representations or Representations() for arm in results.arms if arm.runs}
    seed = results.arms[0].runs[0].seed if kept else 0
    figures: list[Drawn | None] = []
    spectra = {name: one.spectra for name, one in kept.items()}
    if any(spectra.values()):
        steps = "; ".join(f"{name}: step {one.step}" for name, one in kept.items() if one.step is not None)
        caption = f"All at the last evaluation of the run with seed {seed} ({steps})."
        figures.append(plot_last_spectra(spectra, folder, caption=caption))
    figures.append(plot_correlations({name: one.filters for name, one in kept.items() if one.filters}, folder))
    for method in ("UMAP", "PCA"):
        points = {name: one.embedding for name, one in kept.items() if one.embedding is not None}
        points = {name: embedding for name, embedding in points.items() if embedding.method == method}
        figures.append(plot_points(points, folder) if points else None)
    return [figure for figure in figures if figure is not None]
