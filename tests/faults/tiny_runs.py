"""Tiny runs as real processes: started, hit by a fault at an instant, resumed, and compared with undisturbed ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from processes import Ended, Processes, command_line
from safetensors.numpy import load_file

STEPS = 20
RECIPE: dict[str, Any] = {
    "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 96, "shapes_test": 0, "num_workers": 1},
    "encoder": {
        "name": "resnet18",
        "stem": "small",
        "channels": [8, 8, 16, 16],
        "model_args": {"layers": [1, 1, 1, 1]},
    },
    # A teacher, a predictor and their statistics are part of the state.
    "method": {"name": "byol", "projector_dim": 32, "projector_hidden": 64, "predictor_hidden": 64},
    "views": {"count": 2},
    "orthogonality": {"penalty": "srip", "weight": 1e-3},  # its vectors too
    "training": {
        "batch_size": 16,
        "max_steps": STEPS,
        "log_every": 1,
        "monitor_every": 2,
        "monitor_images": 32,
        "save_steps": 3,
        "device": "cpu",
        "optimizer": {"name": "adamw", "lr": 0.003},
    },
}
TIMING = {"images_per_second", "data_wait_percent"}
GROUPS = ("method", "optimizer", "orthogonality")

Fault = Callable[[], None]


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """Writes the tiny recipe, with settings of sections replaced."""
    tree = {name: {**section, **sections.get(name, {})} for name, section in RECIPE.items()}
    path.write_text(yaml.safe_dump(tree))
    return path


class Started(Processes):
    """A run that continues, of one or several processes.

    Args:
        arguments: Of the command line, after `hf-ssl-or`.
        log: File for stderr of all processes.
        processes: Number of processes, which find each other as torchrun's do.
        faults: Called in each process before it starts, with effects of their own.
    """

    def __init__(
        self, arguments: Sequence[object], log: Path, *, processes: int = 1, faults: Sequence[Fault] = ()
    ) -> None:
        line = [str(argument) for argument in arguments]
        environment = {"HF_SSL_OR_CACHE": str(log.parent / "cache")}
        super().__init__(_be_a_run, line, list(faults), log=log, count=processes, environment=environment)


def run(arguments: Sequence[object], log: Path, *, timeout: float = 90.0, **more: Any) -> Ended:
    """Starts a run and waits for its end."""
    return Started(arguments, log, **more).wait(timeout)


def _be_a_run(arguments: list[str], faults: list[Fault]) -> None:
    for fault in faults:
        fault()
    command_line(arguments)


# -- comparing ends ---------------------------------------------------------------------------------------------------


def differences(folder: Path, whole: Path) -> list[str]:
    """Lists in what the end of a run differs from another's, bit by bit; times of day and speeds apart."""
    found = []
    tensors = ["encoder/model", *(f"checkpoints/step-{STEPS}/{group}" for group in GROUPS)]
    for name in tensors:
        found += _array_differences(
            name, load_file(folder / f"{name}.safetensors"), load_file(whole / f"{name}.safetensors")
        )
    spectra = sorted(path.name for path in (whole / "spectra").iterdir())
    for name in spectra:
        with np.load(folder / "spectra" / name) as ours, np.load(whole / "spectra" / name) as theirs:
            found += _array_differences(f"spectra/{name}", dict(ours), dict(theirs))
    for name, read in (("metrics.jsonl", metrics), ("state.json", _state), ("results.json", _results)):
        if read(folder) != read(whole):
            found.append(f"{name} differs")
    left = [path.name for path in folder.rglob("*") if ".tmp" in path.name or path.name.startswith(".old")]
    return found + [f"{name} was left behind" for name in left]


def _array_differences(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    if ours.keys() != theirs.keys():
        return [f"{name}: {sorted(ours.keys() ^ theirs.keys())} in one only"]
    return [f"{name}: {key} differs" for key in ours if ours[key].tobytes() != theirs[key].tobytes()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the log without what depends on time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def _state(folder: Path) -> Any:
    return json.loads((folder / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())


def _results(folder: Path) -> Any:
    results = json.loads((folder / "results.json").read_text())
    results["run"].pop("train_seconds_this_session")
    return {key: value for key, value in results.items() if key != "environment"}
