"""The measures against formulas written out in numpy, and against spectra whose answer is known."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse import (
    alpha_req,
    collapse_report,
    effective_rank,
    lidar,
    nesum,
    participation_ratio,
    rankme,
    stable_rank,
    weight_report,
)
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator
from hf_ssl_or.evaluation.collapse.uniformity import alignment, uniformity, unit_std
from hf_ssl_or.evaluation.collapse.view_scatter import ViewScatter
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.orthogonality.regularizer import OrthogonalityRegularizer

METRICS = (rankme, effective_rank, alpha_req, participation_ratio, nesum, stable_rank)


def streamed(features: torch.Tensor, batch: int = 7) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(features.shape[1])
    for batch_BD in features.split(batch):
        accumulator.update(batch_BD)
    return accumulator


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(eigenvalues: torch.Tensor, n: int) -> torch.Tensor:
    """Centered features (n, D) whose covariance has exactly these eigenvalues."""
    d = len(eigenvalues)
    basis = normal(n, d)
    q, _ = torch.linalg.qr(basis - basis.mean(0))
    rotation, _ = torch.linalg.qr(normal(d, d, seed=1))
    return q * (eigenvalues * (n - 1)).sqrt() @ rotation.T


def entropy_rank(p: np.ndarray) -> float:
    p = p[p > 0]
    return math.exp(-sum(x * math.log(x) for x in p))


@pytest.mark.parametrize("shape", [(200, 30), (20, 50)])
def test_rankme_and_effective_rank_follow_their_formulas(shape: tuple[int, int]) -> None:
    z = normal(*shape).numpy() @ np.diag(np.linspace(0.1, 3, shape[1])) + 1.5
    s = np.sqrt(np.clip(np.linalg.eigvalsh(z.T @ z if shape[0] > shape[1] else z @ z.T), 0, None))
    p = s / s.sum()
    assert rankme(z) == pytest.approx(entropy_rank(p + 1e-7), rel=1e-9)
    assert effective_rank(z) == pytest.approx(entropy_rank(p), rel=1e-9)
    assert rankme(torch.from_numpy(z)) == rankme(z)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d"), [(400, 30), (25, 40)])
def test_a_stream_gives_the_same_number(metric, n: int, d: int) -> None:
    z = normal(n, d) * torch.linspace(0.01, 2, d, dtype=torch.float64) + 3
    assert metric(streamed(z)) == pytest.approx(metric(z), rel=1e-8)


def test_the_centered_measures_follow_their_formulas() -> None:
    z = normal(300, 20).numpy() * np.linspace(0.2, 2, 20) + 7
    eig = np.sort(np.linalg.eigvalsh(np.cov(z.T)))[::-1]
    assert participation_ratio(z) == pytest.approx(eig.sum() ** 2 / (eig**2).sum(), rel=1e-10)
    assert nesum(z) == pytest.approx(eig.sum() / eig[0], rel=1e-10)
    assert participation_ratio(z + 100) == pytest.approx(participation_ratio(z), rel=1e-9)  # centered
    assert rankme(z + 100) < rankme(z)  # not centered


def test_white_features_use_every_dimension() -> None:
    z = with_spectrum(torch.ones(64, dtype=torch.float64), 500)
    for metric in (rankme, effective_rank, participation_ratio, nesum, stable_rank):
        assert metric(z) == pytest.approx(64, rel=2e-4), metric.__name__
    assert alpha_req(z) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 17])
def test_rank_r_features_use_r_dimensions(rank: int) -> None:
    eigenvalues = torch.zeros(40, dtype=torch.float64)
    eigenvalues[:rank] = 2.5
    z = with_spectrum(eigenvalues, 400)
    for metric in (effective_rank, participation_ratio, nesum, stable_rank):
        assert metric(z) == pytest.approx(rank, rel=1e-6), metric.__name__
    assert rankme(z) == pytest.approx(rank, rel=1e-3)  # its eps counts the empty directions a little


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.3])
@pytest.mark.parametrize("n", [400, 20_000])
def test_alpha_req_finds_the_exponent(exponent: float, n: int) -> None:
    if n > 400:  # sampled, not exact
        z = normal(n, 120) * torch.arange(1, 121, dtype=torch.float64) ** (-exponent / 2)
        assert alpha_req(z) == pytest.approx(exponent, abs=0.05)
        return
    alpha = alpha_req(with_spectrum(torch.arange(1, 151, dtype=torch.float64) ** -exponent, n))
    assert alpha == pytest.approx(exponent, abs=1e-7)
    assert alpha.r2 == pytest.approx(1) and alpha.fit_range == (3, 100)
    assert json.dumps(alpha) == repr(float(alpha))


def test_alpha_req_is_a_weighted_fit() -> None:
    z = normal(500, 50) * torch.linspace(1, 0.1, 50, dtype=torch.float64)
    y = np.log(np.sort(np.linalg.eigvalsh(np.cov(z.numpy().T)))[::-1][5:30])
    x = np.log(np.arange(6, 31))
    slope, _ = np.polyfit(x, y, 1, w=np.sqrt(1 / np.arange(6, 31)))  # polyfit weighs residuals, not their squares
    assert alpha_req(z, fit_range=(5, 30)) == pytest.approx(-slope, rel=1e-9)
    assert alpha_req(z, fit_range=(5, 30)) != pytest.approx(-np.polyfit(x, y, 1)[0], rel=1e-3)


@pytest.mark.parametrize(("n", "q", "d"), [(40, 6, 10), (8, 5, 30)])
def test_lidar_follows_its_formula(n: int, q: int, d: int) -> None:
    x = (normal(n, 1, d) + 0.5 * normal(n, q, d, seed=1)).numpy()
    means = x.mean(1)
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / (n - 1)
    within = sum(np.outer(v, v) for v in (x - means[:, None]).reshape(-1, d)) / (n * (q - 1)) + 1e-4 * np.eye(d)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    m = np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None)
    assert lidar(x) == pytest.approx(entropy_rank(m / m.sum() + 1e-8), rel=1e-7)


def test_lidar_counts_only_what_tells_images_apart() -> None:
    images = torch.zeros(200, 1, 20, dtype=torch.float64)
    images[:, 0, :4] = with_spectrum(torch.ones(4, dtype=torch.float64), 200)
    views = images + 0.01 * normal(200, 10, 20)
    assert lidar(views) == pytest.approx(4, rel=0.05)
    assert lidar(torch.ones(5, 4, 3)) == 0


def test_stable_rank() -> None:
    a = normal(7, 19).numpy()
    s = np.linalg.svd(a, compute_uv=False)
    assert stable_rank(a) == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-12)
    assert stable_rank(a.T) == pytest.approx(stable_rank(a), rel=1e-12)
    assert stable_rank(np.outer(a[0], a[1])) == pytest.approx(1)


def test_constant_features_use_no_dimension_once_centered() -> None:
    z = torch.full((5000, 8), 0.1) * torch.arange(1, 9)
    report = collapse_report(z)
    assert report["participation_ratio"] == report["nesum"] == participation_ratio(z) == nesum(z) == 0
    assert report["rankme"] == pytest.approx(rankme(z), rel=1e-6) == pytest.approx(1, abs=1e-4)
    assert report["feature_std"] == pytest.approx(0, abs=1e-12)
    assert collapse_report(torch.zeros(10, 4))["rankme"] == rankme(torch.zeros(10, 4)) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_bad_features_are_refused(metric) -> None:
    bad = normal(10, 20)
    bad[3, 2] = torch.nan
    with pytest.raises(InputError, match="1 of 10 rows hold NaN or infinite"):
        metric(bad)
    with pytest.raises(InputError, match=r"not shape \(4,\)"):
        metric(torch.zeros(4))
    with pytest.raises(InputError, match="not shape"):
        metric(torch.zeros(0, 4))


def test_lidar_and_alignment_of_a_stream_are_the_same() -> None:
    views = normal(50, 1, 12) + 0.4 * normal(50, 5, 12, seed=1) + 2
    scatter = ViewScatter(12, 5)
    for batch_BVD in views.split(9):
        scatter.update(batch_BVD)
    assert lidar(scatter) == pytest.approx(lidar(views), rel=1e-8)
    assert lidar(scatter, delta=0.5) == pytest.approx(lidar(views, delta=0.5), rel=1e-8) != lidar(views)
    assert alignment(scatter) == pytest.approx(alignment(views), rel=1e-12)


def test_bad_views_and_spectra_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 of each"):
        lidar(torch.zeros(10, 1, 4))
    with pytest.raises(InputError, match="NaN"):
        lidar(torch.full((10, 2, 4), torch.nan))
    with pytest.raises(InputError, match="1 images were seen; at least 2 are needed"):
        lidar(normal(1, 3, 4))
    with pytest.raises(InputError, match="delta=0 is too small"):
        lidar(normal(4, 2, 30), delta=0)
    with pytest.raises(InputError, match=r"want shape \(images, 2, 4\), not \(5, 3, 4\)"):
        ViewScatter(4, 2).update(torch.zeros(5, 3, 4))
    with pytest.raises(InputError, match="alpha_req: 2 positive eigenvalues"):
        alpha_req(normal(50, 5))


@pytest.mark.parametrize(("n", "d"), [(300, 40), (30, 40)])
def test_the_report_agrees_with_the_single_measures(n: int, d: int) -> None:
    z = (normal(n, d) * torch.linspace(0.5, 2, d, dtype=torch.float64) + 3).float()
    report = collapse_report(z)
    for metric in METRICS:
        assert report[metric.__name__] == pytest.approx(metric(z), rel=1e-8), metric.__name__
    assert report["alpha_req_range"] == list(alpha_req(z).fit_range)
    assert report["alpha_req_r2"] == pytest.approx(alpha_req(z).r2)
    assert report["feature_std"] == pytest.approx(float(z.double().std(0).mean()), rel=1e-12)
    assert report["unit_std_relative"] == pytest.approx(unit_std(z) * d**0.5)
    assert report["uniformity"] == uniformity(z)
    assert (report["dimension"], report["samples"], report["dead_dimensions"]) == (d, n, 0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    of_stream = collapse_report(streamed(z))
    assert report.keys() - of_stream.keys() == {"uniformity"}
    for name, value in of_stream.items():
        assert value == report[name] if name == "notes" else value == pytest.approx(report[name], rel=1e-8), name


def test_the_report_of_views() -> None:
    views = normal(30, 4, 6)
    report = collapse_report(views.flatten(0, 1), views)
    assert (report["lidar"], report["alignment"]) == (lidar(views), alignment(views))
    assert report == collapse_report(views.flatten(0, 1), ViewScatter.of(views))


@pytest.mark.parametrize(
    ("features", "notes"),
    [
        (normal(300, 40), []),
        (normal(20, 40), ["20 images span at most 19 of 40 dimensions once centered: compare ranks at .* only"]),
        (normal(50, 5), ["alpha_req is undefined: 2 positive eigenvalues in the range .*; 3 are needed"]),
        (torch.full((30, 8), 0.1), ["the features are the same for all images: .*", "alpha_req is undefined: 0 .*"]),
        (torch.zeros(30, 8), ["the features are the same for all images: .*", "alpha_req is undefined: 0 .*"]),
        (normal(1, 8), ["one image has no spread: .*", "alpha_req is undefined: 0 .*"]),
    ],
)
def test_what_is_undefined_is_absent_and_said(features: torch.Tensor, notes: list[str]) -> None:
    report = collapse_report(features)
    assert len(report["notes"]) == len(notes)
    for note, pattern in zip(report["notes"], notes, strict=True):
        assert re.fullmatch(pattern, note), note
    assert ("alpha_req" in report) == (not any("alpha_req" in note for note in notes))
    json.dumps(report, allow_nan=False)


def test_features_that_are_not_numbers_are_refused() -> None:
    bad = normal(10, 20)
    bad[3, 2] = torch.inf
    for features in (bad, streamed(bad)):
        with pytest.raises(InputError, match="rows hold NaN or infinite"):
            collapse_report(features)


def test_weight_report() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    nn.init.orthogonal_(encoder[3].weight)
    report = weight_report(encoder)
    assert list(report) == ["0.weight", "3.weight"]
    assert report["3.weight"]["orthogonality_error"] == pytest.approx(0, abs=1e-5)
    assert report["3.weight"]["stable_rank"] == pytest.approx(4, rel=1e-5)
    w = encoder[0].weight.detach().double().flatten(1).numpy()
    assert report["0.weight"]["orthogonality_error"] == pytest.approx(np.linalg.norm(w @ w.T - np.eye(8)), rel=1e-10)
    assert report["0.weight"]["stable_rank"] == pytest.approx(stable_rank(w), rel=1e-10)


def test_each_expert_is_a_matrix() -> None:
    class Experts(nn.Module):
        num_experts = 3

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(normal(3, 8, 4))

    encoder = nn.Sequential(Experts(), nn.Linear(4, 4))
    expected = np.mean([stable_rank(w) for w in encoder[0].up.detach()])
    assert weight_report(encoder)["0.up"]["stable_rank"] == pytest.approx(expected, rel=1e-12)


def test_grouped_convolutions_are_a_matrix_per_group() -> None:
    encoder = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 16, 1))
    expected = OrthogonalityRegularizer(encoder, OrthogonalityConfig(penalty="so", weight=1)).errors()
    report = weight_report(encoder)
    assert {name: row["orthogonality_error"] for name, row in report.items()} == pytest.approx(expected, rel=1e-5)
