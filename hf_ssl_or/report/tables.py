"""The tables of a report, as text and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ssl_or.report.curves import views_of
from hf_ssl_or.runs.labels import baseline_label, duration, metric_label, printable
from hf_ssl_or.runs.reader import RunRecord
from hf_ssl_or.runs.results import Evaluation

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and the number that it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        rows: Cells, as many as columns.
        sortable: Whether rows may be put into another order.
    """

    caption: str
    head: list[str]
    rows: list[list[Cell]]
    sortable: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(cell.value is not None for cell in column) for column in zip(*self.rows, strict=True)]


def facts(runs: Sequence[RunRecord]) -> Table:
    """What was run: one row per fact, one column per run."""
    rows = [[Cell(name), *(Cell(printable(fact(run))) for run in runs)] for name, fact in _FACTS.items()]
    return Table(caption="What was run", head=["", *(run.name for run in runs)], rows=rows)


def summary(runs: Sequence[RunRecord]) -> Table:
    """One row per run: the headline of each protocol, and the last measures of collapse."""
    columns: dict[str, Callable[[RunRecord], Cell]] = {}
    headlines = {(e.protocol, e.protocol_hash): e.headline for run in runs for e in run.evaluations}
    names = [protocol for protocol, _ in headlines]
    for (protocol, digest), measure in headlines.items():
        suffix = f" [{digest}]" if names.count(protocol) > 1 else ""
        columns[printable(f"{protocol} {metric_label(measure).name}{suffix}, %")] = _headline(protocol, digest)
    for name in ("knn", "rankme", "alpha_req", "participation_ratio", "orthogonality_error"):
        if any(name in line for run in runs for line in run.monitor):
            columns[f"{metric_label(name).title}{', monitor' if name == 'knn' else ''}"] = _last(name)
    columns["Views per second, median"] = _rate
    rows = [[Cell(run.name), *(column(run) for column in columns.values())] for run in runs]
    caption = "Results of the runs; label-free measures are those of the monitor's last evaluation"
    return Table(caption=caption, head=["run", *columns], rows=rows, sortable=True)


def evaluations(runs: Sequence[RunRecord]) -> Table | None:
    """Every measure of every evaluation, with its spread over seeds, its protocol's hash and the baselines."""
    entries = [(run, entry) for run in runs for entry in run.evaluations]
    if not entries:
        return None
    baselines = list(dict.fromkeys(name for run in runs if run.results for name in run.results.baselines))
    heads = [
        "run",
        "protocol",
        "hash",
        "measure",
        "mean",
        "std",
        "seeds",
        *(baseline_label(name).lower() for name in baselines),
    ]
    rows = [_score_row(run, entry, name, baselines) for run, entry in entries for name, _ in entry.test_metrics()]
    caption = "Evaluations, accuracy in %. Only measures of one protocol hash compare. std: over seeds"
    return Table(caption=caption, head=heads, rows=rows, sortable=True)


