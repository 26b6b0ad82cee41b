"""Which checkpoint of a run is best, by a measure that needs no labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ssl_or.callbacks.monitor import knn_of, validation_split
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.evaluation.collapse import collapse_report, lidar
from hf_ssl_or.evaluation.collapse.hidden import scatter_views
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.labels import metric_label
from hf_ssl_or.runs.reader import read_metrics
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.checkpoint import CheckpointStore

LIDAR_IMAGES, LIDAR_VIEWS = 1000, 10  # the paper (Thilak et al., ICLR 2024) takes 50 views


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The outcome of a selection.

    Attributes:
        measure: Name of the measure.
        values: Step of each checkpoint, oldest first, and its value; None where it is undefined.
        step: The chosen one.
        source: "metrics.jsonl" if the run had measured all of them, else "checkpoints".
    """

    measure: str
    values: dict[int, float | None]
    step: int
    source: str


MEASURES = ("rankme", "effective_rank", "participation_ratio", "nesum", "lidar", "knn", "alpha_req")


def select_checkpoint(
    run_dir: Path,
    measure: str,
    encoder: nn.Module,
    sample: Callable[[], Sample],
) -> Choice:
    """Measures every kept checkpoint of a run and chooses the best; of equally good ones, the latest.

    What the run's monitor has written down is taken if it covers all of them, else all are measured, on the monitor's
    images, so that numbers are never compared with those of other images.

    Args:
        run_dir: Folder of the run.
        measure: One of `MEASURES`.
        encoder: Of the run's architecture; holds the weights of the chosen checkpoint afterwards.
        sample: Returns the images to measure on; called if they are needed.

    Raises:
        InputError: The measure is unknown or undefined everywhere, or there is no checkpoint, or one is damaged.
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    store = CheckpointStore(run_dir)
    steps = store.steps()
    if not steps:
        raise InputError(f"{store.folder}: no checkpoint to choose from")
    logged = _logged(run_dir / layout.METRICS, measure)
    values: dict[int, float | None]
    if logged.keys() >= set(steps):
        values, source = {step: logged[step] for step in steps}, layout.METRICS
    else:
        images, values, source = sample(), {}, "checkpoints"
        for step in steps:
            load_checkpoint(store, step, encoder)
            values[step] = images.measure(encoder, measure)
    goodness = metric_label(measure).goodness
    good = {step: goodness(value) for step, value in values.items() if value is not None}
    if not good:
        raise InputError(f"{run_dir}: {measure} is undefined for every checkpoint; choose another measure")
    best = max(good, key=lambda step: (good[step], step))
    load_checkpoint(store, best, encoder)
    return Choice(measure=measure, values=values, step=best, source=source)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The images that checkpoints are measured on: those of the run's monitor.

    Attributes:
        images: Training images.
        labeled: Labeled training images for kNN, or None; never those of the test.
        views: How views are sampled for LiDAR.
        seed: Seed of the run.
        count: Images that the monitor takes.
        batch_size: Images per forward pass.
        device: Where the encoder is.
    """

    images: ImageSet
    labeled: ImageSet | None
    views: Sequence[ViewSpec]
    seed: int
    count: int
    batch_size: int
    device: torch.device | str

    def measure(self, encoder: nn.Module, measure: str) -> float | None:
        """Returns the value, or None if it is undefined for these features."""
        if measure == "knn":
            return self._knn(encoder)
        sample = self.images.sample(self.count, self.seed, "monitor")
        if measure == "lidar":
            few = sample.sample(LIDAR_IMAGES, self.seed, "lidar")
            return lidar(scatter_views(encoder, few, self.views, num_views=LIDAR_VIEWS, **self._how()))
        return collapse_report(extract_features(encoder, sample, progress=False, **self._how())).get(measure)

    def _knn(self, encoder: nn.Module) -> float:
        if self.labeled is None:
            raise InputError("knn needs labeled training images; rankme needs none")
        return knn_of(
            lambda images: extract_features(encoder, images, progress=False, **self._how()),
            *validation_split(self.labeled, self.count, self.seed),
        )

    def _how(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "device": self.device}


def load_checkpoint(store: CheckpointStore, step: int, encoder: nn.Module) -> None:
    """Puts the encoder's weights of a checkpoint into a module of the same architecture.

    Raises:
        InputError: The checkpoint is damaged, or is of another architecture.
    """
    path = store.folder / f"step-{step}"
    groups, _ = store.load(path)
    prefix = "encoder."
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in groups["method"].items() if name.startswith(prefix)
    }
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: does not fit the encoder of the run's recipe.yaml: {reason}") from error


def _logged(path: Path, measure: str) -> dict[int, float | None]:
    """Returns what the monitor wrote, by the number of finished steps; None where it lacks the value."""
    lines = read_metrics(path).of_kind("monitor")
    if not any(measure in line for line in lines):
        return {}
    return {int(line["step"]): line.get(measure) for line in lines}


def write_choice(choice: Choice, path: Path) -> None:
    """Writes the table of a selection as JSON."""
    content = {
        "measure": choice.measure,
        "step": choice.step,
        "source": choice.source,
        "values": {str(step): value for step, value in choice.values.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
