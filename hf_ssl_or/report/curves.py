"""Curves over the steps of runs: losses, collapse and kNN, throughput."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from matplotlib.lines import Line2D

from hf_ssl_or.report.style import (
    Drawn,
    add_legend,
    is_wide,
    legend_height,
    panels,
    plot_curve,
    run_style,
    save,
    set_ticks,
    shorten,
)
from hf_ssl_or.runs.labels import metric_label
from hf_ssl_or.runs.reader import RunRecord

_MEASURES = (
    *("knn", "rankme", "effective_rank", "participation_ratio", "alpha_req"),
    *("lidar", "nesum", "feature_std", "orthogonality_error"),
)
_RATES = ("views_per_second", "data_wait_percent")
_LINEAR = {"lr", "weight_decay", "view_size"}
_NOT_DRAWN = {"step", "epoch", "dimension", "samples"}

Series = dict[str, list[dict[str, float]]]


def plot_losses(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws the loss, its terms, the penalty and the learning rate of every run over its steps."""
    lines = {run.name: run.train for run in runs}
    names = _names(
        lines,
        first=("loss",),
        last=("penalty", "grad_norm", "lr", "weight_decay", "view_size"),
        leave=_NOT_DRAWN | {"images_per_second", *_RATES},
    )
    caption = "Means between two log lines. A logarithmic axis is used where values spread widely."
    return _draw(lines, names, folder, "loss", "Loss and its terms", caption)


def plot_collapse(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws kNN accuracy, ranks and the orthogonality error of every run over its steps."""
    lines = {run.name: run.monitor for run in runs}
    names = _names(lines, first=_MEASURES, leave=_NOT_DRAWN | {"alpha_req_r2"})
    caption = (
        "Measured without labels on a fixed sample of training images, but for kNN. "
        "A falling rank or a rising \N{GREEK SMALL LETTER ALPHA}-ReQ is a sign of dimensional collapse."
    )
    return _draw(lines, names, folder, "collapse", "Collapse measures and kNN", caption)


def plot_throughput(runs: Sequence[RunRecord], folder: Path) -> Drawn | None:
    """Draws views per second and the share of time spent waiting for data."""
    lines = {run.name: [_in_views(run, line) for line in run.train] for run in runs}
    names = [name for name in _RATES if any(name in line for run in lines.values() for line in run)]
    caption = "Training steps alone: evaluations and checkpoints are left out of the time."
    return _draw(lines, names, folder, "throughput", "Throughput", caption, from_zero=True)


def views_of(run: RunRecord) -> int:
    """Counts the views that a step takes of each image."""
    counts = [run.setting("views.count", 1), run.setting("views.local_count", 0)]
    return sum(count for count in counts if isinstance(count, int))


def _in_views(run: RunRecord, line: dict[str, float]) -> dict[str, float]:
    rate = line.get("images_per_second")
    return line if rate is None else {**line, "views_per_second": rate * views_of(run)}


def _names(
    lines: Series, *, first: tuple[str, ...], last: tuple[str, ...] = (), leave: Set[str] = frozenset()
) -> list[str]:
    """Orders what the lines hold: first the well-known, then the rest as it comes, then what matters least."""
    found = dict.fromkeys(key for run in lines.values() for line in run for key in line)
    middle = [name for name in found if name not in {*first, *last, *leave}]
    return [*(n for n in first if n in found), *middle, *(n for n in last if n in found)]


def _draw(
    lines: Series,
    names: Sequence[str],
    folder: Path,
    file: str,
    title: str,
    caption: str,
    *,
    from_zero: bool = False,
) -> Drawn | None:
    if not names:
        return None
    labels = [shorten(name) for name in lines]
    columns = 3 if len(names) > 2 else 2
    width = 3.2 if columns == 3 else 4.9
    top = 0.35 + legend_height(labels, columns * width)
    figure, all_axes = panels(len(names), columns=columns, width=width, top=top)
    last_row = len(names) - columns
    for k, (axes, name) in enumerate(zip(all_axes, names, strict=True)):
        values = []
        for i, run in enumerate(lines.values()):
            points = [(line["step"], line[name]) for line in run if name in line]
            if points:
                plot_curve(axes, [x for x, _ in points], [y for _, y in points], i)
                values += [y for _, y in points]
        log = not from_zero and name not in _LINEAR and is_wide(values)
        axes.set_yscale("log" if log else "linear")
        axes.set_title(shorten(metric_label(name).title, 44))
        axes.margins(x=0.03)
        if k >= last_row:
            axes.set_xlabel("step")
        if from_zero:
            axes.set_ylim(bottom=0)
        set_ticks(axes, log="y" if log else "")
    add_legend(figure, [Line2D([], [], **run_style(i)) for i in range(len(lines))], labels)
    return save(figure, folder, file, title=title, alt=_alt(title, lines, names), caption=caption)


def _alt(title: str, lines: Series, names: Sequence[str]) -> str:
    """Says in words where every curve starts and ends."""
    parts = []
    for name in names:
        for run, points in lines.items():
            values = [line[name] for line in points if name in line]
            if values:
                whose = f" of {run}" if len(lines) > 1 else ""
                parts.append(f"{metric_label(name).title}{whose} goes from {values[0]:.4g} to {values[-1]:.4g}")
    return f"{title} over training steps. {'; '.join(parts)}."
