"""Eigenvalue spectra: how many dimensions weights and features use.

They follow figure 3 of He, Du and Ma (NeurIPS 2024): eigenvalues over the largest one on logarithmic axes, dashed
where some are not positive, with their number in the legend.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hf_ssl_or.report.style import (
    INK,
    MARKERS,
    Drawn,
    add_legend,
    color,
    legend_height,
    panels,
    save,
    set_ticks,
    shorten,
)
from hf_ssl_or.runs.reader import RunRecord
from hf_ssl_or.runs.representations import Spectrum

_NO_STAGE = {"input": (color(6), "v"), "hidden/stem": (color(5), "P"), "representation": (INK, "*")}
FLOOR = 1e-8  # of the y axis at the lowest: what lies under it is rounding
_STAGE = re.compile(r"(layer\d+|stages\.\d+|blocks\.\d+)(?:\..*?)?(attn\.proj|mlp\.fc2)?(?:\.weight)?$")

Spectra = Mapping[str, Spectrum]  # by key: "input", "hidden/<stage>", "representation", "weight/<parameter>"
_CAPTION = (
    "Eigenvalues of the covariance, from the largest, each over the largest, on logarithmic axes: the faster the "
    "fall, the fewer dimensions are used. A dashed line has eigenvalues that are not positive, counted in the legend"
)


def plot_spectra_of_runs(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws, per run, the spectra of weights and of features, at its first evaluation (thin) and its last (thick)."""
    runs = [run for run in runs if run.spectra]
    if not runs:
        return None
    figure, all_axes = panels(2 * len(runs), columns=2, width=3.1, height=2.3, gap=(2.05, 0.85), right=1.75, top=0.4)
    for side, what in enumerate(("weights", "features")):
        column = all_axes[side::2]
        for axes, run in zip(column, runs, strict=True):
            _draw_run(axes, run, what)
            axes.set_title(f"{shorten(run.name, 36)}: {what}")
            axes.set_xlabel("index")
        _finish(column)  # one scale for all runs
    steps = "; ".join(f"{run.name}: {' and '.join(f'step {step}' for step, _ in run.spectra)}" for run in runs)
    caption = f"{_CAPTION}. Thin lines: the first evaluation; thick lines: the last ({steps})."
    alt = f"Spectra of weights (left) and features (right) of {len(runs)} runs. {_alt(_latest(runs))}"
    return save(figure, folder, "spectra", title="Eigenvalue spectra, by run", alt=alt, caption=caption)


