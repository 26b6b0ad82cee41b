"""What `embed` returns: the features of a set of images, and what was found in the set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.feature_file import read_arrays, read_metadata

_SHOWN = 10  # outliers that are listed


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Features of N images.

    Attributes:
        files: Which image each is of: its path in the set's folder, or words that say where it is.
        rows: Place of each image in the source, (N,) int64.
        labels: (N,) int64, or None.
        class_names: Names of the labels, or None.
        neighbor_rows: Rows of the nearest images, (N, K) int64, the nearest first.
        neighbor_similarities: Their cosines, (N, K).
        duplicate_group: Group of near-duplicates, (N,) int64; -1 for none.
        outlier_score: Mean cosine distance to the nearest images, (N,).
        metadata: What the features were made from, plain values; `unreadable` names images that were left out.
        images_per_second: Speed of the encoding; None where an earlier run had done it.
        load_features: Returns the features; use `features`.
    """

    files: list[str]
    rows: Tensor
    labels: Tensor | None = None
    class_names: list[str] | None = None
    neighbor_rows: Tensor | None = None
    neighbor_similarities: Tensor | None = None
    duplicate_group: Tensor | None = None
    outlier_score: Tensor | None = None
    metadata: dict[str, Any] = field(repr=False)
    images_per_second: float | None = None
    load_features: Callable[[], np.ndarray] = field(repr=False)

    @functools.cached_property
    def features(self) -> Tensor:
        """Features, (N, F) float32, read when they are first asked for."""
        return torch.from_numpy(self.load_features())

    @classmethod
    def read(cls, path: str | Path, *, images_per_second: float | None = None) -> Embeddings:
        """Reads what `embed` wrote.

        Raises:
            InputError: The file is not there, or was written by something else.
        """
        path = Path(path)
        metadata = read_metadata(path)
        if metadata is None:
            raise InputError(f"{path}: is no file of features that embed wrote")
        arrays = read_arrays(path, features=False)
        return cls.from_arrays(
            arrays, metadata, lambda: read_arrays(path, features=True)["features"], images_per_second
        )

    @classmethod
    def from_arrays(
        cls,
        arrays: dict[str, np.ndarray],
        metadata: dict[str, Any],
        load_features: Callable[[], np.ndarray],
        images_per_second: float | None = None,
    ) -> Embeddings:
        """Makes it from what a file holds.

        Args:
            arrays: The arrays of an .npz file, but for the features.
            metadata: What the features were made from.
            load_features: Returns the features.
            images_per_second: Speed of the encoding.
        """
        names = ("rows", "labels", "neighbor_rows", "neighbor_similarities", "duplicate_group", "outlier_score")
        tensors = {name: torch.tensor(arrays[name]) for name in names if name in arrays}
        return cls(
            files=arrays["files"].tolist(),
            class_names=metadata["class_names"],
            metadata=metadata,
            load_features=load_features,
            images_per_second=images_per_second,
            **tensors,
        )

    def describe(self) -> str:
        """Returns a few lines about what was embedded and found."""
        data, unreadable = self.metadata["dataset"], self.metadata["unreadable"]
        speed = "" if self.images_per_second is None else f", {self.images_per_second:,.0f} images/s"
        lines = [f"{len(self.files):,} images of {data['name']} by {self.metadata['encoder']['name']}{speed}"]
        if unreadable["count"]:
            named = "; ".join(unreadable["named"][:3])
            lines.append(f"left out {unreadable['count']:,} unreadable images: {named}")
        if self.duplicate_group is not None:
            lines.append(self._describe_duplicates(self.duplicate_group))
        if self.outlier_score is not None:
            k = self.metadata["curation"]["outliers"]
            lines.append(f"outliers by mean cosine distance to the {k} nearest images:")
            top = self.outlier_score.argsort(descending=True, stable=True)[:_SHOWN].tolist()
            lines += [f"  {self.outlier_score[i]:.4f}  {self.files[i]}" for i in top]
        return "\n".join(lines)

    def _describe_duplicates(self, group_N: Tensor) -> str:
        threshold, members = self.metadata["duplicate_threshold"], int((group_N >= 0).sum())
        text = f"near-duplicates: {int(group_N.max()) + 1:,} groups of {members:,} images, cosine >= {threshold:.4f}"
        too_many = 2 * members > len(group_N)
        return f"{text}; that is most of the set: give a higher --duplicates THRESHOLD" if too_many else text
