"""Looks at the encoder while it trains: ranks and spectra without labels, kNN where labels exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_ssl_or.data.images import ImageSet
from hf_ssl_or.distributed import rank
from hf_ssl_or.evaluation.collapse import collapse_report
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.evaluation.knn import knn_accuracy
from hf_ssl_or.evaluation.spectra import feature_spectrum, weight_spectra
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.training.arguments import TrainingArguments

KNN_NEIGHBOURS = 20


class Monitor:
    """Judges the encoder on a fixed, seeded sample of images.

    Args:
        images: Training images; ranks and spectra are measured on a sample of them.
        bank: Labelled images that vote in kNN, or None for no kNN.
        test: Labelled images that kNN classifies, or None for no kNN.
        arguments: Gives the sample's size, the seed and the precision.
        device: Where the encoder runs.
    """

    def __init__(
        self,
        images: ImageSet,
        bank: ImageSet | None,
        test: ImageSet | None,
        arguments: TrainingArguments,
        device: torch.device,
    ) -> None:
        self.arguments, self.device = arguments, device
        self.mean, self.std = images.mean, images.std
        self.image_size = images.image_size
        self.sample = self._sample(images, "monitor")
        labelled = bank is not None and test is not None and bank.labels is not None and test.labels is not None
        self.bank = self._sample(bank, "monitor bank") if bank is not None and labelled else None
        self.test = self._sample(test, "monitor test") if test is not None and labelled else None

    def look(self, encoder: nn.Module, spectra_path: Path) -> dict[str, float]:
        """Measures ranks, orthogonality and kNN accuracy, and writes the spectra as a `.npz` beside.

        Returns:
            Named numbers; `knn` is the top-1 accuracy in percent.
        """
        features = self._features(encoder, self.sample)
        values = collapse_report(features)
        errors = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="so", weight=1)).errors()
        values["orthogonality_error"] = float(np.mean([float(error) for error in errors.values()]))
        if self.bank is not None and self.test is not None:
            values["knn"] = self._knn(encoder, self.bank, self.test)
        if rank() == 0:
            spectra_path.parent.mkdir(parents=True, exist_ok=True)
            spectra: dict[str, Any] = {"representation": feature_spectrum(features), **weight_spectra(encoder)}
            np.savez(spectra_path, **spectra)
        return values

    def _knn(self, encoder: nn.Module, bank: ImageSet, test: ImageSet) -> float:
        accuracy = knn_accuracy(
            self._features(encoder, bank),
            bank.labels,
            self._features(encoder, test),
            test.labels,
            k=min(KNN_NEIGHBOURS, len(bank)),
        )
        return next(iter(accuracy.values()))

    def _features(self, encoder: nn.Module, images: ImageSet) -> torch.Tensor:
        return extract_features(
            encoder,
            images,
            mean=self.mean,
            std=self.std,
            image_size=self.image_size,
            device=self.device,
            mixed_precision=self.arguments.mixed_precision,
            progress=False,
        )

    def _sample(self, images: ImageSet, purpose: str) -> ImageSet:
        order = keyed_permutation(len(images), self.arguments.seed, purpose)
        return images.subset(np.sort(order[: self.arguments.monitor_images]))
