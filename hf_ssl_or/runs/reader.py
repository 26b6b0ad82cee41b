"""The one reader of run folders: whatever is there, from finished, running and damaged runs alike.

Nothing in a folder is trusted: text is data, arrays are checked, and what cannot be read becomes a problem of the
record. A report shows problems and continues; what publishes a run refuses them.
"""

from __future__ import annotations

import io
import json
import math
import statistics
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import printable
from hf_ssl_or.runs.results import Evaluation, Results, read_results

MOST_RUNS = 10  # of a report
_MARKS = (layout.RECIPE, layout.METRICS, layout.RESULTS)
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError)  # the last: no archive

Arrays = dict[str, np.ndarray]
Line = dict[str, Any]


class Metrics(NamedTuple):
    """A `metrics.jsonl`.

    Attributes:
        lines: Its lines, each with a text `kind` and an integer `step`, the number of finished steps minus one.
        damaged: Numbers, from 1, of other lines; not of a last one, which a kill or a full disk may have cut off.
    """

    lines: list[Line]
    damaged: list[int]

    def of_kind(self, kind: str) -> list[dict[str, float]]:
        """Returns the numbers of one kind of lines, sorted by step, which counts finished steps here.

        Of two lines of one step the later one counts.
        """
        found: dict[int, dict[str, float]] = {}
        for line in self.lines:
            if line["kind"] == kind:
                step = line["step"] + 1
                values = {printable(name): _number(value) for name, value in line.items()}
                found[step] = {name: value for name, value in values.items() if value is not None} | {"step": step}
        return [found[step] for step in sorted(found)]


