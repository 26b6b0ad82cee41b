"""The augmentation graph as figure and table: what few augmentations of each image leave of its eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.augmentation_graph import AugmentationGraph, SampledSpectrum
from hf_ssl_or.report.style import INK, Drawn, add_legend, legend_height, panels, run_style, save, set_ticks, style
from hf_ssl_or.report.tables import Cell, Table


def plot_graph(graph: AugmentationGraph, spectra: Sequence[SampledSpectrum], path: Path) -> Drawn:
    """Draws eigenvalues of sampled graphs over the number of augmentations, those of the full graph dotted.

    Args:
        graph: The full graph.
        spectra: Of the graphs sampled from it.
        path: A .png; an .svg is written beside it.

    Raises:
        InputError: The file is no .png or cannot be written.
    """
    if path.suffix != ".png":
        raise InputError(f"{path}: a name that ends in .png is wanted; an .svg is written beside it")
    full, x = _from_largest(graph), np.array([one.num_augmentations for one in spectra])
    labels = [*full, "full graph"]
    with style():
        figure, (axes,) = panels(1, width=4.6, height=2.9, top=0.15 + legend_height(labels, 5.4))
        for i, value in enumerate(full.values()):
            mean, std = (np.array([getattr(one, name)[i] for one in spectra]) for name in ("mean", "std"))
            axes.errorbar(x * 1.02 ** (i - 1.5), mean, yerr=std, capsize=2.5, **run_style(i) | {"linestyle": "-"})
            axes.axhline(value, color=run_style(i)["color"], linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        axes.set(xlabel="augmentations of each image", ylabel="eigenvalue", ylim=(0, None))
        set_ticks(axes)
        axes.set_xticks(x, [str(m) for m in x])
        axes.minorticks_off()
        handles = [Line2D([], [], **run_style(i) | {"linestyle": "-"}) for i in range(len(full))]
        add_legend(figure, [*handles, Line2D([], [], color=INK, linestyle=":")], labels)
        told = [f"{one.num_augmentations} augmentations: {', '.join(_values(one))}" for one in spectra]
        told.append(f"full graph: {', '.join(f'{value:.3f}' for value in full.values())}")
        try:
            return save(
                figure,
                path.parent,
                path.stem,
                title="Eigenvalues of sampled augmentation graphs",
                alt=f"Eigenvalues {', '.join(full)} over the number of augmentations. {'; '.join(told)}.",
                caption="Bars span one standard deviation over sampled graphs to either side. "
                "After figure 7 of Ghosh et al. (NeurIPS 2024).",
            )
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def graph_table(graph: AugmentationGraph, spectra: Sequence[SampledSpectrum]) -> Table:
    """Returns the eigenvalues of sampled graphs by the number of augmentations, and last those of the full graph."""
    full = _from_largest(graph)
    rows = []
    for one in spectra:
        found = zip(_values(one), one.mean_graph, one.mean, strict=True)
        cells = [Cell(f"{text} ({closed:.3f})", mean) for text, closed, mean in found]
        rows.append([Cell(str(one.num_augmentations), one.num_augmentations), *cells])
    rows.append([Cell("full graph"), *(Cell(f"{value:.3f}", value) for value in full.values())])
    caption = (
        "Eigenvalues of sampled graphs, from the largest: mean \N{PLUS-MINUS SIGN} standard deviation (of the mean of "
        "all such graphs, in closed form)"
    )
    return Table(caption=caption, head=["augmentations", *full], rows=rows)


def _from_largest(graph: AugmentationGraph) -> dict[str, float]:
    """Returns the eigenvalues of the full graph from the largest, by the name of the eigenvector."""
    return dict(sorted(graph.eigenvalues().items(), key=lambda item: -item[1]))


def _values(spectrum: SampledSpectrum) -> list[str]:
    pairs = zip(spectrum.mean, spectrum.std, strict=True)
    return [f"{mean:.3f} \N{PLUS-MINUS SIGN} {std:.3f}" for mean, std in pairs]
