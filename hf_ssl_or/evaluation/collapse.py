"""How many dimensions features use: label-free measures of dimensional collapse, in float64.

Z is a matrix of N images by D features with singular values s_i; l_i are the eigenvalues of its centred covariance.
Libraries differ in whether they centre, and so in their numbers; here each measure follows its own paper:

    not centred, from s_i:  `rankme`, `effective_rank`, `stable_rank`
    centred, from l_i:      `alpha_req`, `participation_ratio`, `nesum`, and `lidar` (within and between images)

N rows span at most N directions (N - 1 once centred): with N < D every measure but `alpha_req` is bounded by N, and
should not be compared with one of another N. A matrix of zeros uses 0 dimensions; so do, once centred, constant
features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.spectra import ROUNDING, CovarianceAccumulator, as_matrix, weight_matrices

_FIT_RANGE = (3, 100)


class AlphaReq(float):
    """The exponent of `alpha_req`, a float that remembers its fit.

    Attributes:
        r2: Share of the variance of log(l_i) in the fitted range that the power law explains.
        fit_range: The slice of the sorted eigenvalues that was fitted, after clipping to the positive ones.
    """

    r2: float
    fit_range: tuple[int, int]

    def __new__(cls, alpha: float, r2: float, fit_range: tuple[int, int]) -> AlphaReq:  # noqa: D102
        self = super().__new__(cls, alpha)
        self.r2, self.fit_range = r2, fit_range
        return self


def rankme(features: Tensor | np.ndarray, eps: float = 1e-7) -> float:
    """Effective rank of features: exp of the entropy of p_i = s_i / sum(s) + eps, between 1 and min(N, D).

    Garrido et al., "RankMe" (ICML 2023), equations 1 and 2. Not centred, as there; `reptrix` takes PCA variances
    (centred, squared) instead and gives another number.

    Args:
        features: Matrix (N, D).
        eps: The paper's 1e-7 (stable-pretraining: 1e-5).
    """
    return _entropy_rank(torch.linalg.svdvals(as_matrix(features).double()), eps)


def effective_rank(features: Tensor | np.ndarray) -> float:
    """Effective rank of a matrix: exp of the entropy of s_i / sum(s). Roy & Vetterli (EUSIPCO 2007).

    Args:
        features: Matrix (N, D), not centred.
    """
    return _entropy_rank(torch.linalg.svdvals(as_matrix(features).double()), 0.0)


def alpha_req(features: Tensor | np.ndarray, fit_range: tuple[int, int] = _FIT_RANGE) -> AlphaReq:
    """Exponent of the power law l_i ~ i^-alpha; near 1 is good, large is collapse, 0 is white noise.

    Agrawal et al., "alpha-ReQ" (NeurIPS 2022). The line through log(l_i) over log(i) is fitted with weights 1 / i, as
    in Stringer et al. (Nature 2019). The exponent means nothing where `r2` is low, as for a spectrum that breaks off.

    Args:
        features: Matrix (N, D), centred here.
        fit_range: Slice of the sorted eigenvalues: (3, 100), as in the fastssl code, fits the 4th to the 100th;
            `reptrix` takes (10, 100). It is clipped to the positive eigenvalues.

    Raises:
        InputError: Fewer than 3 positive eigenvalues lie in the range.
    """
    return _power_law(CovarianceAccumulator.of(as_matrix(features)).eigenvalues(), fit_range)


def lidar(views: Tensor | np.ndarray, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Effective rank of what tells images apart, beside what tells views of one image apart (LDA).

    Thilak et al., "LiDAR" (ICLR 2024): exp of the entropy of p_i = m_i / sum(m) + eps, with m_i the eigenvalues of
    W^-1/2 B W^-1/2, B the covariance of the images' means (n - 1) and W the covariance of views about their image's
    mean (n * (q - 1)) plus delta * I. They are the squared singular values of L^-1 M with W = L L^T and M the centred
    means: no eigenvectors and no inverse root. At most min(n - 1, D) of them are positive. `reptrix` neither divides
    the scatters nor takes delta = 1e-4, and gives another number.

    Args:
        views: q views of n images, (n, q, D); the paper takes n = 1000, q = 50, and fewer images bound the rank.
        delta: Ridge of the within-image covariance.
        eps: Keeps the logarithm finite.

    Raises:
        InputError: Not three axes, fewer than 2 images or views, NaN or infinite values.
    """
    x_NQD = torch.as_tensor(views).detach().to("cpu", torch.float64)
    if x_NQD.ndim != 3 or min(x_NQD.shape[:2]) < 2:
        raise InputError(f"views: LiDAR wants (images, views, D) with at least 2 of each, not {tuple(x_NQD.shape)}")
    images, per_image, dimension = x_NQD.shape
    as_matrix(x_NQD.flatten(0, 1), "views")
    mean_ND = x_NQD.mean(1)
    within_MD = (x_NQD - mean_ND[:, None]).flatten(0, 1)
    within_DD = within_MD.T @ within_MD / (images * (per_image - 1)) + delta * torch.eye(dimension, dtype=x_NQD.dtype)
    between_DN = (mean_ND - mean_ND.mean(0)).T / (images - 1) ** 0.5
    whitened_DN = torch.linalg.solve_triangular(torch.linalg.cholesky(within_DD), between_DN, upper=False)
    m = torch.linalg.svdvals(whitened_DN).square()
    if between_DN.square().sum() <= ROUNDING * x_NQD.square().sum(-1).mean():
        return 0.0
    return _entropy_rank(F.pad(m, (0, dimension - len(m))), eps)


