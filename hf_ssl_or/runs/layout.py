"""The files of a run's folder, relative to it."""

from __future__ import annotations

import re
from pathlib import Path

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
SPECTRA = "spectra"
CHECKPOINTS = "checkpoints"
ENCODER = "encoder"
FIGURES = "figures"
SPECTRA_FIGURE = "figures/spectra.png"
VIEWS_FIGURE = "figures/views.png"
REPORT = "report.html"
FEATURES = "features.npz"
NEIGHBORS = "neighbors.npz"
PUSH_LOG = "push.log"

_STEP = re.compile(r"step-(\d+)(?:\.npz)?")


def spectra_file(folder: Path, step: int) -> Path:
    """Returns where the spectra after a number of finished steps are."""
    return folder / SPECTRA / f"step-{step}.npz"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Returns where the checkpoint after a number of finished steps is."""
    return folder / CHECKPOINTS / f"step-{step}"


def steps_of(folder: Path) -> list[int]:
    """Lists the steps that a folder of spectra or checkpoints holds, in order; none where it is missing."""
    found = (_STEP.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)
