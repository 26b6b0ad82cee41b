"""What figures draw of a run's representations, as plain numbers: few enough for the `results.json` of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from hf_ssl_or.runs.results import Record

LARGE = 0.01  # of the largest eigenvalue


def round_to_digits(values: np.ndarray, digits: int = 4) -> list[float]:
    """Returns numbers rounded to significant digits."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


@dataclass(frozen=True, kw_only=True)
class Spectrum(Record):
    """Normalized eigenvalues.

    Attributes:
        index: Places of the eigenvalues that are drawn, from 1 for the largest; all of them are positive.
        values: The eigenvalues there, over the largest.
        size: Number of eigenvalues.
        positive: How many of them are positive.
        large: How many are above a hundredth of the largest.
    """

    index: list[int]
    values: list[float]
    size: int
    positive: int
    large: int

    @classmethod
    def of(cls, eigenvalues: np.ndarray, most: int | None = None) -> Self:
        """Takes a spectrum in descending order.

        Args:
            eigenvalues: (D,), over the largest.
            most: Eigenvalues to keep at most, evenly spaced on a logarithmic axis and rounded to 4 significant digits;
                None keeps all as they are.
        """
        values = eigenvalues[eigenvalues > 0]
        index = np.arange(1, len(values) + 1)
        kept = values.tolist()
        if most is not None and len(values):
            index = np.unique(np.geomspace(1, len(values), min(most, len(values))).round().astype(int))
            kept = round_to_digits(values[index - 1])
        return cls(
            index=index.tolist(),
            values=kept,
            size=len(eigenvalues),
            positive=len(values),
            large=int((eigenvalues > LARGE).sum()),
        )


@dataclass(frozen=True, kw_only=True)
class FilterCorrelations(Record):
    """Absolute correlations among the filters of a layer, ordered so that filters that are alike stand together.

    Attributes:
        layer: Name of its weight.
        filters: Filters of the layer.
        drawn: How many of them were correlated.
        mean: Mean correlation of two different ones.
        image: Correlations by row, of filters, or means over blocks of them.
    """

    layer: str
    filters: int
    drawn: int
    mean: float
    image: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Embedding(Record):
    """Features of a sample of images in two dimensions.

    Attributes:
        method: "PCA" or "UMAP".
        x: First coordinate of each image.
        y: Second coordinate.
        labels: Class of each image; none without labels.
        class_names: Names of the classes, where they are few enough for a legend.
        variance: Share of the features' variance that the two dimensions hold, in percent; of PCA.
        same_class: Share of an image's nearest neighbors by cosine of the features, before the reduction to two
            dimensions, that have its class, in percent; None without labels.
    """

    method: str
    x: list[float]
    y: list[float]
    labels: list[int] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    variance: float | None = None
    same_class: float | None = None


@dataclass(frozen=True, kw_only=True)
class Representations(Record):
    """What a sweep keeps of one run, for figures of chosen arms.

    Attributes:
        step: The step of the spectra; None without.
        spectra: By key of the run's file of spectra.
        filters: Of the last weight among the spectra.
        embedding: Of the run's sample of images.
    """

    step: int | None = None
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    filters: FilterCorrelations | None = None
    embedding: Embedding | None = None