def plot_spectra_compared(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws, per layer, the last spectra of all runs in one panel; None for fewer than two runs."""
    if sum(bool(run.spectra) for run in runs) < 2:
        return None
    return plot_last_spectra(_latest(runs), folder, caption="All at each run's last evaluation.")


def plot_last_spectra(latest: Mapping[str, Spectra], folder: Path, *, caption: str) -> Drawn:
    """Draws spectra, a panel per layer with a curve for each name.

    Args:
        latest: Spectra by name of the run or arm; one that has none keeps its color.
        folder: Where the files go.
        caption: Says what the spectra are of.
    """
    styles = {name: (color(i), MARKERS[i % len(MARKERS)]) for i, name in enumerate(latest) if latest[name]}
    keys = _ordered({key for name in styles for key in latest[name]})
    labels = [shorten(name) for name in styles]
    top = 0.4 + legend_height(labels, 10.0)
    figure, all_axes = panels(len(keys), height=2.2, top=top)
    for axes, key in zip(all_axes, keys, strict=True):
        counted = []
        for name, own in styles.items():
            if (spectrum := latest[name].get(key)) is not None:
                line = _plot(axes, spectrum, *own)
                if count := _count(spectrum):
                    counted.append((line, count))
        _finish([axes])
        axes.set_title(shorten(_title(key), 44))
        if counted:
            axes.legend(*zip(*counted, strict=True), loc="lower left", fontsize=7.5, labelspacing=0.25)
    add_legend(figure, [Line2D([], [], color=c, marker=m) for c, m in styles.values()], labels)
    alt = f"Spectra of {', '.join(styles)} in one panel for each of: {', '.join(map(_title, keys))}. {_alt(latest)}"
    caption = f"{_CAPTION} of a panel. {caption}"
    return save(figure, folder, "spectra-compared", title="Eigenvalue spectra compared", alt=alt, caption=caption)


def _latest(runs: Sequence[RunRecord]) -> dict[str, dict[str, Spectrum]]:
    """Returns the last spectra of each run; none for a run without."""
    return {run.name: _as_drawn(run.spectra[-1][1]) if run.spectra else {} for run in runs}


def _as_drawn(spectra: Mapping[str, np.ndarray]) -> dict[str, Spectrum]:
    return {key: Spectrum.of(eigenvalues) for key, eigenvalues in spectra.items()}


def _draw_run(axes: Axes, run: RunRecord, what: str) -> None:
    latest = _as_drawn(run.spectra[-1][1])
    keys = [key for key in _ordered(latest) if key.startswith("weight/") == (what == "weights")]
    entries = []
    for key in keys:
        own, marker = _stage_style(key, keys)
        for _, spectra in run.spectra[:-1]:
            if key in spectra:
                _plot(axes, Spectrum.of(spectra[key]), own, "", linewidth=0.8, alpha=0.65)
        label = "\n".join(filter(None, (shorten(short_name(key), 20), _count(latest[key]))))
        entries.append((_plot(axes, latest[key], own, marker), label))
    if entries:
        axes.legend(*zip(*entries, strict=True), loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=7.5)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _stage_style(key: str, keys: Sequence[str]) -> tuple[str, str]:
    """Returns a stage one color as a weight and as a feature; what is no stage has a color of its own."""
    if key in _NO_STAGE:
        return _NO_STAGE[key]
    i = [k for k in keys if k not in _NO_STAGE].index(key)
    return color(i if i < 5 else i + 2), MARKERS[i % len(MARKERS)]


def _plot(axes: Axes, spectrum: Spectrum, own: str, marker: str, **style: Any) -> Line2D:
    marked = np.unique(np.geomspace(1, max(spectrum.positive, 1), 7).astype(int))
    (line,) = axes.plot(
        spectrum.index,
        spectrum.values,
        color=own,
        marker=marker,
        markevery=np.unique(np.searchsorted(spectrum.index, marked)).tolist(),
        linestyle="-" if spectrum.positive == spectrum.size else (0, (4, 1.6)),
        **style,
    )
    return line


def _finish(panels_of_one_scale: Sequence[Axes]) -> None:
    lines = [np.asarray(line.get_xydata()) for axes in panels_of_one_scale for line in axes.get_lines()]
    lowest = min((float(line[:, 1].min()) for line in lines if len(line)), default=1e-3)
    longest = max((float(line[:, 0].max()) for line in lines if len(line)), default=10)
    for axes in panels_of_one_scale:
        axes.set(xscale="log", yscale="log", xlim=(0.85, max(1.25 * longest, 10)), ylim=(max(lowest / 2, FLOOR), 2))
        set_ticks(axes, log="xy")


def _count(spectrum: Spectrum) -> str:
    """Counts the eigenvalues that are not positive, as the legend shows them."""
    missing = spectrum.size - spectrum.positive
    return f"{missing} of {spectrum.size} \N{LESS-THAN OR EQUAL TO} 0" if missing else ""


def _ordered(keys: Iterable[str]) -> list[str]:
    """Orders keys as data flows: input, hidden stages, representation; then weights."""
    flow = {"input": 0, "hidden": 1, "representation": 2, "weight": 3}

    def place(key: str) -> tuple[int, list[int], str]:
        return flow.get(key.split("/")[0], 4), [int(n) for n in re.findall(r"\d+", key)], key

    return sorted(keys, key=place)


def short_name(key: str) -> str:
    """Names a layer by its stage."""
    kind, _, name = key.partition("/")
    found = _STAGE.search(name)
    return " ".join(part for part in found.groups() if part) if found else name or kind


def _title(key: str) -> str:
    kind, _, name = key.partition("/")
    return {"hidden": f"Features of {name}", "weight": f"Weight of {short_name(key)}"}.get(kind, kind.capitalize())


def _alt(latest: Mapping[str, Spectra]) -> str:
    """Says in words how many eigenvalues of every last spectrum are above a hundredth of the largest."""
    parts = []
    for name, spectra in latest.items():
        if spectra:
            counts = [f"{_title(key)} {spectra[key].large} of {spectra[key].size}" for key in _ordered(spectra)]
            parts.append(f"{name}: {', '.join(counts)}")
    return f"Eigenvalues above 1 % of the largest: {'; '.join(parts)}."
