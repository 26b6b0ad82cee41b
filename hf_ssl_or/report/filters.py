"""What became of the weights: the orthogonality error of every layer, and how alike the filters of one layer are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from hf_ssl_or.evaluation.collapse.weight_spectra import filter_correlations
from hf_ssl_or.report.spectrum_plots import short_name
from hf_ssl_or.report.style import MARKERS, Drawn, add_legend, color, legend_height, panels, save, shorten
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.reader import RunRecord
from hf_ssl_or.runs.representations import FilterCorrelations

MOST_FILTERS = 256
_ROW = 0.17  # inches of a layer
_GRAM = "\N{DOUBLE VERTICAL LINE}G \N{MINUS SIGN} I\N{DOUBLE VERTICAL LINE}"


def plot_errors(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws the orthogonality error of every layer: bars for one run, before and after, or a marker per run."""
    shown = [(i, run) for i, run in enumerate(runs) if _errors(run)]
    if not shown:
        return None
    layers = list(dict.fromkeys(layer for _, run in shown for layer in _errors(run)))
    one = len(shown) == 1
    labels = [] if one else [shorten(run.name) for _, run in shown]
    if one and _errors(shown[0][1], before=True):
        labels = ["before training", "after"]
    row = 2 * _ROW if one and labels else 1.3 * _ROW
    top = 0.15 + legend_height(labels, 9.5)
    names = [shorten(layer.removeprefix("timm_model.").removesuffix(".weight"), 40) for layer in layers]
    left = 0.3 + 0.068 * max(map(len, names))
    figure, (axes,) = panels(1, width=9.3 - left, height=row * len(layers) + 0.1, left=left, top=top, right=0.2)
    draw = _bars if one else _dots
    add_legend(figure, draw(axes, layers, shown), labels)
    axes.set_yticks(range(len(layers)), names)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.grid(axis="y", visible=not one)
    axes.set_xlabel(f"{_GRAM} (Frobenius norm, G the smaller Gram matrix of the weight)")
    parts = [f"{run.name}: mean {np.mean(list(_errors(run).values())):.4g}{_before(run)}" for _, run in shown]
    alt = f"Orthogonality error of {len(layers)} layers. {'; '.join(parts)}."
    caption = "0 is a weight with orthonormal rows or columns. Layers of more channels have larger errors."
    return save(figure, folder, "orthogonality", title="Orthogonality error per layer", alt=alt, caption=caption)


def _errors(run: RunRecord, *, before: bool = False) -> dict[str, float]:
    if run.results is None:
        return {}
    weights = run.results.weights_before if before else run.results.weights
    return {printable(name): weight.orthogonality_error for name, weight in weights.items()}


def _before(run: RunRecord) -> str:
    before = _errors(run, before=True)
    return f" (before training {np.mean(list(before.values())):.4g})" if before else ""


def _bars(axes: Axes, layers: Sequence[str], shown: Sequence[tuple[int, RunRecord]]) -> list[Artist]:
    errors, y = _errors(shown[0][1]), np.arange(len(layers))
    earlier = _errors(shown[0][1], before=True)
    after = [errors.get(layer, 0.0) for layer in layers]
    if not earlier:
        axes.barh(y, after, height=0.7, color=color(0))
        return []
    before = [earlier.get(layer, 0.0) for layer in layers]
    axes.barh(y - 0.19, before, height=0.36, facecolor="none", edgecolor=color(6), hatch="/////", linewidth=0.8)
    axes.barh(y + 0.19, after, height=0.36, color=color(0))
    return [Patch(facecolor="none", edgecolor=color(6), hatch="/////"), Patch(facecolor=color(0))]


def _dots(axes: Axes, layers: Sequence[str], shown: Sequence[tuple[int, RunRecord]]) -> list[Artist]:
    handles: list[Artist] = []
    for i, run in shown:
        errors = _errors(run)
        places = [y for y, layer in enumerate(layers) if layer in errors]
        values = [errors[layers[y]] for y in places]
        handles += axes.plot(values, places, color=color(i), marker=MARKERS[i], linestyle="none", markersize=5.5)
    return handles


# ---------------------------------------------------------------------------------------------------------------------
# Filters