def stable_rank(matrix: Tensor | np.ndarray) -> float:
    """||A||_F^2 / ||A||_2^2 of a matrix, say a weight; never above its rank. Rudelson & Vershynin (2007)."""
    return _stable_rank_of_gram(_small_gram(as_matrix(matrix, "matrix").double()))


def participation_ratio(features: Tensor | np.ndarray) -> float:
    """(sum l)^2 / sum l^2 of the centred covariance of (N, D); D for white noise, r for r equal directions."""
    return _participation(CovarianceAccumulator.of(as_matrix(features)).eigenvalues())


def nesum(features: Tensor | np.ndarray) -> float:
    """Sum of the normalised eigenvalues, sum l_i / l_1, of the centred covariance of (N, D). He & Ozay (ICML 2022)."""
    return _sum_over_largest(CovarianceAccumulator.of(as_matrix(features)).eigenvalues())


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def collapse_report(features: Tensor | np.ndarray | CovarianceAccumulator) -> dict[str, float]:
    """All measures that need one view only, from the spectra of a feature matrix or of a stream of batches.

    Args:
        features: Matrix (N, D), or the accumulator of a stream (of all processes: `accumulator.over_ranks()`).

    Returns:
        rankme, effective_rank, participation_ratio, nesum; alpha_req and alpha_req_r2, absent where fewer than 3
        eigenvalues can be fitted; feature_std, the mean over dimensions of the standard deviation over images;
        dimension and samples.
    """
    if not isinstance(features, CovarianceAccumulator):
        features = CovarianceAccumulator.of(as_matrix(features))
    eigenvalues_D = features.eigenvalues()
    rank_bound = min(features.count, len(eigenvalues_D))
    singular_values = features.eigenvalues(centred=False)[:rank_bound].sqrt()
    report = {
        "rankme": _entropy_rank(singular_values, 1e-7),
        "effective_rank": _entropy_rank(singular_values, 0.0),
        "participation_ratio": _participation(eigenvalues_D),
        "nesum": _sum_over_largest(eigenvalues_D),
        "feature_std": float(features.covariance_DD.diagonal().sqrt().mean()),
        "dimension": len(eigenvalues_D),
        "samples": features.count,
    }
    if int((eigenvalues_D > 0).sum()) >= _FIT_RANGE[0] + 3:
        alpha = _power_law(eigenvalues_D, _FIT_RANGE)
        report |= {"alpha_req": float(alpha), "alpha_req_r2": alpha.r2}
    return report


def weight_report(encoder: nn.Module) -> dict[str, dict[str, float]]:
    """Stable rank and orthogonality error ||G - I||_F, G the smaller Gram, of every convolution and linear layer.

    Returns:
        `{"stable_rank": ..., "orthogonality_error": ...}` for every parameter name.
    """
    report = {}
    for name, w_OI in weight_matrices(encoder).items():
        gram = _small_gram(as_matrix(w_OI, name).double())
        error = float(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
        report[name] = {"stable_rank": _stable_rank_of_gram(gram), "orthogonality_error": error}
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Formulas of a spectrum, sorted from the largest


def _entropy_rank(values: Tensor, eps: float) -> float:
    total = float(values.sum())
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total + eps).sum().exp())


def _participation(eigenvalues_D: Tensor) -> float:
    return float(eigenvalues_D.sum() ** 2 / eigenvalues_D.square().sum()) if eigenvalues_D[0] > 0 else 0.0


def _sum_over_largest(eigenvalues_D: Tensor) -> float:
    return float(eigenvalues_D.sum() / eigenvalues_D[0]) if eigenvalues_D[0] > 0 else 0.0


def _small_gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix


def _stable_rank_of_gram(gram: Tensor) -> float:
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return float(gram.trace()) / largest if largest > 0 else 0.0


def _power_law(eigenvalues_D: Tensor, fit_range: tuple[int, int]) -> AlphaReq:
    first, stop = fit_range[0], min(fit_range[1], int((eigenvalues_D > 0).sum()))
    if first < 0 or stop - first < 3:
        raise InputError(
            f"alpha_req: {max(stop - first, 0)} positive eigenvalues in the range {fit_range}; 3 are needed"
        )
    rank = torch.arange(first + 1, stop + 1, dtype=torch.float64)
    x, y, weight = rank.log(), eigenvalues_D[first:stop].log(), 1 / rank
    mean_x, mean_y = (x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()
    slope = (weight * (x - mean_x) * (y - mean_y)).sum() / (weight * (x - mean_x).square()).sum()
    residual = y - mean_y - slope * (x - mean_x)
    spread = (y - y.mean()).square().sum()
    r2 = 1 - float(residual.square().sum() / spread) if spread > 0 else 1.0
    return AlphaReq(-float(slope), r2, (first, stop))
