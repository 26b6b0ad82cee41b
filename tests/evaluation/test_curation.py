"""Neighbors, near-duplicates and outliers against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation import curation
from hf_ssl_or.evaluation.curation import (
    Curation,
    curate,
    duplicate_groups,
    duplicate_threshold,
    group_members,
    nearest_neighbors,
    outlier_scores,
)
from hf_ssl_or.evaluation.protocols import knn


def noise(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def cosines(features: Tensor) -> np.ndarray:
    x = features.double().numpy()
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    return unit @ unit.T


def groups_by_search(similar: np.ndarray) -> np.ndarray:
    """Walks through the graph from each image; components of one image are -1."""
    group = np.full(len(similar), -2)
    number = 0
    for start in range(len(similar)):
        if group[start] != -2:
            continue
        members, waiting = {start}, [start]
        while waiting:
            new = set(np.flatnonzero(similar[waiting.pop()]).tolist()) - members
            members |= new
            waiting += new
        group[list(members)] = number if len(members) > 1 else -1
        number += len(members) > 1
    return group


@pytest.fixture(params=[2**23, 1])
def any_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk, or chunks of 64 rows."""
    for module in (curation, knn):
        monkeypatch.setattr(module, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("k", [1, 7, 299])
def test_neighbors_equal_a_sort_of_all_cosines(k: int) -> None:
    features = noise(300, 9)
    cosine, index = nearest_neighbors(features, k)
    expected = cosines(features)
    np.fill_diagonal(expected, -np.inf)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    assert index.dtype == torch.int64 and (index.numpy() == order).all()
    np.testing.assert_allclose(cosine, np.take_along_axis(expected, order, 1), atol=2e-6)
    np.testing.assert_allclose(outlier_scores(cosine), (1 - np.take_along_axis(expected, order, 1)).mean(1), atol=2e-6)


def test_an_image_is_never_its_own_neighbor_however_many_are_equal() -> None:
    features = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 2.0], [0.0, 0.0]])
    cosine, index = nearest_neighbors(features, 3)
    assert index[:6].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert (cosine[:6] == 1).all() and (cosine[6:] == 0).all()
    assert index[6:].tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.75, 0.9])
def test_groups_are_the_components_of_all_near_pairs(threshold: float) -> None:
    features = noise(400, 4, seed=1)
    similar = cosines(features)
    assert not (abs(similar - threshold) < 2e-6).any()  # no pair is so close to the threshold that rounding decides
    expected = groups_by_search(similar >= threshold)
    assert duplicate_groups(features, threshold).tolist() == expected.tolist()


@pytest.mark.usefixtures("any_chunks")
def test_a_long_chain_in_any_order_is_one_group() -> None:
    angle = torch.arange(300.0) * 0.02  # each is near the next alone
    features = torch.stack([angle.cos(), angle.sin()], 1)[torch.randperm(300, generator=torch.Generator())]
    assert duplicate_groups(features, 0.9997).tolist() == [0] * 300
    assert duplicate_groups(features, 0.99999).tolist() == [-1] * 300


def test_a_threshold_of_one_finds_equal_features_of_any_length_and_zeros_are_like_nothing() -> None:
    features = noise(50, 600)
    features = torch.cat([features, 3 * features[[7, 3, 7]], torch.zeros(2, 600)])
    group = duplicate_groups(features, 1.0)
    assert group[[3, 51]].tolist() == [0, 0] and group[[7, 50, 52]].tolist() == [1, 1, 1]
    assert int((group >= 0).sum()) == 5


def test_collapsed_features_are_one_group() -> None:
    assert duplicate_groups(torch.ones(5000, 8), 0.95).unique().tolist() == [0]


def test_members_begin_with_the_first_image_and_then_the_most_alike() -> None:
    angle = torch.tensor([2.0, 0.0, 0.3, 2.1, 0.1, 2.05, 0.2])
    features = torch.stack([angle.cos(), angle.sin()], 1)
    groups = group_members(features, duplicate_groups(features, float(np.cos(0.11))))
    assert [members.tolist() for members, _ in groups] == [[1, 4, 6, 2], [0, 5, 3]]
    np.testing.assert_allclose(groups[0][1], np.cos([0, 0.1, 0.2, 0.3]), atol=1e-6)
    assert group_members(features, torch.full((7,), -1)) == []


@pytest.mark.parametrize("common", [0.0, 30.0])
def test_the_measured_threshold_tells_copies_from_others_however_alike_all_are(common: float) -> None:
    features = noise(500, 32) + common
    copies = features[:40] + 0.05 * noise(40, 32, seed=1)
    group = duplicate_groups(all_ := torch.cat([features, copies]), duplicate_threshold(all_))
    assert group[:40].tolist() == group[500:].tolist() == list(range(40)) and (group[40:500] == -1).all()


def test_what_is_asked_for_is_found_and_nothing_else() -> None:
    features = noise(40, 5)
    findings = curate(features, Curation(neighbors=3, outliers=6))
    cosine, index = nearest_neighbors(features, 6)
    assert torch.equal(findings.neighbor_index, index[:, :3]) and findings.duplicate_group is None
    assert torch.equal(findings.outlier_score, outlier_scores(cosine)) and findings.threshold is None
    findings = curate(features, Curation(duplicates=0.8))
    assert findings.threshold == 0.8 and findings.neighbor_index is None and findings.outlier_score is None


@pytest.mark.parametrize("settings", [{"neighbors": -1}, {"outliers": -2}, {"duplicates": 0.0}, {"duplicates": 1.1}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Curation(**settings)


@pytest.mark.parametrize("settings", [{"neighbors": 5}, {"outliers": 10}])
def test_too_few_images(settings: dict) -> None:
    with pytest.raises(InputError, match=r"nearest of 5 images"):
        curate(noise(5, 2), Curation(**settings))
    with pytest.raises(InputError, match="nearest of 1 images"):
        curate(noise(1, 2), Curation(duplicates=0.9))


def test_neighbors_of_some_images_equal_a_sort_of_cosines() -> None:
    features = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    query = torch.tensor([3, 59, 0])
    cosine, index = nearest_neighbors(features, 5, query)
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    for row, q in enumerate(query.tolist()):
        others = [i for i in range(60) if i != q]
        expected = sorted(others, key=lambda i: -float(unit[q] @ unit[i]))[:5]
        assert index[row].tolist() == expected
        np.testing.assert_allclose(cosine[row], unit[expected] @ unit[q], atol=1e-6)
