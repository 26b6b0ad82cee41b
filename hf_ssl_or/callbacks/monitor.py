"""Evaluates the encoder while it trains: ranks and spectra without labels, kNN where labels exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_ssl_or.callbacks.base import SSLCallback
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.distributed import rank
from hf_ssl_or.evaluation.collapse import collapse_report
from hf_ssl_or.evaluation.collapse.hidden import hidden_covariances, input_spectrum
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator, normalized_eigenvalues
from hf_ssl_or.evaluation.collapse.weight_spectra import weight_spectra
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.evaluation.protocols.knn import knn_accuracy
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.training.arguments import SSLTrainingArguments

KNN_NEIGHBORS = 20


class MonitorCallback(SSLCallback):
    """Measures collapse, and kNN where there are labels, when an evaluation is due.

    Args:
        monitor: What measures.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def measure(self, trainer: Any) -> dict[str, float]:
        """Returns the monitor's numbers; its spectra are written to the run's folder."""
        path = trainer.run_dir / "spectra" / f"step-{trainer.state.global_step}.npz"
        return self.monitor.evaluate(trainer.encoder, path)


def validation_split(labeled: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Parts a sample of the labeled training images into a bank and images to classify, `count` of each at most.

    What checkpoints are chosen by must not see the test images, which are for the end alone.
    """
    order = keyed_permutation(len(labeled), seed, "monitor knn")
    half = min(count, len(labeled) // 2)
    return labeled.subset(np.sort(order[half : 2 * half])), labeled.subset(np.sort(order[:half]))


def knn_of(features: Callable[[ImageSet], torch.Tensor], bank: ImageSet, validation: ImageSet) -> float:
    """Returns the kNN top-1 accuracy on a validation split, in percent; `features` encodes images."""
    k = min(KNN_NEIGHBORS, len(bank))
    accuracy = knn_accuracy(features(bank), bank.labels, features(validation), validation.labels, k=k)
    return accuracy[f"top1_k{k}"]


class Monitor:
    """Evaluates the encoder on a fixed, seeded sample of images.

    Args:
        images: Training images; ranks and spectra are measured on a sample of them.
        labeled: Labeled training images for kNN, or None for no kNN, see `validation_split`.
        arguments: The sample's size, the seed and the precision.
        device: Where the encoder runs.
    """

    def __init__(
        self,
        images: ImageSet,
        labeled: ImageSet | None,
        arguments: SSLTrainingArguments,
        device: torch.device,
    ) -> None:
        self.arguments, self.device = arguments, device
        self.sample = images.sample(arguments.monitor_images, arguments.seed, "monitor")
        self.knn_images = None
        if labeled is not None and labeled.labels is not None and len(labeled) > 1:
            self.knn_images = validation_split(labeled, arguments.monitor_images, arguments.seed)

    def evaluate(self, encoder: nn.Module, spectra_path: Path) -> dict[str, float]:
        """Measures ranks, orthogonality and kNN accuracy, and writes the spectra as a `.npz` beside.

        Its keys are "input" (pixels), "hidden/<stage>" in order (averaged over space), "representation" and
        "weight/<parameter>"; each holds normalized eigenvalues, see `evaluation.spectra`.

        Returns:
            Named numbers; `knn` is the top-1 accuracy in percent.
        """
        covariances = hidden_covariances(encoder, self.sample, **self._how())
        report = collapse_report(covariances["representation"])
        values = {name: value for name, value in report.items() if isinstance(value, int | float)}
        errors = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="so", weight=1)).errors()
        values["orthogonality_error"] = float(np.mean([float(error) for error in errors.values()]))
        if self.knn_images is not None:
            values["knn"] = self._knn(encoder, *self.knn_images)
        if rank() == 0:
            spectra_path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(spectra_path, **self._spectra(encoder, covariances))
        return values

    def _spectra(self, encoder: nn.Module, covariances: dict[str, CovarianceAccumulator]) -> dict[str, Any]:
        """Returns the normalized eigenvalues of the input, of every stage and the representation, and of weights."""
        features = {name: normalized_eigenvalues(moments, name) for name, moments in covariances.items()}
        weights = {f"weight/{name}": spectrum for name, spectrum in weight_spectra(encoder).items()}
        return {"input": self._input_spectrum, **features, **weights}

    @functools.cached_property
    def _input_spectrum(self) -> np.ndarray:
        return input_spectrum(self.sample)

    def _knn(self, encoder: nn.Module, bank: ImageSet, validation: ImageSet) -> float:
        return knn_of(lambda images: self._features(encoder, images), bank, validation)

    def _features(self, encoder: nn.Module, images: ImageSet) -> torch.Tensor:
        return extract_features(encoder, images, progress=False, **self._how())

    def _how(self) -> dict[str, Any]:
        """How images are encoded."""
        return {"device": self.device, "mixed_precision": self.arguments.mixed_precision}