def read_metrics(path: Path) -> Metrics:
    """Reads a `metrics.jsonl`; none of its lines where the file is missing."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines, damaged = [], []
    for number, text in enumerate(texts, 1):
        line = _parsed_line(text)
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            damaged.append(number)
    return Metrics(lines, damaged)


@dataclass(kw_only=True)
class RunRecord:
    """A run's folder.

    Attributes:
        name: The folder's name.
        folder: The folder.
        recipe: The resolved recipe as plain data; empty when it cannot be read.
        results: What the run measured at its end; None for a run that has not finished.
        metrics: The log.
        problems: Why something is missing from the record, by file.
    """

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    results: Results | None = None
    metrics: Metrics = Metrics([], [])
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What is missing from the record, in sentences."""
        unfinished = self.results is None and layout.RESULTS not in self.problems
        notes = ["This run has not finished: it has no results.json, and so no evaluations."] if unfinished else []
        return [*notes, *(f"{file} was left out, or a part of it: {why}." for file, why in self.problems.items())]

    @cached_property
    def train(self) -> list[dict[str, float]]:
        """Lines of the training log by finished steps."""
        return self.metrics.of_kind("train")

    @cached_property
    def monitor(self) -> list[dict[str, float]]:
        """Lines of the monitor by finished steps."""
        return self.metrics.of_kind("monitor")

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints, oldest first."""
        return layout.steps_of(self.folder / layout.CHECKPOINTS)

    @property
    def evaluations(self) -> list[Evaluation]:
        """What the protocols measured; none for a run that has not finished."""
        return [] if self.results is None else self.results.evaluations

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How images become pixels; None where the results do not say it."""
        return None if self.results is None else self.results.data.pixels()

    @property
    def steps(self) -> int:
        """Optimizer steps of the full run, or as many as were logged; 0 where nothing says."""
        logged = int(self.train[-1]["step"]) if self.train else 0
        return logged if self.results is None else self.results.run.steps

    @property
    def images_per_second(self) -> float | None:
        """Median of the log's rates; None without a log."""
        rates = [line["images_per_second"] for line in self.train if "images_per_second" in line]
        return statistics.median(rates) if rates else None

    @property
    def step_seconds(self) -> float | None:
        """Seconds spent in steps, of all sessions, as the log's rates give them; None without a log."""
        return self._clock[1][-1] or None

    @cached_property
    def _clock(self) -> tuple[list[float], list[float]]:
        """Steps that were finished at each log line, from 0 on, and the seconds spent in them."""
        batch, steps, seconds = self.recipe["training"]["batch_size"], [0.0], [0.0]
        for line in self.train:
            seconds.append(seconds[-1] + (line["step"] - steps[-1]) * batch / line["images_per_second"])
            steps.append(line["step"])
        return steps, seconds

    @property
    def curve(self) -> list[dict[str, float]]:
        """What the monitor has measured at each evaluation, with the `minutes` spent in steps until then."""
        return [
            {"minutes": float(np.interp(line["step"], *self._clock)) / 60}
            | {name: value for name, value in line.items() if math.isfinite(value)}
            for line in (self.monitor if self.train else [])
        ]

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Returns one setting of the recipe, say `setting("training.epochs")`."""
        value: Any = self.recipe
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value

    @cached_property
    def spectra(self) -> list[tuple[int, Arrays]]:
        """(step, normalized eigenvalues by key) of the first and the last evaluation, or of the only one."""
        steps = layout.steps_of(self.folder / layout.SPECTRA)
        found: dict[int, Arrays] = {}
        for order in (steps, reversed(steps)):
            for step in order:
                if step not in found and (spectra := self._spectra(step)):
                    found[step] = spectra
                if step in found:
                    break
        return sorted(found.items(), key=lambda item: item[0])

    @cached_property
    def features(self) -> Arrays:
        """Arrays of `features.npz`: features (N, F) and labels (N,); empty without them."""
        return self._checked(layout.FEATURES, _good_features)

    @cached_property
    def neighbors(self) -> Arrays:
        """Arrays of `neighbors.npz`: images (Q, K + 1, 3, S, S), distances (Q, K) and labels; empty without them."""
        return self._checked(layout.NEIGHBORS, _good_neighbors)

    @cached_property
    def views_picture(self) -> bytes | None:
        """The PNG of the views, or None."""
        path = self.folder / layout.VIEWS_FIGURE
        if not path.is_file():
            return None
        try:
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                picture.verify()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            self.problems[layout.VIEWS_FIGURE] = "is damaged"
            return None
        return content

    def load_all(self) -> None:
        """Reads arrays and the picture now, so that `problems` and `notes` name those that are damaged."""
        for name in ("spectra", "features", "neighbors", "views_picture"):
            getattr(self, name)

    def weight(self, name: str) -> np.ndarray | None:
        """Returns one weight of the saved encoder as a float32 matrix (outputs, inputs * kernel), or None."""
        path = self.folder / layout.ENCODER / "model.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                weight = np.asarray(file.get_tensor(name), dtype=np.float32)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            self.problems["encoder/model.safetensors"] = f"{printable(name)} cannot be read ({printable(error)})"
            return None
        return weight.reshape(len(weight), -1) if weight.ndim >= 2 and np.isfinite(weight).all() else None

    def _spectra(self, step: int) -> Arrays:
        path = layout.spectra_file(self.folder, step)
        arrays = self._arrays(path.relative_to(self.folder).as_posix())
        return {key: array.astype(np.float64) for key, array in arrays.items() if _is_spectrum(array)}

    def _checked(self, file: str, good: Callable[[Arrays], bool]) -> Arrays:
        arrays = self._arrays(file) if (self.folder / file).is_file() else {}
        if arrays and not good(arrays):
            self.problems[file] = "does not hold what it should"
            return {}
        return arrays

    def _arrays(self, file: str) -> Arrays:
        try:
            with np.load(self.folder / file, allow_pickle=False) as archive:
                return {printable(key): archive[key] for key in archive.files}
        except _DAMAGED:
            self.problems[file] = "is damaged"
            return {}


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder; arrays and pictures are read when they are asked for.

    Raises:
        InputError: It is no run's folder.
    """
    if not folder.is_dir() or not any((folder / mark).is_file() for mark in _MARKS):
        raise InputError(
            f"{printable(folder)}: is no run's folder (it holds none of {', '.join(_MARKS)}); "
            "give a folder that hf-ssl-or train made"
        )
    record = RunRecord(name=folder.resolve().name, folder=folder)
    if (folder / layout.RESULTS).exists():
        try:
            record.results = read_results(folder / layout.RESULTS)
        except InputError as error:
            record.problems[layout.RESULTS] = str(error).removeprefix(f"{folder / layout.RESULTS}: ")
    if (folder / layout.RECIPE).exists():
        record.recipe = _read_recipe(record)
    elif record.results is not None:
        record.recipe = record.results.recipe
    record.metrics = read_metrics(folder / layout.METRICS)
    if damaged := record.metrics.damaged:
        where = f"{', '.join(map(str, damaged[:5]))}{' and more' if len(damaged) > 5 else ''}"
        record.problems[layout.METRICS] = f"damaged lines: {where}"
    return record


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Reads 1 to 10 run folders for a report, arrays included, and names each by as few parts as tell them apart.

    Args:
        folders: The folders, in order; one that is given twice is read once.

    Raises:
        InputError: A folder is no run's, or there are more than 10.
    """
    unique = list({folder.resolve(): folder for folder in folders})
    if not 1 <= len(unique) <= MOST_RUNS:
        raise InputError(f"{len(unique)} runs: a report shows 1 to {MOST_RUNS}; leave some out")
    runs = [read_run(folder) for folder in unique]
    for run, name in zip(runs, _names(unique), strict=True):
        run.name = name
        run.load_all()
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [printable("/".join(folder.parts[-parts:])) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read_recipe(record: RunRecord) -> dict[str, Any]:
    try:
        tree = yaml.safe_load((record.folder / layout.RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        record.problems[layout.RECIPE] = f"cannot be read: {printable(' '.join(str(error).split()))}"
        return {}
    if not isinstance(tree, dict):
        record.problems[layout.RECIPE] = "holds no key: value pairs"
        return {}
    return tree


def _parsed_line(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    step = line.get("step")
    return line if type(step) is int and 0 <= step < 2**53 else None


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def _good_features(arrays: Arrays) -> bool:
    features, labels = arrays.get("features"), arrays.get("labels")
    if features is None or features.ndim != 2 or features.dtype.kind != "f" or min(features.shape) < 2:
        return False
    return bool(np.isfinite(features).all()) and (labels is None or _are_labels(labels, features.shape[:1]))


def _good_neighbors(arrays: Arrays) -> bool:
    images, distances, labels = (arrays.get(key) for key in ("images", "distances", "labels"))
    if images is None or images.ndim != 5 or images.dtype != np.uint8 or images.shape[2] != 3 or not images.size:
        return False
    queries, shown = images.shape[:2]
    if distances is None or distances.shape != (queries, shown - 1) or distances.dtype.kind != "f":
        return False
    return labels is None or _are_labels(labels, (queries, shown))


def _are_labels(labels: np.ndarray, shape: tuple[int, ...]) -> bool:
    return labels.shape == shape and labels.dtype.kind in "iu" and int(labels.min(initial=0)) >= 0


def _is_spectrum(array: np.ndarray) -> bool:
    return array.ndim == 1 and array.dtype.kind == "f" and array.size > 0 and bool(np.isfinite(array).all())
