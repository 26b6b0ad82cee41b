"""Standard deviations, alignment and uniformity against plain loops and values known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator
from hf_ssl_or.evaluation.collapse.uniformity import alignment, uniformity, unit_std


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: torch.Tensor) -> np.ndarray:
    return x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True)


def test_standard_deviations_follow_their_formulas() -> None:
    z = normal(60, 7) * torch.linspace(0.1, 2, 7, dtype=torch.float64) + 1
    assert unit_std(z) == pytest.approx(unit(z).std(0, ddof=1).mean(), rel=1e-12)
    assert unit_std(3 * z) == pytest.approx(unit_std(z), rel=1e-12)
    assert unit_std(CovarianceAccumulator.of(z)) == unit_std(z)


@pytest.mark.parametrize("rank", [4, 64])
def test_even_directions_have_the_expected_deviation(rank: int) -> None:
    z = torch.zeros(20_000, 64, dtype=torch.float64)
    z[:, :rank] = normal(20_000, rank)
    assert unit_std(z) == pytest.approx(math.sqrt(rank) / 64, rel=0.01)
    assert unit_std(torch.ones(50, 64)) == pytest.approx(0, abs=1e-12)


def test_alignment_is_the_mean_over_pairs_of_views() -> None:
    views = normal(12, 4, 5) + 1
    u = unit(views)
    pairs = [((u[:, i] - u[:, j]) ** 2).sum(1) for i in range(4) for j in range(i)]
    assert alignment(views) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert alignment(views[:, :1].expand(-1, 3, -1)) == pytest.approx(0, abs=1e-15)
    opposite = torch.stack([views[:, 0], -views[:, 0]], 1)
    assert alignment(opposite) == pytest.approx(4, rel=1e-12)


def test_uniformity_is_the_mean_over_pairs_of_images() -> None:
    z = normal(40, 6) + 0.5
    u = unit(z)
    kernel = [math.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(40) for j in range(i)]
    assert uniformity(z) == pytest.approx(math.log(np.mean(kernel)), rel=1e-10)
    assert uniformity(z, max_rows=10) == pytest.approx(uniformity(z[::4]), rel=1e-12)
    assert uniformity(torch.ones(9, 6)) == pytest.approx(0, abs=1e-12)


def test_uniformity_of_the_sphere() -> None:
    expected = math.log(math.exp(-4) * math.sinh(4) / 4)  # the mean of exp(4 (cos - 1)) in 3 dimensions
    assert uniformity(normal(3000, 3)) == pytest.approx(expected, abs=0.01)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="uniformity: needs 2 images"):
        uniformity(torch.ones(1, 6))
    with pytest.raises(InputError, match="1 of 2 rows hold NaN"):
        uniformity(torch.tensor([[1.0, 2], [torch.nan, 1]]))
    with pytest.raises(InputError, match="views: some hold NaN"):
        alignment(torch.full((3, 2, 4), torch.nan))
