"""The tables of a sweep: arms by columns, and paired differences to the first arm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_ssl_or.report.tables import NONE, Cell, Table, flatten
from hf_ssl_or.runs.labels import metric_label, printable
from hf_ssl_or.runs.statistics import Difference, summarize
from hf_ssl_or.runs.sweep_results import ArmValues, SweepResults, column_label

_LONGEST_REASON = 160


def values_table(results: SweepResults) -> Table:
    """One row per arm: seeds done, and mean and standard deviation of every column, or why a run has failed."""
    heads = ["arm", "seeds", *(column_label(column).title for column in results.columns)]
    rows = []
    for arm in results.arms:
        done = sum(bool(run.metrics) for run in arm.runs)
        chosen = f" (selected by {column_label(results.select or '').name})" if arm.name == results.selected else ""
        cells = [_value(arm, column) for column in results.columns]
        if arm.failure is not None:
            reason = printable(arm.failure)[:_LONGEST_REASON]
            cells[:1] = [Cell(f"{cells[0].text}; {reason}" if cells and cells[0].value is not None else reason)]
        rows.append([Cell(printable(arm.name) + chosen), Cell(f"{done}/{len(arm.runs)}", done), *cells])
        if not results.columns and arm.failure is not None:
            rows[-1][0] = Cell(f"{printable(arm.name)}: {cells[0].text}")
            del rows[-1][2:]
    return Table(
        caption=f"{results.name}: mean \N{PLUS-MINUS SIGN} standard deviation over seeds", head=heads, rows=rows
    )


def differences_table(results: SweepResults) -> Table | None:
    """One row per arm that is compared with another: its paired differences; None where none is."""
    compared = [arm for arm in results.arms if arm.compared_to is not None]
    if not compared or not results.columns:
        return None
    names = list(dict.fromkeys(printable(arm.compared_to or "") for arm in compared))
    several = len(names) > 1
    rows = []
    for arm in compared:
        found = [results.difference(arm, column) for column in results.columns]
        cells = [Cell(NONE) if one is None else Cell(one.describe(), one.mean) for one in found]
        to = [Cell(printable(arm.compared_to or ""))] if several else []
        rows.append([Cell(printable(arm.name)), *to, *cells])
    caption = (
        f"Differences{'' if several else f' to {names[0]}'}, paired over seeds, with the 95 % t interval; where it "
        "reaches further than half the difference, how many seeds it would take for that"
    )
    heads = ["arm", *(["compared with"] if several else []), *(column_label(name).title for name in results.columns)]
    return Table(caption=caption, head=heads, rows=rows)


def time_table(results: SweepResults) -> Table | None:
    """One row per arm: minutes of training to the threshold, and how many times sooner than the arm timed against."""
    if results.time_to is None:
        return None
    against, threshold = results.timed_against, results.threshold
    rows = []
    for arm in results.arms:
        seeds = len(arm.points(results.time_to.metric).keys() & results.thresholds.keys())
        minutes = results.minutes_to(arm)
        cell = Cell(NONE)
        if seeds and threshold is not None:
            metric = summarize(list(minutes.values())) if minutes else None
            text = "not reached" if metric is None else metric.describe()
            cell = Cell(text + _share(len(minutes), seeds), None if metric is None else metric.mean)
        rows.append([Cell(printable(arm.name)), cell, _sooner(results.times_sooner(arm), seeds)])
    caption = (
        "Minutes of training, evaluations left out, until an arm is there: linear between two evaluations, the first "
        "one's where that is there already. How many times sooner is paired over seeds: the geometric mean, with the "
        "95 % t interval of the logarithms"
    )
    heads = ["arm", f"minutes to {threshold_name(results)}", f"times sooner than {printable(against.name)}"]
    return Table(caption=caption, head=heads, rows=rows)


def threshold_name(results: SweepResults) -> str:
    """Returns what arms are timed to in words, "the last kNN top-1 of lightly with the same seed, mean 41.50 %"."""
    assert results.time_to is not None
    label, arm, threshold = metric_label(results.time_to.metric), results.time_to.arm, results.threshold
    value = "" if threshold is None else f"{threshold:.2f}{f' {label.unit}' if label.unit else ''}"
    if arm is None:
        return f"{label.name} of {value}"
    return f"the last {label.name} of {printable(arm)} with the same seed" + (f", mean {value}" if value else "")


def changes_table(results: SweepResults) -> Table:
    """What each arm changes in the base recipe, or the command that it is."""
    rows = [[Cell(printable(arm.name)), Cell(printable(_what(arm)))] for arm in results.arms]
    return Table(caption="What the arms are", head=["arm", "changes to the base recipe"], rows=rows)


def environments_table(results: SweepResults) -> Table | None:
    """Software and kind of device of the runs: every value that any of them names."""
    found = [run.environment for arm in results.arms for run in arm.runs if run.environment is not None]
    flat = [flatten(environment.to_dict()) for environment in found]
    keys = dict.fromkeys(key for one in flat for key in one)
    if not keys:
        return None
    rows = [
        [Cell(key.removeprefix("packages.")), Cell(", ".join(dict.fromkeys(one[key] for one in flat if key in one)))]
        for key in keys
    ]
    return Table(caption="Software and device of the runs", head=["", "value"], rows=rows)


def markdown(results: SweepResults) -> str:
    """Returns the tables of values, differences and times as Markdown."""
    tables = [values_table(results), differences_table(results), time_table(results)]
    return "\n".join(table_markdown(table) for table in tables if table is not None)


def table_markdown(table: Table) -> str:
    """Returns a table as Markdown, under its caption."""
    lines: list[Sequence[str]] = [table.head, ["---", *["---:"] * (len(table.head) - 1)]]
    lines += [[cell.text for cell in row] for row in table.rows]
    rows = "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)
    return f"{table.caption}.\n\n{rows}"


def _value(arm: ArmValues, column: str) -> Cell:
    metric = arm.metric(column)
    return Cell(NONE) if metric is None else Cell(metric.describe(), metric.mean)


def _sooner(logs: Difference | None, seeds: int) -> Cell:
    if logs is None:
        return Cell(NONE)
    ratio, half = math.exp(logs.mean), logs.half_width
    if half is None:
        return Cell(f"{ratio:.2f} (1 seed: no interval)", ratio)
    low, high = math.exp(logs.mean - half), math.exp(logs.mean + half)
    return Cell(f"{ratio:.2f} [{low:.2f}, {high:.2f}]{_share(logs.seeds, seeds)}", ratio)


def _share(reached: int, seeds: int) -> str:
    return "" if reached == seeds else f" ({reached} of {seeds} seeds)"


def _what(arm: ArmValues) -> str:
    if arm.command is not None:
        return " ".join(arm.command)
    base = "the base recipe" if arm.recipe is None else f"recipe {arm.recipe}"
    return ", ".join([*([] if arm.recipe is None else [base]), *arm.changes]) or base
