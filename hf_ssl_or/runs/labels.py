"""The name, unit, direction and meaning of every measure, and text that can be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Direction = Literal["higher", "lower", "near 1"]

# Control characters and line ends; marks that turn or hide text; surrogates, which UTF-8 cannot hold.
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
_TOP_K = re.compile(r"(train_)?top(\d+)(?:_k(\d+))?")


@dataclass(frozen=True)
class MetricLabel:
    """How a measure is shown.

    Attributes:
        name: Its name.
        meaning: What it says, in one line.
        better: Which values are good; None where neither is.
        unit: "%" or nothing.
    """

    name: str
    meaning: str = ""
    better: Direction | None = None
    unit: str = ""

    @property
    def title(self) -> str:
        """The name with the unit and the direction, for a heading."""
        direction = {"higher": "higher is better", "lower": "lower is better", "near 1": "near 1 is good"}
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.name}{unit}" + (f" ({direction[self.better]})" if self.better and not unit else "")

    def goodness(self, value: float) -> float:
        """Returns a number that is larger for better values.

        Raises:
            ValueError: No direction of the measure is better.
        """
        if self.better is None:
            raise ValueError(f"{self.name} has no better direction")
        return {"higher": value, "lower": -value, "near 1": -abs(value - 1)}[self.better]


_LABELS = {
    # Features without labels
    "rankme": MetricLabel("RankMe", "dimensions in use, by the entropy of the singular values", "higher"),
    "effective_rank": MetricLabel("Effective rank", "dimensions in use, by entropy without a floor", "higher"),
    "participation_ratio": MetricLabel(
        "Participation ratio", "number of dimensions that share the variance", "higher"
    ),
    "alpha_req": MetricLabel("\N{GREEK SMALL LETTER ALPHA}-ReQ", "exponent of the decay of the eigenvalues", "near 1"),
    "alpha_req_r2": MetricLabel(
        "\N{GREEK SMALL LETTER ALPHA}-ReQ, R\N{SUPERSCRIPT TWO} of its fit", "how well a power law fits"
    ),
    "nesum": MetricLabel("NESum", "sum of the eigenvalues over the largest", "higher"),
    "stable_rank": MetricLabel("Stable rank", "squared Frobenius norm over squared spectral norm", "higher"),
    "lidar": MetricLabel("LiDAR", "rank of what tells images apart, not their views", "higher"),
    "feature_std": MetricLabel("Feature standard deviation", "mean over dimensions; 0: collapsed to a point"),
    "unit_std": MetricLabel("Standard deviation at unit length", "of features scaled to unit length"),
    "unit_std_relative": MetricLabel("Relative spread at unit length", "1: the same in all directions", "near 1"),
    "dead_dimensions": MetricLabel("Dead dimensions", "features that are the same for all images", "lower"),
    "alignment": MetricLabel("Alignment", "mean distance of two views of one image", "lower"),
    "uniformity": MetricLabel("Uniformity", "how evenly features cover the sphere", "lower"),
    # With labels
    "knn": MetricLabel("kNN top-1", "accuracy of k nearest neighbors on held-out training images", "higher", "%"),
    # Weights and training
    "orthogonality_error": MetricLabel("Orthogonality error", "mean over weights of ||G - I||; 0: orthogonal"),
    "loss": MetricLabel("Loss", "of the method, without the penalty"),
    "penalty": MetricLabel("Orthogonality penalty", "with its weight"),
    "grad_norm": MetricLabel("Gradient norm", "before clipping"),
    "lr": MetricLabel("Learning rate", "of the optimizer"),
    "weight_decay": MetricLabel("Weight decay", "of the optimizer, where it changes"),
    "view_size": MetricLabel("View size", "side of the global views in pixels, where it changes"),
    "minutes": MetricLabel("Minutes", "of training steps, without evaluations", "lower"),
    "images_per_second": MetricLabel("Images per second", "each in all its views"),
    "views_per_second": MetricLabel("Views per second", "images times views"),
    "data_wait_percent": MetricLabel("Waiting for data", "share of the time of a step", unit="% of time"),
}


_BASELINES = {"untrained": "Untrained encoder", "pixels": "Raw pixels"}


def baseline_label(name: str) -> str:
    """Returns a baseline's name in words."""
    return _BASELINES.get(name, printable(name))


def metric_label(name: str) -> MetricLabel:
    """Returns how a measure is shown; one that is not known by its own name, say a method's term of the loss."""
    if (found := _TOP_K.fullmatch(name)) is not None:
        train, k, neighbors = found.groups()
        words = f"{'train ' if train else ''}top-{k}{f', k = {neighbors}' if neighbors else ''}"
        return MetricLabel(words, "accuracy", "higher", "%")
    return _LABELS.get(name) or MetricLabel(printable(name.replace("_", " ").capitalize()))


def printable(text: object) -> str:
    """Returns text of any origin as one line that UTF-8, XML and a terminal can hold."""
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def duration(seconds: float) -> str:
    """Returns seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
