"""Reads run folders for a report: whatever is there, from finished, running and damaged runs alike.

Nothing in a folder is trusted: text is data, arrays are checked, and what cannot be read becomes a note of the run.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open

from hf_ssl_or.errors import InputError

MOST_RUNS = 10
_MARKS = ("recipe.yaml", "metrics.jsonl", "results.json")
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")

Spectra = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of one evaluation.

    Attributes:
        protocol: Name of the protocol.
        protocol_hash: Hash of its settings; only equal hashes compare.
        data: Which images were learned from and which were evaluated.
        measure: Name of the measure.
        mean: Over the seeds.
        std: Over the seeds, or None for one value.
        values: Number of values.
        headline: Whether it stands for the protocol where there is room for one number.
        baselines: The same measure of the baselines, by name.
    """

    protocol: str
    protocol_hash: str
    data: str
    measure: str
    mean: float
    std: float | None
    values: int
    headline: bool
    baselines: dict[str, float]


@dataclass(kw_only=True)
class Run:
    """What a run folder holds.

    Attributes:
        name: The folder's name, made unique among the runs of a report.
        folder: The folder.
        recipe: The resolved recipe as plain data; empty when it cannot be read.
        results: `results.json`; empty for a run that has not finished.
        scores: Its evaluations.
        errors: Orthogonality error ||G - I||_F of each layer at the end.
        errors_before: The same before the first step.
        train: Lines of the training log, sorted by step; all values but `kind` are numbers.
        monitor: Lines of the monitor, likewise.
        spectra: (step, normalized eigenvalues by key) of the first and the last evaluation, or of the only one.
        features: Arrays of `features.npz`.
        neighbors: Arrays of `neighbors.npz`.
        preview: The PNG of the views, or None.
        notes: What is missing or damaged, for the reader of the report.
    """

    name: str
    folder: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    errors_before: dict[str, float] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    monitor: list[dict[str, Any]] = field(default_factory=list)
    spectra: list[tuple[int, Spectra]] = field(default_factory=list)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    neighbors: dict[str, np.ndarray] = field(default_factory=dict)
    preview: bytes | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run wrote its results."""
        return bool(self.results)

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Returns one setting of the recipe, say `setting("training.epochs")`."""
        value: Any = self.recipe
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return default if value is None else value


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads 1 to 10 run folders, in the order given; a folder given twice is read once.

    Raises:
        InputError: A folder is no run's, or there are more than 10.
    """
    unique = list({folder.resolve(): folder for folder in folders})
    if not 1 <= len(unique) <= MOST_RUNS:
        raise InputError(f"{len(unique)} runs: a report shows 1 to {MOST_RUNS}; leave some out")
    for folder in unique:
        if not folder.is_dir() or not any((folder / mark).is_file() for mark in _MARKS):
            raise InputError(
                f"{clean(folder)}: is no run's folder (it holds none of {', '.join(_MARKS)}); "
                "give a folder that hf-ssl-or train made"
            )
    return [read_run(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Reads one run folder; see `read_runs`."""
    run = Run(name=name, folder=folder)
    run.results = _mapping(run, "results.json", json.loads)
    recipe = _mapping(run, "recipe.yaml", yaml.safe_load) or run.results.get("recipe")
    run.recipe = recipe if isinstance(recipe, dict) else {}
    if not run.finished and not (folder / "results.json").exists():
        run.note("This run has not finished: it has no results.json, and so no evaluations.")
    run.scores = list(_scores(run))
    run.errors = _layer_errors(run.results.get("weights"))
    run.errors_before = _layer_errors(run.results.get("weights_before"))
    lines = _read_metrics(run)
    run.train, run.monitor = lines.get("train", []), lines.get("monitor", [])
    run.spectra = _first_and_last_spectra(run)
    run.features = _checked(run, "features.npz", _good_features)
    run.neighbors = _checked(run, "neighbors.npz", _good_neighbors)
    run.preview = _picture(run, "figures/views.png")
    return run


def read_weight(run: Run, name: str) -> np.ndarray | None:
    """Reads one weight of the saved encoder as a float32 matrix (outputs, inputs * kernel), or None without one."""
    path = run.folder / "encoder" / "model.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            weight = np.asarray(file.get_tensor(name), dtype=np.float32)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        run.note(f"encoder/model.safetensors: {clean(name)} cannot be read ({clean(error)}).")
        return None
    return weight.reshape(len(weight), -1) if weight.ndim >= 2 and np.isfinite(weight).all() else None


