"""Figures of a sweep: bars of its arms, curves over an axis of the grid and over minutes, minutes against error."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.report.style import (
    INK,
    Drawn,
    add_legend,
    color,
    is_wide,
    legend_height,
    panels,
    plot_curve,
    run_style,
    save,
    set_ticks,
    shorten,
)
from hf_ssl_or.report.sweep_representations import plot_representations
from hf_ssl_or.report.sweep_tables import threshold_name
from hf_ssl_or.runs.labels import metric_label, printable
from hf_ssl_or.runs.results import Metric
from hf_ssl_or.runs.statistics import summarize
from hf_ssl_or.runs.sweep_results import ArmValues, SweepResults, column_label
from hf_ssl_or.runs.time_to import MINUTES

_SPREAD = "Bars span one standard deviation over seeds to either side."


def plot_sweep(results: SweepResults, folder: Path) -> list[Drawn]:
    """Draws whatever the sweep holds.

    Raises:
        InputError: The sweep names a column for its figures that no run has.
    """
    columns = drawn_columns(results)
    axes = [name for name, values in results.grid.items() if len(values) > 1 and all(map(_is_number, values))]
    figures = [plot_bars(results, columns, folder)]
    figures += [plot_axis(results, columns, axis, folder, f"axis-{i}") for i, axis in enumerate(axes, 1)]
    figures.append(plot_pareto(results, [name for name in columns if column_label(name).unit == "%"], folder))
    figures.append(plot_time(results, folder))
    return [*(figure for figure in figures if figure is not None), *plot_representations(results, folder)]


def drawn_columns(results: SweepResults) -> list[str]:
    """Returns the columns to draw: those that the sweep names, else its accuracies, else all of its table."""
    known = {name for arm in results.arms for run in arm.runs for name in run.metrics}
    if results.figures is not None:
        for name in results.figures:
            if known and name not in known:
                raise InputError(f"figures: {unknown('column', name, known)}")
        return [name for name in results.figures if name in known]
    accuracies = [name for name in results.columns if column_label(name).unit == "%"]
    return [name for name in accuracies or results.columns if name in known]


def plot_bars(results: SweepResults, columns: Sequence[str], folder: Path) -> Drawn | None:
    """Draws the mean of every arm, and every seed as a dot, a panel per column."""
    if not columns:
        return None
    height = 0.3 + 0.24 * len(results.arms)
    left = 0.3 + 0.065 * max(len(shorten(arm.name)) for arm in results.arms)
    figure, all_axes = panels(len(columns), columns=2, width=3.6, height=height, left=left, gap=(left, 0.75))
    for axes, column in zip(all_axes, columns, strict=True):
        for i, arm in enumerate(results.arms):
            if (metric := arm.metric(column)) is None:
                continue
            axes.barh(i, metric.mean, height=0.6, color=color(i), alpha=0.45)
            axes.errorbar(metric.mean, i, xerr=metric.std or 0, color=INK, capsize=2.5, linewidth=1)
            axes.plot(metric.values, [i] * len(metric.values), "o", color=color(i), markersize=3)
        set_ticks(axes)
        axes.set_yticks(range(len(results.arms)), [printable(shorten(arm.name)) for arm in results.arms])
        axes.set_ylim(len(results.arms) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_title(shorten(column_label(column).title, 44))
    caption = f"Mean of the arm, each seed a dot. {_SPREAD}"
    alt = _alt("Bars", [(arm.name, column, arm.metric(column)) for column in columns for arm in results.arms])
    return save(figure, folder, "arms", title="Arms", alt=alt, caption=caption)


def plot_axis(results: SweepResults, columns: Sequence[str], axis: str, folder: Path, file: str) -> Drawn | None:
    """Draws columns over one axis of the grid: a curve for each setting of all else, a panel per column."""
    lines = _lines(results, axis)
    if not columns or not lines:
        return None
    labels = [shorten(printable(name)) for name in lines]
    side_by_side = min(len(columns), 2)
    top = 0.35 + legend_height(labels, side_by_side * 3.6)
    figure, all_axes = panels(len(columns), columns=2, width=3.6, top=top)
    log = is_wide([float(value) for value in results.grid[axis]]) or _multiplies(results.grid[axis])
    told = []
    for axes, column in zip(all_axes, columns, strict=True):
        for i, (name, arms) in enumerate(lines.items()):
            points = [(float(arm.cell[axis]), metric) for arm in arms if (metric := arm.metric(column)) is not None]
            _plot_means(axes, points, i)
            told += [(f"{name} at {x:g}", column, metric) for x, metric in points]
        axes.set_xscale("log" if log else "linear")
        axes.set_title(shorten(column_label(column).title, 44))
        axes.set_xlabel(printable(axis))
        axes.margins(x=0.05)
        set_ticks(axes, log="x" if log else "")
        if log:
            axes.set_xticks([float(value) for value in results.grid[axis]], [f"{v:g}" for v in results.grid[axis]])
    add_legend(figure, [Line2D([], [], **run_style(i)) for i in range(len(lines))], labels)
    title = f"Over {printable(axis)}"
    return save(figure, folder, file, title=title, alt=_alt(title, told), caption=f"Means over seeds. {_SPREAD}")


def _plot_means(axes: Axes, points: Sequence[tuple[float, Metric]], i: int) -> None:
    points = sorted(points, key=lambda point: point[0])
    x, y = [x for x, _ in points], [metric.mean for _, metric in points]
    axes.errorbar(x, y, yerr=[metric.std or 0 for _, metric in points], capsize=2.5, **run_style(i))


def plot_pareto(results: SweepResults, columns: Sequence[str], folder: Path) -> Drawn | None:
    """Draws minutes of training against the error of accuracies, with the frontier of those that nothing beats."""
    arms = [arm for arm in results.arms if arm.metric(MINUTES) is not None]
    if not columns or len(arms) < 2:
        return None
    labels = [shorten(printable(arm.name)) for arm in arms]
    top = 0.35 + legend_height(labels, min(len(columns), 2) * 3.6)
    figure, all_axes = panels(len(columns), columns=2, width=3.6, height=2.6, top=top)
    told = []
    for axes, column in zip(all_axes, columns, strict=True):
        points = []
        for i, arm in enumerate(arms):
            minutes, metric = arm.metric(MINUTES), arm.metric(column)
            if minutes is None or metric is None:
                continue
            look = run_style(i) | {"linestyle": ""}
            error = 100 - metric.mean
            axes.errorbar(minutes.mean, error, xerr=minutes.std or 0, yerr=metric.std or 0, capsize=2.5, **look)
            points.append((minutes.mean, error))
            told += [(arm.name, column, metric), (arm.name, MINUTES, minutes)]
        best = frontier(points)
        axes.plot([x for x, _ in best], [y for _, y in best], color=INK, linewidth=0.9, linestyle=":", zorder=0)
        axes.set_title(shorten(f"Error of {column_label(column).name}, %", 44))
        axes.set_xlabel("minutes of training")
        axes.set_xscale("log" if (log := is_wide([x for x, _ in points])) else "linear")
        set_ticks(axes, log="x" if log else "")
    add_legend(figure, [Line2D([], [], **run_style(i) | {"linestyle": ""}) for i in range(len(arms))], labels)
    caption = f"Lower and further left is better; the dotted line joins the arms that none beats in both. {_SPREAD}"
    title = "Minutes against error"
    return save(figure, folder, "pareto", title=title, alt=_alt(title, told), caption=caption)


def plot_time(results: SweepResults, folder: Path) -> Drawn | None:
    """Draws what arms are timed to over the minutes of training: a curve with a band per arm, the threshold dotted."""
    if results.time_to is None:
        return None
    label, threshold = metric_label(results.time_to.metric), results.threshold
    curves = {arm.name: curve for arm in results.arms if (curve := mean_curve(arm, results.time_to.metric))}
    if not curves:
        return None
    labels, told = [shorten(printable(name)) for name in curves], []
    styles = [i for i, arm in enumerate(results.arms) if arm.name in curves]
    figure, (axes,) = panels(1, width=6.4, height=3.2, top=0.35 + legend_height(labels, 6.4))
    for i, (name, curve) in zip(styles, curves.items(), strict=True):
        minutes, means = [x for x, _ in curve], [metric.mean for _, metric in curve]
        plot_curve(axes, minutes, means, i)
        low, high = ([metric.mean + sign * (metric.std or 0) for _, metric in curve] for sign in (-1, 1))
        axes.fill_between(minutes, low, high, color=color(i), alpha=0.2, linewidth=0)
        ends = [f"{mean:.4g} at {x:.3g} minutes" for x, mean in ((minutes[0], means[0]), (minutes[-1], means[-1]))]
        told.append(f"{name} goes from {' to '.join(ends)}")
    if threshold is not None:
        axes.axhline(threshold, color=INK, linewidth=0.9, linestyle=":")
    axes.set_title(shorten(label.title, 60))
    axes.set_xlabel("minutes of training")
    log = is_wide([x for curve in curves.values() for x, _ in curve])
    axes.set_xscale("log" if log else "linear")
    axes.margins(x=0.03)
    set_ticks(axes, log="x" if log else "")
    add_legend(figure, [Line2D([], [], **run_style(i)) for i in styles], labels)
    title = f"{label.name} over minutes"
    dotted = f"Dotted: {threshold_name(results)}."
    alt = printable(f"{title}. {'; '.join(told)}. {dotted}")
    caption = f"Means over seeds at each evaluation, in a band of one standard deviation to either side. {dotted}"
    return save(figure, folder, "time", title=title, alt=alt, caption=caption)


def mean_curve(arm: ArmValues, metric: str) -> list[tuple[float, Metric]]:
    """Returns (mean minutes, mean and standard deviation over seeds) of each evaluation that all seeds have."""
    evaluations = zip(*arm.points(metric).values(), strict=False)
    return [(statistics.fmean(x for x, _ in points), summarize([y for _, y in points])) for points in evaluations]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other is below and left of, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _lines(results: SweepResults, axis: str) -> dict[str, list[ArmValues]]:
    """Groups the cells of the grid by all that is not the axis; each group has a name."""
    groups: dict[str, list[ArmValues]] = {}
    for arm in results.arms:
        if axis in arm.cell:
            keys = [key for key in arm.cell if key != axis]
            own = [change for change in arm.changes if change.partition("=")[0] not in arm.cell]
            key = json.dumps([arm.recipe, own, [arm.cell[name] for name in keys]])
            groups.setdefault(key, []).append(arm)
    own_parts = (axis, axis.rpartition(".")[2])
    named = {}
    for arms in groups.values():
        parts = [part for part in arms[0].name.split(",") if part.partition("=")[0] not in own_parts]
        named[",".join(parts) or results.name] = arms
    return named


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _multiplies(values: Sequence[float]) -> bool:
    """Says whether each value is half as much again as the one before, or more, as 64, 128, 512."""
    if len(values) < 3 or min(values) <= 0:
        return False
    ordered = sorted(values)
    return all(after >= 1.5 * before for before, after in zip(ordered, ordered[1:], strict=False))


def _alt(title: str, told: Sequence[tuple[str, str, Metric | None]]) -> str:
    """Says every mean in words."""
    parts = [f"{column_label(column).name} of {name}: {m.describe()}" for name, column, m in told if m is not None]
    return printable(f"{title}. {'; '.join(parts)}.")
