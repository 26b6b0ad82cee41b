"""The four-node graph against its definition, and its samples against the closed form."""

from __future__ import annotations

import numpy as np
import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.augmentation_graph import EIGENVECTORS, AugmentationGraph, sample_spectra

GRAPH = AugmentationGraph(same=0.6, same_class=0.2, same_pixels=0.15, neither=0.05)


def test_closed_form() -> None:
    images = [(y, g) for y in (0, 1) for g in (0, 1)]  # class and pixels of each image
    likeness = {(True, True): 0.6, (True, False): 0.2, (False, True): 0.15, (False, False): 0.05}
    a = np.array([[likeness[(y == v, g == h)] for v, h in images] for y, g in images])
    w = sum(np.outer(row, row) for row in a) / 4  # the expectation over images
    d = w.sum(1)
    np.testing.assert_allclose(GRAPH.weights, w / np.sqrt(np.outer(d, d)), rtol=1e-12)
    for name, value in GRAPH.eigenvalues().items():
        np.testing.assert_allclose(GRAPH.weights @ EIGENVECTORS[name], value * EIGENVECTORS[name], atol=1e-12)
    assert list(GRAPH.eigenvalues()) == ["constant", "class", "pixels", "both"]


def test_samples_converge_to_the_closed_form() -> None:
    whole = np.array(sorted(GRAPH.eigenvalues().values(), reverse=True))
    errors = [np.abs(GRAPH.sampled_eigenvalues(m, repeats=300) - whole).mean() for m in (4, 64, 1024, 16384)]
    assert all(large > 3 * small for large, small in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.005


@pytest.mark.parametrize("m", [1, 2, 5])
def test_the_mean_of_few_augmentations_is_in_closed_form(m: int) -> None:
    graphs, repeats = GRAPH.sample(m, repeats=40_000), 40_000
    for name, value in GRAPH.eigenvalues(m).items():
        along = graphs @ EIGENVECTORS[name] @ EIGENVECTORS[name]
        assert along.mean() == pytest.approx(value, abs=4 * along.std() / repeats**0.5 + 1e-12), name
    gap = GRAPH.eigenvalues(m)["class"] - GRAPH.eigenvalues(m)["pixels"]
    assert gap == pytest.approx((1 - 1 / m) * (0.36 - 0.25)), "class and pixels come together"


def test_spectra_by_number_of_augmentations() -> None:
    few, many = sample_spectra(GRAPH, [4096, 2, 2], repeats=300)
    full = np.array(sorted(GRAPH.eigenvalues().values(), reverse=True))
    assert (few.num_augmentations, many.num_augmentations) == (2, 4096)
    np.testing.assert_allclose(many.mean, full, atol=0.01)
    np.testing.assert_allclose(many.mean_graph, full, atol=1e-3)
    assert (few.std > 5 * many.std).all() and few.mean.sum() == pytest.approx(few.mean_graph.sum(), abs=0.15)
    again = sample_spectra(GRAPH, [2], repeats=300)[0]
    np.testing.assert_array_equal(few.mean, again.mean)
    assert (sample_spectra(GRAPH, [2], repeats=300, seed=1)[0].mean != again.mean).any()


def test_bad_graphs_are_refused() -> None:
    with pytest.raises(InputError, match="add up to 1 are wanted, not same 0.6, same_class 0.2"):
        AugmentationGraph(same=0.6, same_class=0.2, same_pixels=0.2, neither=0.2)
    with pytest.raises(InputError, match="neither nan"):
        AugmentationGraph(same=0.6, same_class=0.2, same_pixels=0.2, neither=float("nan"))
    with pytest.raises(InputError, match="augmentations: at least 1, not 0"):
        GRAPH.sample(0)
    with pytest.raises(InputError, match="repeats: 2 or more"):
        sample_spectra(GRAPH, [2], repeats=1)
