"""Reads a run's folder for its card: what was run and measured, without paths, hosts and the names of people."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing

FIGURE = "figures/spectra.png"
_PATH = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[A-Za-z][\w+.-]*://")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run's folder says, with every path shortened to its last part.

    Attributes:
        name: The folder's name.
        folder: The folder.
        recipe: The resolved recipe as plain data.
        results: `results.json`; empty for a run that was not evaluated.
        train: Lines of the training log, in order.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    results: dict[str, Any]
    train: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Entries of the protocols that evaluated the encoder."""
        return self.results.get("evaluations", [])

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, 0 where nothing says."""
        logged = self.train[-1]["step"] + 1 if self.train else 0
        return int(self.results.get("run", {}).get("steps", logged))

    @property
    def step_seconds(self) -> float | None:
        """Seconds spent in steps, of all sessions, as the log's rates give them; None without a log."""
        batch, done, seconds = self.recipe["training"]["batch_size"], 0, 0.0
        for line in self.train:
            seconds += (line["step"] + 1 - done) * batch / line["images_per_second"]
            done = line["step"] + 1
        return seconds or None

    @property
    def images_per_second(self) -> float | None:
        """Median of the log's rates; None without a log."""
        return statistics.median(line["images_per_second"] for line in self.train) if self.train else None

    @property
    def evaluation_data(self) -> dict[str, Any]:
        """The settings of the images of the evaluations."""
        return self.recipe.get("evaluation_data") or self.recipe["data"]

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What became of pixels; None where the results do not say it."""
        values = self.results.get("data", {}).get("preprocessing")
        return None if values is None else Preprocessing(**values)


def read_facts(folder: Path) -> RunFacts:
    """Reads a run's folder.

    Raises:
        InputError: It is no run's folder, or a file in it is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder}: is no run's folder (it has no recipe.yaml); give one that hf-ssl-or train made")
    recipe = without_paths(_read(folder / "recipe.yaml", yaml.safe_load))
    has_results = (folder / "results.json").is_file()
    results = without_paths(_read(folder / "results.json", _strict_json)) if has_results else {}
    train = [line for line in read_log(folder) if line.get("kind") == "train"]
    return RunFacts(name=folder.resolve().name, folder=folder, recipe=recipe, results=results, train=train)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`, none where it is missing; a last line cut off by a kill is left out."""
    path, lines = folder / "metrics.jsonl", []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError) as error:
            if number < len(texts):
                raise InputError(f"{path}: line {number} is no JSON object ({error}); mend or remove it") from error
    return lines


def without_paths(value: Any) -> Any:
    """Shortens every path and address in plain data to its last part, which names no user and no host."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "folder"
    return value


def hub_dataset(dataset: str) -> str | None:
    """Returns a data set's name if it is a Hub id, "owner/name"; a folder of that name wins, as when it was loaded."""
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return None
    return dataset if dataset.count("/") == 1 and not dataset.endswith(".tar") and not Path(dataset).exists() else None


def duration(seconds: float) -> str:
    """Returns seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def counted(number: float, what: str) -> str:
    """Returns a number with its noun, say "1 epoch" or "9 epochs"."""
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number to publish")

    return json.loads(text, parse_constant=refuse)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds no key: value pairs")
    return tree


def seeds_of(entries: Sequence[dict[str, Any]]) -> list[int]:
    """Lists the seeds that any of the evaluations was run with."""
    return sorted({seed for entry in entries for seed in entry["seeds"]})
