"""Eigenvalue spectra of features, in float64, from all rows at once or from a stream of batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.distributed import sum_over_ranks
from hf_ssl_or.errors import InputError

_PRECISION = torch.finfo(torch.float64).eps
ROUNDING = (64 * _PRECISION) ** 2  # variance beside the mean square that may be the rounding of constant rows


def as_matrix(values: Tensor | np.ndarray, name: str = "features") -> Tensor:
    """Returns a finite matrix on the CPU, so that a metric does not depend on the device.

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
        name: What the features are, for error messages.

    Attributes:
        count: Rows seen.
        mean_D: Their mean.
        scatter_DD: Sum of the outer products of the rows' deviations from the mean.
        unit_mean_D: Mean of the rows scaled to unit length.
        unit_scatter_D: Sum of the squared deviations of the rows scaled to unit length.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu", name: str = "features") -> None:
        self.count, self.name = 0, name
        self.mean_D = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter_DD = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        self.unit_mean_D, self.unit_scatter_D = torch.zeros_like(self.mean_D), torch.zeros_like(self.mean_D)

    @torch.no_grad()
    def update(self, features_BD: Tensor) -> None:
        """Takes in a batch of any size."""
        if features_BD.ndim != 2 or features_BD.shape[1] != len(self.mean_D):
            raise InputError(f"{self.name}: want shape (images, {len(self.mean_D)}), not {tuple(features_BD.shape)}")
        rows, total = len(features_BD), self.count + len(features_BD)
        if not rows:
            return
        x_BD = features_BD.detach().to(self.mean_D.device, torch.float64)
        unit_BD = F.normalize(x_BD, dim=1)
        mean_D, unit_mean_D = x_BD.mean(0), unit_BD.mean(0)
        centered_BD, shift_D = x_BD - mean_D, mean_D - self.mean_D
        unit_shift_D, between = unit_mean_D - self.unit_mean_D, self.count * rows / total
        self.scatter_DD += centered_BD.T @ centered_BD + torch.outer(shift_D, shift_D) * between
        self.unit_scatter_D += (unit_BD - unit_mean_D).square().sum(0) + unit_shift_D.square() * between
        self.mean_D += shift_D * (rows / total)
        self.unit_mean_D += unit_shift_D * (rows / total)
        self.count = total

    @torch.no_grad()
    def over_ranks(self) -> CovarianceAccumulator:
        """Merges what all processes have seen; every process gets the same new accumulator."""
        merged = CovarianceAccumulator(len(self.mean_D), self.mean_D.device, self.name)
        merged.count = int(sum_over_ranks(torch.tensor(self.count, device=self.mean_D.device)))
        if not merged.count:
            return merged
        merged.mean_D = sum_over_ranks(self.mean_D * self.count) / merged.count
        merged.unit_mean_D = sum_over_ranks(self.unit_mean_D * self.count) / merged.count
        shift_D, unit_shift_D = self.mean_D - merged.mean_D, self.unit_mean_D - merged.unit_mean_D
        merged.scatter_DD = sum_over_ranks(self.scatter_DD + self.count * torch.outer(shift_D, shift_D))
        merged.unit_scatter_D = sum_over_ranks(self.unit_scatter_D + self.count * unit_shift_D.square())
        return merged

    @property
    def covariance_DD(self) -> Tensor:
        """Unbiased covariance (divided by count - 1)."""
        return self.scatter_DD / max(self.count - 1, 1)

    @property
    def second_moment_DD(self) -> Tensor:
        """Mean outer product of the rows, not centered."""
        return self.scatter_DD / max(self.count, 1) + torch.outer(self.mean_D, self.mean_D)

    def eigenvalues(self, *, centered: bool = True) -> Tensor:
        """Eigenvalues (D,) of the covariance, or of the second moment, from the largest; rounding is set to 0.

        Raises:
            InputError: No rows were seen, or some held NaN or infinite values.
        """
        if not self.count:
            raise InputError(f"{self.name}: no images were seen")
        matrix_DD = (self.covariance_DD if centered else self.second_moment_DD).cpu()
        if not bool(matrix_DD.isfinite().all()):
            raise InputError(f"{self.name}: some rows hold NaN or infinite values")
        return _above_rounding(torch.linalg.eigvalsh(matrix_DD).flip(0), float(self.second_moment_DD.trace()))

    @classmethod
    def of(cls, features: Features, name: str = "features") -> CovarianceAccumulator:
        """Takes in all rows of a feature matrix (N, D); an accumulator is given back as it is."""
        if isinstance(features, CovarianceAccumulator):
            return features
        x_ND = as_matrix(features, name)
        accumulator = cls(x_ND.shape[1], name=name)
        for batch_BD in x_ND.split(8192):  # bounds the copy in float64
            accumulator.update(batch_BD)
        return accumulator


Features = Tensor | np.ndarray | CovarianceAccumulator


def eigenvalues(features: Features, *, centered: bool = True, name: str = "features") -> Tensor:
    """Eigenvalues (D,) of the covariance of features, or of their second moment, from the largest.

    Of a matrix with fewer rows than columns the smaller Gram matrix is decomposed, which has the same eigenvalues
    above 0.

    Args:
        features: Matrix (N, D), or what a stream has gathered.
        centered: The covariance (divided by N - 1); else the second moment (divided by N).
        name: What the features are, for error messages.

    Raises:
        InputError: There are no rows, or some hold NaN or infinite values.
    """
    if isinstance(features, CovarianceAccumulator):
        return features.eigenvalues(centered=centered)
    x_ND = as_matrix(features, name)
    rows, dimension = x_ND.shape
    if rows >= dimension:
        return CovarianceAccumulator.of(x_ND, name).eigenvalues(centered=centered)
    x_ND = x_ND.double()
    mean_square = float(x_ND.square().sum() / rows)
    x_ND = x_ND - x_ND.mean(0) if centered else x_ND
    gram_NN = x_ND @ x_ND.T / (max(rows - 1, 1) if centered else rows)
    return F.pad(_above_rounding(torch.linalg.eigvalsh(gram_NN).flip(0), mean_square), (0, dimension - rows))


def _above_rounding(eigenvalues_D: Tensor, mean_square: float) -> Tensor:
    """Sets to 0 what is rounding beside the largest eigenvalue, or beside the mean square where rows do not vary."""
    floor = max(float(eigenvalues_D[0]) * len(eigenvalues_D) * _PRECISION, mean_square * ROUNDING)
    return torch.where(eigenvalues_D > floor, eigenvalues_D, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Spectra as they are plotted


def normalized_eigenvalues(features: Features, name: str = "features") -> np.ndarray:
    """Eigenvalues of the covariance of a matrix's columns, from the largest, each divided by the largest.

    He & Ozay (ICML 2022); section 5 of He, Du & Ma (NeurIPS 2024), who plot them on logarithmic axes, dashed where
    some eigenvalue is not positive, with the number of those: here `(spectrum == 0).sum()`.

    Args:
        features: Matrix (N, D), or what a stream has gathered; with N <= D the last D - N + 1 are 0.
        name: What the matrix is, for error messages.

    Returns:
        float64 array (D,); 0 where an eigenvalue is not above the rounding error (all 0 for constant rows).
    """
    eigenvalues_D = eigenvalues(features, name=name)
    return (eigenvalues_D / eigenvalues_D[0]).numpy() if eigenvalues_D[0] > 0 else eigenvalues_D.numpy()
