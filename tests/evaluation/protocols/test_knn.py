"""kNN against a loop in numpy and against scikit-learn; ties, settings and messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.protocols import knn
from hf_ssl_or.evaluation.protocols.knn import knn_accuracy


def blobs(n: int, classes: int = 7, noise: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + noise * torch.randn(n, 16, generator=generator), labels


def brute_force(train, train_labels, test, test_labels, k: int, temperature: float) -> tuple[float, float]:
    """The definition, one query at a time."""
    train, test = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (train, test))
    hits = np.zeros(2)
    for query, label in zip(test, test_labels.tolist(), strict=True):
        cosine = train @ query
        near = np.argsort(-cosine, kind="stable")[:k]
        votes: dict[int, float] = {}
        for i in near:
            c = int(train_labels[i])
            votes[c] = votes.get(c, 0.0) + np.exp(cosine[i].astype(np.float64) / temperature)
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        hits += [label in ranking[:1], label in ranking[:5]]
    return tuple(100 * hits / len(test))


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_equals_brute_force(temperature: float, monkeypatch) -> None:
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", 1)  # chunks of 64 queries
    data = (*blobs(300), *blobs(150, seed=1))
    result = knn_accuracy(*data, k=(1, 20, 300), temperature=temperature)
    assert list(result) == [f"top{top}_k{k}" for k in (1, 20, 300) for top in (1, 5)]
    for k in (1, 20, 300):
        found = (result[f"top1_k{k}"], result[f"top5_k{k}"])
        assert found == pytest.approx(brute_force(*data, k, temperature), rel=1e-12), k
    assert 30 < result["top1_k20"] < 95


def test_equals_scikit_learn() -> None:
    train, train_labels, test, test_labels = (*blobs(400), *blobs(200, seed=1))
    reference = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
    expected = 100 * reference.fit(train, train_labels).score(test, test_labels)
    assert knn_accuracy(train, train_labels, test, test_labels, k=20)["top1_k20"] == pytest.approx(expected)


def test_equally_near_images_are_taken_in_the_order_of_the_bank() -> None:
    bank = torch.ones(1000, 4)
    labels = torch.arange(1000) % 3
    labels[:2] = 2
    result = knn_accuracy(bank, labels, torch.ones(3, 4), torch.tensor([0, 1, 2]), k=(2, 4))
    assert result["top1_k2"] == pytest.approx(100 / 3)  # the first two images vote for class 2
    assert result["top5_k2"] == pytest.approx(100 / 3)  # and the others have no vote
    assert result["top5_k4"] == pytest.approx(200 / 3)  # 2, 2, 2, 0


def test_of_equal_votes_the_lower_class_wins() -> None:
    bank, labels = torch.ones(2, 4), torch.tensor([1, 0])
    assert knn_accuracy(bank, labels, torch.ones(1, 4), torch.tensor([0]), k=2)["top1_k2"] == 100
    assert knn_accuracy(bank, labels, torch.ones(1, 4), torch.tensor([1]), k=2)["top1_k2"] == 0


def test_scale_and_precision_of_features_do_not_matter() -> None:
    train, train_labels, test, test_labels = (*blobs(300), *blobs(150, seed=1))
    result = knn_accuracy(train, train_labels, test, test_labels, k=20)
    assert knn_accuracy(100 * train, train_labels, test / 7, test_labels, k=20) == result
    assert knn_accuracy(train, train_labels, test, test_labels, k=20, temperature=1e-4)["top1_k20"] > 0  # no overflow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 301}, "k=301 neighbors of a bank of 300 images"),
        ({"k": (20, 0)}, "k=0"),
        ({"k": ()}, "names no number"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"num_classes": 3}, "num_classes=3, but there is a label 6"),
        ({"train_labels": None}, "kNN: labels are needed: set data.label_column"),
        ({"train_labels": torch.zeros(300, dtype=torch.int64)}, "one class only"),
        ({"test_labels": torch.full((150,), -1)}, "row 0 of the test set has the label -1"),
        ({"test_labels": torch.zeros(3, dtype=torch.int64)}, "150 test features have 3 labels"),
        ({"test_features": torch.zeros(150, 5)}, "of one width"),
        ({"test_features": torch.full((150, 16), torch.nan)}, "test features hold NaN"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict, message: str) -> None:
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arguments = dict(zip(names, (*blobs(300), *blobs(150, seed=1)), strict=True)) | change
    with pytest.raises(InputError, match=message) as caught:
        knn_accuracy(**arguments)
    assert "\n" not in str(caught.value)


def test_a_class_without_training_images_is_warned_of() -> None:
    train, labels = blobs(300, classes=3)
    with pytest.warns(UserWarning, match=r"no train image has the test labels \[5\]"):
        result = knn_accuracy(train, labels, train[:2], torch.tensor([int(labels[0]), 5]), k=1)
    assert result["top1_k1"] == 50
