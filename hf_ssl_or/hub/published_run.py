"""A run as strangers may see it: undamaged, without paths, hosts and the names of people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.redaction import without_paths
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.reader import RunRecord, read_run
from hf_ssl_or.runs.results import Results


def published_run(folder: Path) -> RunRecord:
    """Reads a run's folder, with every path in its recipe and its results shortened to its last part.

    Raises:
        InputError: It is no run's folder, or a file in it is damaged.
    """
    if not (folder / layout.RECIPE).is_file():
        raise InputError(f"{folder}: is no run's folder (it has no recipe.yaml); give one that hf-ssl-or train made")
    record = read_run(folder)
    for file, why in record.problems.items():
        raise InputError(f"{folder / file}: {why}; mend or remove the file")
    record.recipe = without_paths(record.recipe)
    if record.results is not None:
        record.results = Results.from_dict(without_paths(record.results.to_dict()), str(folder / layout.RESULTS))
    return record


def encoder_config(run_folder: Path) -> dict[str, Any]:
    """Returns the `config.json` of a run's encoder; empty where it has none yet.

    Raises:
        InputError: It cannot be read.
    """
    path = run_folder / layout.ENCODER / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds no object")
    return config


def hub_dataset(dataset: str) -> str | None:
    """Returns a data set's name if it is a Hub id, "owner/name"; a folder of that name wins, as when it was loaded."""
    try:
        validate_repo_id(dataset)
    except HFValidationError:
        return None
    return dataset if dataset.count("/") == 1 and not dataset.endswith(".tar") and not Path(dataset).exists() else None