def plot_filters(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws the correlations among the filters of each run's deepest drawn weight; None where no run has any."""
    return plot_correlations({run.name: found for run in runs if (found := correlate_filters(run))}, folder)


def correlate_filters(run: RunRecord, blocks: int | None = None) -> FilterCorrelations | None:
    """Correlates the filters of a run's deepest drawn weight, at most `MOST_FILTERS` of them, evenly spaced.

    Args:
        run: The run; None is returned where it has no spectra or no encoder yet.
        blocks: Rows of the image at most, each the mean of filters that stand together; None keeps every filter.
    """
    name, weight_OI = _deepest_weight(run)
    if weight_OI is None:
        return None
    picked = np.unique(np.linspace(0, len(weight_OI) - 1, MOST_FILTERS).astype(int))
    correlation = filter_correlations(weight_OI[picked])
    different = ~np.eye(len(correlation), dtype=bool)
    shown = correlation if blocks is None else block_means(correlation, blocks).round(2)
    return FilterCorrelations(
        layer=name,
        filters=len(weight_OI),
        drawn=len(correlation),
        mean=float(correlation[different].mean()) if len(correlation) > 1 else 0.0,
        image=shown.tolist(),
    )


def block_means(correlation_OO: np.ndarray, blocks: int) -> np.ndarray:
    """Returns means of a symmetric matrix over at most `blocks` x `blocks` blocks, of pairs of different filters.

    The correlation of a filter with itself, which is 1, counts only where a block holds nothing else.
    """
    edges = np.unique(np.linspace(0, len(correlation_OO), blocks + 1).astype(int))[:-1]

    def sums(matrix_OO: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(matrix_OO, edges, 0), edges, 1)

    different_OO = 1 - np.eye(len(correlation_OO))
    pairs = sums(different_OO)
    return np.where(pairs > 0, sums(correlation_OO * different_OO) / np.maximum(pairs, 1), 1.0)


def plot_correlations(found: Mapping[str, FilterCorrelations], folder: Path) -> Drawn | None:
    """Draws correlations among filters, a panel for each name of a run or arm; None for none."""
    if not found:
        return None
    figure, all_axes = panels(len(found), width=2.75, height=2.75, gap=(0.5, 0.75), top=0.4, right=0.95)
    parts = []
    for axes, (name, filters) in zip(all_axes, found.items(), strict=True):
        extent = (-0.5, filters.drawn - 0.5, filters.drawn - 0.5, -0.5)
        image = axes.imshow(filters.image, vmin=0, vmax=1, cmap="viridis", interpolation="nearest", extent=extent)
        axes.grid(visible=False)
        axes.set_title(shorten(name))
        axes.set_xlabel(f"{short_name(f'weight/{filters.layer}')}, mean {filters.mean:.3f}")
        parts.append(f"{name}, {filters.layer}: mean {filters.mean:.3f}, {filters.drawn} of {filters.filters} filters")
    _color_bar(figure, image)
    blocks = [f"{len(filters.image)} blocks" for filters in found.values() if len(filters.image) < filters.drawn]
    means = f" Each point is the mean over a block, of {blocks[0]} a side." if blocks else ""
    caption = (
        "Absolute correlations among filters, ordered so that similar ones lie together: bright blocks are filters "
        f"that repeat one another. At most {MOST_FILTERS} filters are drawn, evenly spaced.{means} "
        "After figure 5 of He, Du and Ma (NeurIPS 2024)."
    )
    alt = f"Heat maps of the correlations among the filters of the deepest layer. {'; '.join(parts)}."
    return save(figure, folder, "filters", title="Filter correlations", alt=alt, caption=caption)


def _deepest_weight(run: RunRecord) -> tuple[str, np.ndarray | None]:
    latest = run.spectra[-1][1] if run.spectra else {}
    names = [key.removeprefix("weight/") for key in latest if key.startswith("weight/")]
    return (names[-1], run.weight(names[-1])) if names else ("", None)


def _color_bar(figure: Figure, image: AxesImage) -> None:
    width, height = figure.get_size_inches()
    bar = figure.add_axes(((width - 0.75) / width, 0.5 / height, 0.13 / width, 2.75 / height))
    figure.colorbar(image, cax=bar, label="|correlation|")