def clean(text: object) -> str:
    """Returns text of any origin as one line that UTF-8, XML and a terminal can hold."""
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def is_number(value: object) -> TypeGuard[float]:
    """Says whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Text files


def _names(folders: Sequence[Path]) -> list[str]:
    """Names folders by as few of their last parts as tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [clean("/".join(folder.parts[-parts:])) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _mapping(run: Run, file: str, parse: Any) -> dict[str, Any]:
    path = run.folder / file
    if not path.is_file():
        return {}
    try:
        tree = parse(path.read_text(encoding="utf-8", errors="replace"))
        if isinstance(tree, dict):
            return tree
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        pass
    run.note(f"{file} is damaged and was left out.")
    return {}


def _read_metrics(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Reads `metrics.jsonl`, by kind; of two lines of one step the later one counts."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        run.note("There is no metrics.jsonl yet.")
        return {}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    damaged = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            kind, step = str(line.pop("kind")), int(line.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            damaged.append(number)
            continue
        values = {clean(key): float(value) for key, value in line.items() if is_number(value)}
        found.setdefault(kind, {})[step] = {"step": step + 1, **values}
    if damaged:
        where = f"lines {', '.join(map(str, damaged[:5]))}{' and more' if len(damaged) > 5 else ''}"
        run.note(f"metrics.jsonl: {len(damaged)} damaged lines were left out ({where}).")
    return {kind: [lines[step] for step in sorted(lines)] for kind, lines in found.items()}


def _scores(run: Run) -> Iterator[Score]:
    evaluations = run.results.get("evaluations", [])
    baselines = run.results.get("baselines", {})
    try:
        for entry in evaluations:
            for measure, value in entry["metrics"].items():
                if not measure.startswith("train_"):
                    yield Score(
                        protocol=clean(entry["protocol"]),
                        protocol_hash=clean(entry["protocol_hash"]),
                        data=_evaluated_on(entry.get("data", {})),
                        measure=clean(measure),
                        mean=float(value["mean"]),
                        std=None if value["std"] is None else float(value["std"]),
                        values=len(value["values"]),
                        headline=measure == entry["headline"],
                        baselines=_baselines(baselines, entry["protocol_hash"], measure),
                    )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        run.note(f"results.json: an evaluation cannot be read ({clean(repr(error))}).")


def _evaluated_on(data: dict[str, Any]) -> str:
    sides = [data[split] for split in ("train", "test") if split in data]
    return " \N{RIGHTWARDS ARROW} ".join(clean(f"{side['name']} ({side['size']})") for side in sides)


def _baselines(baselines: dict[str, list[dict[str, Any]]], protocol_hash: str, measure: str) -> dict[str, float]:
    return {
        clean(name): float(entry["metrics"][measure]["mean"])
        for name, entries in baselines.items()
        for entry in entries
        if entry["protocol_hash"] == protocol_hash and measure in entry["metrics"]
    }


def _layer_errors(report: object) -> dict[str, float]:
    layers = report.items() if isinstance(report, dict) else ()
    errors = {clean(name): layer.get("orthogonality_error") for name, layer in layers if isinstance(layer, dict)}
    return {name: float(error) for name, error in errors.items() if is_number(error)}


# ---------------------------------------------------------------------------------------------------------------------
# Arrays and pictures


def _arrays(run: Run, file: str) -> dict[str, np.ndarray]:
    try:
        with np.load(run.folder / file, allow_pickle=False) as archive:
            return {clean(key): archive[key] for key in archive.files}
    except (*_DAMAGED, AttributeError):  # the last: one array, no archive
        run.note(f"{clean(file)} is damaged and was left out.")
        return {}


def _checked(run: Run, file: str, good: Any) -> dict[str, np.ndarray]:
    if not (run.folder / file).is_file():
        return {}
    arrays = _arrays(run, file)
    if arrays and not good(arrays):
        run.note(f"{file} does not hold what it should and was left out.")
        return {}
    return arrays


def _good_features(arrays: dict[str, np.ndarray]) -> bool:
    features, labels = arrays.get("features"), arrays.get("labels")
    if features is None or features.ndim != 2 or features.dtype.kind != "f" or min(features.shape) < 2:
        return False
    return bool(np.isfinite(features).all()) and (labels is None or _are_labels(labels, features.shape[:1]))


def _good_neighbors(arrays: dict[str, np.ndarray]) -> bool:
    images, distances, labels = (arrays.get(key) for key in ("images", "distances", "labels"))
    if images is None or images.ndim != 5 or images.dtype != np.uint8 or images.shape[2] != 3 or not images.size:
        return False
    queries, shown = images.shape[:2]
    if distances is None or distances.shape != (queries, shown - 1) or distances.dtype.kind != "f":
        return False
    return labels is None or _are_labels(labels, (queries, shown))


def _are_labels(labels: np.ndarray, shape: tuple[int, ...]) -> bool:
    return labels.shape == shape and labels.dtype.kind in "iu" and int(labels.min(initial=0)) >= 0


def _first_and_last_spectra(run: Run) -> list[tuple[int, Spectra]]:
    steps = {}
    for path in (run.folder / "spectra").glob("step-*.npz"):
        if (digits := path.stem.removeprefix("step-")).isdecimal():
            steps[int(digits)] = path.name
    found: dict[int, Spectra] = {}
    for order in (sorted(steps), sorted(steps, reverse=True)):
        for step in order:
            if step in found:
                break
            arrays = _arrays(run, f"spectra/{steps[step]}")
            spectra = {key: array.astype(np.float64) for key, array in arrays.items() if _is_spectrum(array)}
            if spectra:
                found[step] = spectra
                break
    return sorted(found.items(), key=lambda item: item[0])


def _is_spectrum(array: np.ndarray) -> bool:
    return array.ndim == 1 and array.dtype.kind == "f" and array.size > 0 and bool(np.isfinite(array).all())


def _picture(run: Run, file: str) -> bytes | None:
    path = run.folder / file
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        run.note(f"{file} is damaged and was left out.")
        return None
    return content