def recipe_differences(runs: Sequence[RunRecord]) -> Table | None:
    """The settings that are not the same in all runs; None for one run."""
    if len(runs) < 2:
        return None
    flat = [flatten(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if len({one.get(key) for one in flat}) > 1]
    rows = [[Cell(key), *(Cell(one.get(key, NONE)) for one in flat)] for key in keys]
    caption = "Settings that differ between the runs" if rows else "The runs have the same settings"
    return Table(caption=caption, head=["setting", *(run.name for run in runs)], rows=rows, sortable=True)


def environments(runs: Sequence[RunRecord]) -> Table | None:
    """Software and kind of device of each run, as its results name them."""
    flat = [flatten({} if run.results is None else run.results.environment.to_dict()) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    if not keys:
        return None
    rows = [[Cell(key.removeprefix("packages.")), *(Cell(one.get(key, NONE)) for one in flat)] for key in keys]
    return Table(caption="Software and device", head=["", *(run.name for run in runs)], rows=rows)


def flatten(tree: object, path: str = "") -> dict[str, str]:
    """Flattens nested settings to dotted keys with JSON values."""
    if isinstance(tree, dict) and tree:
        return {
            key: value
            for name, branch in tree.items()
            for key, value in flatten(branch, f"{path}.{printable(name)}" if path else printable(name)).items()
        }
    text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
    return {path: printable(text)} if path else {}


# ---------------------------------------------------------------------------------------------------------------------
# Facts of a run


def _state(run: RunRecord) -> str:
    done = int(run.train[-1]["step"]) if run.train else 0
    return f"not finished, {done} steps logged" if run.results is None else f"finished, {done} steps"


def _data(run: RunRecord) -> str:
    size = run.setting("data.image_size")
    pixels = f", {size} px" if size else ""
    if run.results is None:
        return f"{run.setting('data.dataset', NONE)}{pixels}"
    return f"{run.results.data.name}, {run.results.data.images} images{pixels}"


def _encoder(run: RunRecord) -> str:
    stem, start = run.setting("encoder.stem"), run.setting("encoder.init_from")
    return f"{run.setting('encoder.name', NONE)}{f', {stem} stem' if stem else ''}{f', from {start}' if start else ''}"


def _penalty(run: RunRecord) -> str:
    penalty = run.setting("orthogonality.penalty", "none")
    if penalty != "none" and (strength := run.setting("orthogonality.strength")) is not None:
        return f"{penalty}, {run.setting('orthogonality.target')}, strength {strength}"
    return "none" if penalty == "none" else f"{penalty}, weight {run.setting('orthogonality.weight', NONE)}"


def _whitening(run: RunRecord) -> str:
    weight = run.setting("feature_whitening.weight", 0)
    return f"weight {weight}" if weight else "none"


def _length(run: RunRecord) -> str:
    steps = run.setting("training.max_steps")
    return f"{steps} steps" if steps else f"{run.setting('training.epochs', NONE)} epochs"


def _optimizer(run: RunRecord) -> str:
    name, rate = run.setting("training.optimizer.name", NONE), run.setting("training.optimizer.lr", NONE)
    return f"{name}, learning rate {rate}, weight decay {run.setting('training.optimizer.weight_decay', NONE)}"


def _seconds(run: RunRecord) -> str:
    return NONE if run.results is None else duration(run.results.run.train_seconds_this_session)


_FACTS: dict[str, Callable[[RunRecord], Any]] = {
    "state": _state,
    "images": _data,
    "encoder": _encoder,
    "method": lambda run: run.setting("method.name", NONE),
    "views": views_of,
    "orthogonality penalty": _penalty,
    "feature whitening": _whitening,
    "length": _length,
    "batch size": lambda run: run.setting("training.batch_size", NONE),
    "optimizer": _optimizer,
    "seed": lambda run: run.setting("training.seed", NONE),
    "training time (last session)": _seconds,
}


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def _headline(protocol: str, digest: str) -> Callable[[RunRecord], Cell]:
    def cell(run: RunRecord) -> Cell:
        for entry in run.evaluations:
            if (entry.protocol, entry.protocol_hash) == (protocol, digest):
                return Cell(entry.headline_metric.describe(), entry.headline_metric.mean)
        return Cell(NONE)

    return cell


def _last(name: str) -> Callable[[RunRecord], Cell]:
    def cell(run: RunRecord) -> Cell:
        values = [line[name] for line in run.monitor if name in line]
        return Cell(f"{values[-1]:.4g}", values[-1]) if values else Cell(NONE)

    return cell


def _rate(run: RunRecord) -> Cell:
    rate = None if run.images_per_second is None else run.images_per_second * views_of(run)
    return Cell(NONE) if rate is None else Cell(f"{rate:.0f}", rate)


def _score_row(run: RunRecord, entry: Evaluation, measure: str, baselines: Sequence[str]) -> list[Cell]:
    assert run.results is not None
    metric = entry.metrics[measure]
    others = [run.results.baseline(name, entry, measure) for name in baselines]
    numbers = [metric.mean, metric.std, *(None if other is None else other.mean for other in others)]
    mean, std, *rest = [Cell(NONE) if n is None else Cell(f"{n:.2f}", n) for n in numbers]
    words = (run.name, entry.protocol, entry.protocol_hash, metric_label(measure).name)
    sides = [] if entry.data is None else [entry.data.train, entry.data.test]
    data = " \N{RIGHTWARDS ARROW} ".join(f"{side.name} ({side.size})" for side in sides)
    seeds = Cell(str(len(metric.values)), len(metric.values))
    return [*(Cell(printable(word)) for word in words), mean, std, seeds, *rest, Cell(printable(data))]
