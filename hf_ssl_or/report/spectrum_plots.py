"""Eigenvalue spectra: how many dimensions weights and features use.

They follow figure 3 of He, Du and Ma (NeurIPS 2024): eigenvalues over the largest one on logarithmic axes, dashed
where some are not positive, with their number in the legend.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
from hf_ssl_or.runs.reader import Arrays, RunRecord

_NO_STAGE = {"input": (color(6), "v"), "hidden/stem": (color(5), "P"), "representation": (INK, "*")}
FLOOR = 1e-8  # of the y axis at the lowest: what lies under it is rounding
_STAGE = re.compile(r"(layer\d+|stages\.\d+|blocks\.\d+)(?:\..*?)?(attn\.proj|mlp\.fc2)?(?:\.weight)?$")
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
    alt = f"Spectra of weights (left) and features (right) of {len(runs)} runs. {_alt(runs)}"
    return save(figure, folder, "spectra", title="Eigenvalue spectra, by run", alt=alt, caption=caption)


def plot_spectra_compared(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws, per layer, the last spectra of all runs in one panel; None for fewer than two runs."""
    names = [run.name for run in runs]
    last = {run.name: run.spectra[-1][1] for run in runs if run.spectra}
    if len(last) < 2:
        return None
    keys = _ordered({key for spectra in last.values() for key in spectra})
    labels = [shorten(name) for name in last]
    top = 0.4 + legend_height(labels, 10.0)
    figure, all_axes = panels(len(keys), height=2.2, top=top)
    styles = {name: (color(names.index(name)), MARKERS[names.index(name)]) for name in last}
    for axes, key in zip(all_axes, keys, strict=True):
        counted = []
        for name, spectra in last.items():
            if key in spectra:
                line = _plot(axes, spectra[key], *styles[name])
                if count := _count(spectra[key]):
                    counted.append((line, count))
        _finish([axes])
        axes.set_title(shorten(_title(key), 44))
        if counted:
            axes.legend(*zip(*counted, strict=True), loc="lower left", fontsize=7.5, labelspacing=0.25)
    add_legend(figure, [Line2D([], [], color=c, marker=m) for c, m in styles.values()], labels)
    alt = f"Spectra of {len(last)} runs in one panel for each of: {', '.join(map(_title, keys))}. {_alt(runs)}"
    caption = f"{_CAPTION} of a panel. All at each run's last evaluation."
    return save(
        figure, folder, "spectra-compared", title="Eigenvalue spectra, runs compared", alt=alt, caption=caption
    )


def _draw_run(axes: Axes, run: RunRecord, what: str) -> None:
    latest = run.spectra[-1][1]
    keys = [key for key in _ordered(latest) if key.startswith("weight/") == (what == "weights")]
    entries = []
    for key in keys:
        own, marker = _stage_style(key, keys)
        for _, spectra in run.spectra[:-1]:
            if key in spectra:
                _plot(axes, spectra[key], own, "", linewidth=0.8, alpha=0.65)
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


def _plot(axes: Axes, spectrum: np.ndarray, own: str, marker: str, **style: Any) -> Line2D:
    positive = spectrum[spectrum > 0]
    index = np.arange(1, len(positive) + 1)
    marked = np.unique(np.geomspace(1, max(len(positive), 1), 7).astype(int)) - 1
    all_positive = len(positive) == len(spectrum)
    (line,) = axes.plot(
        index,
        positive,
        color=own,
        marker=marker,
        markevery=marked.tolist(),
        linestyle="-" if all_positive else (0, (4, 1.6)),
        **style,
    )
    return line


def _finish(panels_of_one_scale: Sequence[Axes]) -> None:
    lines = [np.asarray(line.get_xydata()) for axes in panels_of_one_scale for line in axes.get_lines()]
    lowest = min((float(line[:, 1].min()) for line in lines if len(line)), default=1e-3)
    longest = max((len(line) for line in lines), default=10)
    for axes in panels_of_one_scale:
        axes.set(xscale="log", yscale="log", xlim=(0.85, max(1.25 * longest, 10)), ylim=(max(lowest / 2, FLOOR), 2))
        set_ticks(axes, log="xy")


def _count(spectrum: np.ndarray) -> str:
    """Counts the eigenvalues that are not positive, as the legend shows them."""
    missing = int((spectrum <= 0).sum())
    return f"{missing} of {len(spectrum)} \N{LESS-THAN OR EQUAL TO} 0" if missing else ""


def _ordered(keys: Sequence[str] | set[str] | Arrays) -> list[str]:
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


def _alt(runs: Sequence[RunRecord]) -> str:
    """Says in words how many eigenvalues of every last spectrum are above a hundredth of the largest."""
    parts = []
    for run in runs:
        if run.spectra:
            latest = run.spectra[-1][1]
            counts = [f"{_title(k)} {int((latest[k] > 0.01).sum())} of {len(latest[k])}" for k in _ordered(latest)]
            parts.append(f"{run.name}: {', '.join(counts)}")
    return f"Eigenvalues above 1 % of the largest: {'; '.join(parts)}."
