"""Streaming moments against numpy, spectra against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator, eigenvalues, normalized_eigenvalues


def features(n: int = 500, d: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, d).double() + 1000


def accumulate(batches: tuple[torch.Tensor, ...]) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(batches[0].shape[1])
    for batch in batches:
        accumulator.update(batch)
    return accumulator


@pytest.mark.parametrize("sizes", [500, [1, 2, 3, 494], 37])
def test_streaming_equals_numpy(sizes: int | list[int]) -> None:
    z = features()
    stream = accumulate(z.split(sizes))
    assert stream.count == 500
    np.testing.assert_allclose(stream.mean_D, z.numpy().mean(0), rtol=1e-13)
    covariance = np.cov(z.numpy().T)
    np.testing.assert_allclose(stream.covariance_DD, covariance, rtol=1e-8, atol=1e-12)  # mean 1000 does not cancel
    np.testing.assert_allclose(stream.second_moment_DD, z.numpy().T @ z.numpy() / 500, rtol=1e-12)
    np.testing.assert_allclose(stream.eigenvalues(), np.linalg.eigvalsh(covariance)[::-1], rtol=1e-8)
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(stream.unit_mean_D, unit.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stream.unit_scatter_D, 499 * unit.var(0, ddof=1), rtol=1e-8)


def test_rounding_is_no_direction() -> None:
    z = torch.randn(3000, 5, dtype=torch.float64) @ torch.randn(5, 100, dtype=torch.float64)
    assert int((CovarianceAccumulator.of(z).eigenvalues() > 0).sum()) == 5
    assert int((CovarianceAccumulator.of(z + 50).eigenvalues() > 0).sum()) == 5
    assert int((CovarianceAccumulator.of(z + 50).eigenvalues(centered=False) > 0).sum()) == 6
    assert int((CovarianceAccumulator.of(torch.randn(20, 100)).eigenvalues() > 0).sum()) == 19


@pytest.mark.parametrize("centered", [True, False])
def test_few_rows_have_the_eigenvalues_of_the_whole_covariance(centered: bool) -> None:
    z = features(20, 50)
    short, whole = eigenvalues(z, centered=centered), CovarianceAccumulator.of(z).eigenvalues(centered=centered)
    torch.testing.assert_close(short, whole, rtol=1e-8, atol=1e-8 * float(whole[0]))
    assert int((short > 0).sum()) == int((whole > 0).sum()) == (19 if centered else 20)
    assert int((eigenvalues(torch.full((5, 9), 0.1)) > 0).sum()) == 0


def test_bad_streams_are_refused() -> None:
    accumulator = CovarianceAccumulator(4)
    with pytest.raises(InputError, match="no images"):
        accumulator.eigenvalues()
    with pytest.raises(InputError, match=r"\(images, 4\)"):
        accumulator.update(torch.zeros(3, 5))
    accumulator.update(torch.full((3, 4), torch.inf))
    with pytest.raises(InputError, match="^features: some rows hold NaN or infinite"):
        accumulator.eigenvalues()
    accumulator.name = "hidden/stage2"
    with pytest.raises(InputError, match="^hidden/stage2: some rows"):
        normalized_eigenvalues(accumulator, "ignored")


def test_spectra_are_normalized() -> None:
    z = features()
    eig = np.linalg.eigvalsh(np.cov(z.numpy().T))[::-1]
    np.testing.assert_allclose(normalized_eigenvalues(z), eig / eig[0], rtol=1e-8)
    np.testing.assert_array_equal(normalized_eigenvalues(CovarianceAccumulator.of(z)), normalized_eigenvalues(z))
    assert not normalized_eigenvalues(torch.ones(10, 3)).any()
    assert (normalized_eigenvalues(features(20, 50)) == 0).sum() == 31, "19 of 50 are positive"
