"""How many dimensions features use: label-free measures of dimensional collapse, in float64.

Z is a matrix of N images by D features with singular values s_i; l_i are the eigenvalues of its centered covariance.
Libraries differ above all in whether they center, and so in their numbers; here each measure follows its own paper:

    not centered, from s_i:  `rankme`, `effective_rank`, `stable_rank`
    centered, from l_i:      `alpha_req`, `participation_ratio`, `nesum`
    from several views of each image:  `lidar`

They take a matrix or a `CovarianceAccumulator`, which gathers features batch by batch and over processes and needs no
bank of them; `lidar` takes views or a `ViewScatter`. Both ways give the same number. `rankme`, `alpha_req` and `lidar`
are computed by the modules of `evaluation.metrics`, from spectra.

N rows span at most N directions (N - 1 once centered): with N < D every measure but `alpha_req` is bounded by N, and
should not be compared with one of another N. A matrix of zeros uses 0 dimensions; so do, once centered, constant
features.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import ROUNDING, CovarianceAccumulator, Features, eigenvalues
from hf_ssl_or.evaluation.collapse.uniformity import alignment, uniformity, unit_std
from hf_ssl_or.evaluation.collapse.view_scatter import Views, ViewScatter
from hf_ssl_or.evaluation.metrics import compute_metric
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.penalties import so
from hf_ssl_or.orthogonality.selection import select_sites

_EPS = 1e-7
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


def rankme(features: Features, eps: float = _EPS) -> float:
    """Effective rank of features: exp of the entropy of p_i = s_i / sum(s) + eps, between 1 and min(N, D).

    Garrido et al., "RankMe" (ICML 2023), equations 1 and 2. Not centered, as there; `reptrix` takes PCA variances
    (centered, squared) instead and returns another number.

    Args:
        features: Matrix (N, D), or a stream; singular values below about 1e-7 of the largest count as 0.
        eps: The paper's 1e-7 (stable-pretraining: 1e-5).
    """
    return _rankme(singular_values(features), eps)


def effective_rank(features: Features) -> float:
    """Effective rank of a matrix: exp of the entropy of s_i / sum(s). Roy & Vetterli (EUSIPCO 2007).

    Args:
        features: Matrix (N, D), or a stream; not centered.
    """
    return entropy_rank(singular_values(features), 0.0)


def alpha_req(features: Features, fit_range: tuple[int, int] = _FIT_RANGE) -> AlphaReq:
    """Exponent of the power law l_i ~ i^-alpha; near 1 is good, large is collapse, 0 is white noise.

    Agrawal et al., "alpha-ReQ" (NeurIPS 2022). The line through log(l_i) over log(i) is fitted with weights 1 / i, as
    in Stringer et al. (Nature 2019). The exponent means nothing where `r2` is low, as for a spectrum that breaks off.

    Args:
        features: Matrix (N, D), or a stream; centered here.
        fit_range: Slice of the sorted eigenvalues: (3, 100), as in the fastssl code, fits the 4th to the 100th;
            `reptrix` takes (10, 100). It is clipped to the positive eigenvalues.

    Raises:
        InputError: Fewer than 3 positive eigenvalues lie in the range.
    """
    return _alpha_req(eigenvalues(features), fit_range)


def participation_ratio(features: Features) -> float:
    """(sum l)^2 / sum l^2 of the centered covariance of (N, D); D for white noise, r for r equal directions."""
    return _participation(eigenvalues(features))


def nesum(features: Features) -> float:
    """Sum of the normalized eigenvalues, sum l_i / l_1, of the covariance of (N, D). He & Ozay (ICML 2022)."""
    return _sum_over_largest(eigenvalues(features))


def stable_rank(matrix: Features) -> float:
    """||A||_F^2 / ||A||_2^2 of a matrix, say a weight; never above its rank. Rudelson & Vershynin (2007)."""
    return _sum_over_largest(eigenvalues(matrix, centered=False, name="matrix"))


def lidar(views: Views, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Effective rank of what tells images apart, beside what tells views of one image apart (LDA).

    Thilak et al., "LiDAR" (ICLR 2024): exp of the entropy of p_i = m_i / sum(m) + eps, with m_i the eigenvalues of
    W^-1/2 B W^-1/2, B the covariance of the images' means (n - 1) and W the covariance of views about their image's
    mean (n * (q - 1)) plus delta * I. With W = L L^T they are those of L^-1 B L^-T: no inverse root. At most
    min(n - 1, D) of them are positive. `reptrix` neither divides the scatters nor takes delta = 1e-4, and returns
    another number.

    Args:
        views: q views of n images, (n, q, D), or a stream; the paper takes n = 1000, q = 50, and fewer images bound
            the rank.
        delta: Ridge of the within-image covariance.
        eps: Keeps the logarithm finite.

    Raises:
        InputError: Not three axes, fewer than 2 images or views, NaN or infinite values.
    """
    values_D = ViewScatter.of(views).discriminant_eigenvalues(delta)
    return compute_metric("lidar", predictions=values_D.numpy(), eps=eps)["lidar"]


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def collapse_report(features: Features, views: Views | None = None) -> dict[str, Any]:
    """All measures, from a feature matrix or from a stream of batches; plain JSON values, none of them NaN.

    Args:
        features: Matrix (N, D), or the accumulator of a stream (of all processes: `accumulator.over_ranks()`).
        views: Several views of each image, (n, q, D), or what a stream has gathered, for `lidar` and `alignment`.

    Returns:
        rankme, effective_rank, stable_rank, participation_ratio, nesum; alpha_req, alpha_req_r2 and alpha_req_range
        (the slice of eigenvalues); feature_std, the mean over dimensions of the standard deviation over images;
        unit_std, and unit_std_relative, the same times sqrt(D); dead_dimensions, which are constant; uniformity, of a
        matrix of 2 images or more; lidar and alignment, of views; dimension and samples. What is undefined is absent,
        and `notes`, a list of sentences, says why.
    """
    moments = CovarianceAccumulator.of(features)
    centered_D, dimension = eigenvalues(moments), len(moments.mean_D)
    values_D = singular_values(moments)
    variance_D, mean_square_D = moments.covariance_DD.diagonal(), moments.second_moment_DD.diagonal()
    notes = _notes(moments, bool(centered_D[0] > 0))
    report: dict[str, Any] = {
        "rankme": _rankme(values_D, _EPS),
        "effective_rank": entropy_rank(values_D, 0.0),
        "stable_rank": _sum_over_largest(values_D.square()),
        "participation_ratio": _participation(centered_D),
        "nesum": _sum_over_largest(centered_D),
        "feature_std": float(variance_D.sqrt().mean()),
        "unit_std": unit_std(moments),
        "unit_std_relative": unit_std(moments) * dimension**0.5,
        "dead_dimensions": int((variance_D <= ROUNDING * mean_square_D).sum()),
        "dimension": dimension,
        "samples": moments.count,
        "notes": notes,
    }
    try:
        alpha = _alpha_req(centered_D, _FIT_RANGE)
        report |= {"alpha_req": float(alpha), "alpha_req_r2": alpha.r2, "alpha_req_range": list(alpha.fit_range)}
    except InputError as error:
        notes.append(f"alpha_req is undefined: {str(error).removeprefix('alpha_req: ')}")
    if not isinstance(features, CovarianceAccumulator) and moments.count > 1:
        report["uniformity"] = uniformity(features)
    if views is not None:
        scatter = ViewScatter.of(views)
        report |= {"lidar": lidar(scatter), "alignment": alignment(scatter)}
    return report


