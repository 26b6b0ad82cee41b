"""The tables of a report, as text and numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ssl_or.report.curves import TITLES, views_of
from hf_ssl_or.report.run_reader import Run, Score, clean, is_number

NONE = "\N{EN DASH}"
_BASELINES = {"untrained": "untrained encoder", "pixels": "raw pixels"}


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


def facts(runs: Sequence[Run]) -> Table:
    """What was run: one row per fact, one column per run."""
    rows = [[Cell(name), *(Cell(clean(fact(run))) for run in runs)] for name, fact in _FACTS.items()]
    return Table(caption="What was run", head=["", *(run.name for run in runs)], rows=rows)


def summary(runs: Sequence[Run]) -> Table:
    """One row per run: the headline of each protocol, and the last measures of collapse."""
    columns: dict[str, Callable[[Run], Cell]] = {}
    headlines = {(s.protocol, s.protocol_hash): s for run in runs for s in run.scores if s.headline}
    names = [protocol for protocol, _ in headlines]
    for (protocol, digest), score in headlines.items():
        suffix = f" [{digest}]" if names.count(protocol) > 1 else ""
        columns[f"{protocol} {score.measure}{suffix}, %"] = _headline(protocol, digest)
    for name in ("knn", "rankme", "alpha_req", "participation_ratio", "orthogonality_error"):
        if any(name in line for run in runs for line in run.monitor):
            columns[TITLES[name] if name != "knn" else "monitor's kNN, %"] = _last(name)
    columns["views/s, median"] = _rate
    rows = [[Cell(run.name), *(column(run) for column in columns.values())] for run in runs]
    caption = "Results of the runs; collapse measures are those of the monitor's last evaluation"
    return Table(caption=caption, head=["run", *columns], rows=rows, sortable=True)


def evaluations(runs: Sequence[Run]) -> Table | None:
    """Every measure of every evaluation, with its spread over seeds, its protocol's hash and the baselines."""
    scores = [(run, score) for run in runs for score in run.scores]
    if not scores:
        return None
    baselines = list(dict.fromkeys(name for _, score in scores for name in score.baselines))
    head = ["run", "protocol", "hash", "measure", "mean", "std", "seeds", *(_BASELINES.get(b, b) for b in baselines)]
    rows = [_score_row(run, score, baselines) for run, score in scores]
    caption = "Evaluations, accuracy in %. Only measures of one protocol hash compare. std: over seeds"
    return Table(caption=caption, head=[*head, "fit on \N{RIGHTWARDS ARROW} evaluated on"], rows=rows, sortable=True)


def recipe_differences(runs: Sequence[Run]) -> Table | None:
    """The settings that are not the same in all runs; None for one run."""
    if len(runs) < 2:
        return None
    flat = [flatten(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if len({one.get(key) for one in flat}) > 1]
    rows = [[Cell(key), *(Cell(one.get(key, NONE)) for one in flat)] for key in keys]
    caption = "Settings that differ between the runs" if rows else "The runs have the same settings"
    return Table(caption=caption, head=["setting", *(run.name for run in runs)], rows=rows, sortable=True)


def environments(runs: Sequence[Run]) -> Table | None:
    """Software and kind of device of each run, as its results name them."""
    flat = [flatten(run.results.get("environment", {})) for run in runs]
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
            for key, value in flatten(branch, f"{path}.{clean(name)}" if path else clean(name)).items()
        }
    text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)
    return {path: clean(text)} if path else {}


# ---------------------------------------------------------------------------------------------------------------------
# Facts of a run


def _state(run: Run) -> str:
    done = int(run.train[-1]["step"]) if run.train else 0
    return f"finished, {done} steps" if run.finished else f"not finished, {done} steps logged"


def _data(run: Run) -> str:
    data = run.results.get("data")
    known = data if isinstance(data, dict) else {}
    images = f", {known['images']} images" if "images" in known else ""
    size = run.setting("data.image_size")
    return f"{known.get('name', run.setting('data.dataset', NONE))}{images}{f', {size} px' if size else ''}"


def _encoder(run: Run) -> str:
    stem, start = run.setting("encoder.stem"), run.setting("encoder.init_from")
    return f"{run.setting('encoder.name', NONE)}{f', {stem} stem' if stem else ''}{f', from {start}' if start else ''}"


def _penalty(run: Run) -> str:
    penalty = run.setting("orthogonality.penalty", "none")
    return "none" if penalty == "none" else f"{penalty}, weight {run.setting('orthogonality.weight', NONE)}"


def _whitening(run: Run) -> str:
    weight = run.setting("feature_whitening.weight", 0)
    return f"weight {weight}" if weight else "none"


def _length(run: Run) -> str:
    steps = run.setting("training.max_steps")
    return f"{steps} steps" if steps else f"{run.setting('training.epochs', NONE)} epochs"


def _optimizer(run: Run) -> str:
    name, rate = run.setting("training.optimizer.name", NONE), run.setting("training.optimizer.lr", NONE)
    return f"{name}, learning rate {rate}, weight decay {run.setting('training.optimizer.weight_decay', NONE)}"


def _seconds(run: Run) -> str:
    timing = run.results.get("run")
    seconds = timing.get("train_seconds_this_session") if isinstance(timing, dict) else None
    return _duration(seconds) if is_number(seconds) else NONE


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


_FACTS: dict[str, Callable[[Run], Any]] = {
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


def _headline(protocol: str, digest: str) -> Callable[[Run], Cell]:
    def cell(run: Run) -> Cell:
        for score in run.scores:
            if score.headline and (score.protocol, score.protocol_hash) == (protocol, digest):
                spread = "" if score.std is None else f" \N{PLUS-MINUS SIGN} {score.std:.2f}"
                return Cell(f"{score.mean:.2f}{spread}", score.mean)
        return Cell(NONE)

    return cell


def _last(name: str) -> Callable[[Run], Cell]:
    def cell(run: Run) -> Cell:
        values = [line[name] for line in run.monitor if name in line]
        return Cell(f"{values[-1]:.4g}", values[-1]) if values else Cell(NONE)

    return cell


def _rate(run: Run) -> Cell:
    rates = [line["images_per_second"] for line in run.train if "images_per_second" in line]
    rate = statistics.median(rates) * views_of(run) if rates else None
    return Cell(NONE) if rate is None else Cell(f"{rate:.0f}", rate)


def _score_row(run: Run, score: Score, baselines: Sequence[str]) -> list[Cell]:
    numbers = [score.mean, score.std, *(score.baselines.get(name) for name in baselines)]
    mean, std, *others = [Cell(NONE) if n is None else Cell(f"{n:.2f}", n) for n in numbers]
    words = [Cell(text) for text in (run.name, score.protocol, score.protocol_hash, score.measure)]
    return [*words, mean, std, Cell(str(score.values), score.values), *others, Cell(score.data)]
