"""Eigenvalue spectra of features and weights, in float64, from all rows at once or from a stream of batches."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import sum_over_ranks
from hf_ssl_or.errors import InputError

_STAGE = re.compile(r"(?:^|\.)(layer\d+|stages\.\d+)\.")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.(?:attn\.proj|mlp\.fc2)$")


_PRECISION = torch.finfo(torch.float64).eps
ROUNDING = (64 * _PRECISION) ** 2  # variance beside the mean square that may be the rounding of constant rows


def as_matrix(values: Tensor | np.ndarray, name: str = "features") -> Tensor:
    """Gives a finite matrix on the CPU, so that a metric does not depend on the device.

    Raises:
        InputError: The input has not two axes, is empty, or holds NaN or infinite values.
    """
    matrix = torch.as_tensor(values).detach().cpu()
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(f"{name}: wants a matrix with one image per row, not shape {tuple(matrix.shape)}")
    bad = int((~matrix.isfinite()).any(1).sum())
    if bad:
        raise InputError(f"{name}: {bad} of {len(matrix)} rows hold NaN or infinite values")
    return matrix


class CovarianceAccumulator:
    """Count, mean and scatter of features, gathered batch by batch, so that spectra need no bank of features.

    Batches are merged by the update of Chan, Golub and LeVeque (1983), which does not cancel when the mean is large
    beside the deviations, as it is for the non-negative features of a ResNet. Nothing is read back to the host before
    a result is asked for.

    Args:
        dimension: Width D of the features.
        device: Where the sums are held; it must know float64.

    Attributes:
        count: Rows seen.
        mean_D: Their mean.
        scatter_DD: Sum of the outer products of the rows' deviations from the mean.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean_D = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter_DD = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features_BD: Tensor) -> None:
        """Takes in a batch of any size."""
        if features_BD.ndim != 2 or features_BD.shape[1] != len(self.mean_D):
            raise InputError(f"features: want shape (images, {len(self.mean_D)}), not {tuple(features_BD.shape)}")
        rows, total = len(features_BD), self.count + len(features_BD)
        if not rows:
            return
        x_BD = features_BD.detach().to(self.mean_D.device, torch.float64)
        mean_D = x_BD.mean(0)
        centred_BD, shift_D = x_BD - mean_D, mean_D - self.mean_D
        self.scatter_DD += centred_BD.T @ centred_BD + torch.outer(shift_D, shift_D) * (self.count * rows / total)
        self.mean_D += shift_D * (rows / total)
        self.count = total

    @torch.no_grad()
    def over_ranks(self) -> CovarianceAccumulator:
        """Merges what all processes have seen; every process gets the same new accumulator."""
        merged = CovarianceAccumulator(len(self.mean_D), self.mean_D.device)
        merged.count = int(sum_over_ranks(torch.tensor(self.count, device=self.mean_D.device)))
        if not merged.count:
            return merged
        merged.mean_D = sum_over_ranks(self.mean_D * self.count) / merged.count
        shift_D = self.mean_D - merged.mean_D
        merged.scatter_DD = sum_over_ranks(self.scatter_DD + self.count * torch.outer(shift_D, shift_D))
        return merged

    @property
    def covariance_DD(self) -> Tensor:
        """Unbiased covariance (divided by count - 1)."""
        return self.scatter_DD / max(self.count - 1, 1)

    @property
    def second_moment_DD(self) -> Tensor:
        """Mean outer product of the rows, not centred."""
        return self.scatter_DD / max(self.count, 1) + torch.outer(self.mean_D, self.mean_D)

    def eigenvalues(self, *, centred: bool = True) -> Tensor:
        """Eigenvalues (D,) of the covariance, or of the second moment, from the largest; rounding is set to 0.

        Raises:
            InputError: No rows were seen, or some held NaN or infinite values.
        """
        if not self.count:
            raise InputError("features: no images were seen")
        matrix_DD = (self.covariance_DD if centred else self.second_moment_DD).cpu()
        if not bool(matrix_DD.isfinite().all()):
            raise InputError("features: some rows hold NaN or infinite values")
        eigenvalues_D = torch.linalg.eigvalsh(matrix_DD).flip(0)
        # Rounding, beside the largest eigenvalue, and beside the mean square for rows that do not vary at all.
        floor = max(
            float(eigenvalues_D[0]) * len(matrix_DD) * _PRECISION, float(self.second_moment_DD.trace()) * ROUNDING
        )
        return torch.where(eigenvalues_D > floor, eigenvalues_D, 0)

    @classmethod
    def of(cls, features_ND: Tensor) -> CovarianceAccumulator:
        """Takes in all rows of a feature matrix."""
        accumulator = cls(features_ND.shape[1])
        for batch_BD in features_ND.split(8192):  # bounds the copy in float64
            accumulator.update(batch_BD)
        return accumulator


# ---------------------------------------------------------------------------------------------------------------------
# Spectra as they are drawn


def normalised_eigenvalues(matrix_ND: Tensor | np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance of a matrix's columns, from the largest, each divided by the largest.

    He & Ozay (ICML 2022); section 5 of He, Du & Ma (NeurIPS 2024), who draw them on logarithmic axes.

    Returns:
        float64 array (D,); 0 where an eigenvalue is not above the rounding error (all 0 for constant rows).
    """
    eigenvalues_D = CovarianceAccumulator.of(as_matrix(matrix_ND, "matrix")).eigenvalues()
    return (eigenvalues_D / eigenvalues_D[0]).numpy() if eigenvalues_D[0] > 0 else eigenvalues_D.numpy()


def feature_spectrum(features_ND: Tensor | np.ndarray) -> np.ndarray:
    """Normalised eigenvalues (D,) of features, see `normalised_eigenvalues`; with N <= D the last D - N + 1 are 0."""
    return normalised_eigenvalues(as_matrix(features_ND))


def weight_spectra(encoder: nn.Module) -> dict[str, np.ndarray]:
    """Normalised eigenvalues of the encoder's telling weights, see `select_weights`.

    As in He, Du & Ma (NeurIPS 2024, section 5), a weight is a matrix of its inputs (rows, the samples) by its outputs.

    Returns:
        float64 array (outputs,) for every selected parameter name.
    """
    return {name: normalised_eigenvalues(w_OI.T) for name, w_OI in select_weights(encoder).items()}


def weight_matrices(encoder: nn.Module) -> dict[str, Tensor]:
    """Every convolution's and linear layer's weight as a matrix (outputs, inputs * kernel), by parameter name."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    modules = encoder.named_modules()
    return {f"{name}.weight".lstrip("."): m.weight.detach().flatten(1) for name, m in modules if isinstance(m, layers)}


def select_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """Picks the weights whose spectra are drawn, each as (outputs, inputs * kernel).

    ResNets: the last convolution of each stage. Vision transformers: `attn.proj` and `mlp.fc2` of the first, middle
    and last block. Any other encoder: every weight.
    """
    matrices = weight_matrices(encoder)
    last_of_stage: dict[str, str] = {}
    of_block: dict[int, list[str]] = {}
    for name in matrices:
        module = name.removesuffix(".weight")
        if (stage := _STAGE.search(module)) and ".downsample." not in module:
            last_of_stage[stage[1]] = name
        elif block := _BLOCK.search(module):
            of_block.setdefault(int(block[1]), []).append(name)
    if last_of_stage:
        return {name: matrices[name] for name in last_of_stage.values()}
    if of_block:
        depth = len(of_block)
        return {name: matrices[name] for i in sorted({0, depth // 2, depth - 1}) for name in of_block[i]}
    return matrices