def weight_report(encoder: nn.Module) -> dict[str, dict[str, float]]:
    """Stable rank and orthogonality error ||G - I||_F, G the smaller Gram, of every convolution and linear layer.

    The error is that of `OrthogonalityRegularizer.errors`, in float64, over all matrices of a weight. The stable rank
    is the mean over the experts of a fused weight; any other weight is one matrix, a grouped convolution too.

    Returns:
        `{"stable_rank": ..., "orthogonality_error": ...}` for every parameter name.
    """
    report = {}
    for site in select_sites(encoder, OrthogonalityConfig(penalty="so")):
        weight = site.weight.detach().cpu().double()
        matrices_POI = site.matrices(weight)
        stacked = weight.ndim > 2 and len(site.layout.view) == 3  # experts, rows, columns
        ranked = matrices_POI if stacked or site.parts == 1 else weight.flatten(1)[None]
        report[site.name] = {
            "stable_rank": statistics.fmean(stable_rank(w_OI) for w_OI in ranked),
            "orthogonality_error": float(so(matrices_POI).sum().sqrt()),
        }
    return report


def _notes(moments: CovarianceAccumulator, varies: bool) -> list[str]:
    """Returns what must be known to read the measures."""
    dimension = len(moments.mean_D)
    if moments.count < 2:
        return ["one image has no spread: what is centered, and each standard deviation, is 0"]
    if not varies:
        return ["the features are the same for all images: what is centered, and each standard deviation, is 0"]
    if moments.count <= dimension:
        return [
            f"{moments.count} images span at most {moments.count - 1} of {dimension} dimensions once centered: "
            "compare ranks at this number of images only"
        ]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Formulas of a spectrum, sorted from the largest


def singular_values(features: Features) -> Tensor:
    """Returns the min(N, D) singular values of features, from the largest, divided by sqrt(N)."""
    count = features.count if isinstance(features, CovarianceAccumulator) else len(features)
    return eigenvalues(features, centered=False)[:count].sqrt()


def entropy_rank(values_D: Tensor, eps: float) -> float:
    """Returns exp of the entropy of values / sum(values) + eps; 0 where all are 0."""
    total = float(values_D.sum())
    if total == 0:
        return 0.0
    return float(torch.special.entr(values_D / total + eps).sum().exp())


def _rankme(values_D: Tensor, eps: float) -> float:
    return compute_metric("rankme", predictions=values_D.numpy(), eps=eps)["rankme"]


def _alpha_req(eigenvalues_D: Tensor, fit_range: tuple[int, int]) -> AlphaReq:
    found = compute_metric("alpha_req", predictions=eigenvalues_D.numpy(), fit_range=fit_range)
    first, stop = found["fit_range"]
    return AlphaReq(found["alpha_req"], found["r2"], (first, stop))


def _participation(eigenvalues_D: Tensor) -> float:
    return float(eigenvalues_D.sum() ** 2 / eigenvalues_D.square().sum()) if eigenvalues_D[0] > 0 else 0.0


def _sum_over_largest(eigenvalues_D: Tensor) -> float:
    return float(eigenvalues_D.sum() / eigenvalues_D[0]) if eigenvalues_D[0] > 0 else 0.0


def power_law(eigenvalues_D: Tensor, fit_range: tuple[int, int]) -> AlphaReq:
    """Fits the exponent of `alpha_req` to eigenvalues from the largest.

    Raises:
        InputError: Fewer than 3 positive eigenvalues lie in the range.
    """
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
