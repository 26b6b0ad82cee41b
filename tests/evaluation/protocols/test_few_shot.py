"""Few-shot probes against scikit-learn on the same images; draws are balanced, nested and keyed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.evaluator import evaluate_features
from hf_ssl_or.evaluation.protocols import LabeledFeatures, get_protocol
from hf_ssl_or.evaluation.protocols.few_shot import FewShotProtocol, sample_order, unit_rows
from hf_ssl_or.randomness import hashed_seed

PROTOCOL = FewShotProtocol(name="few-shot", shots=(1, 5), draws=3)


def blobs(n: int, noise: float = 1.5, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    centers = torch.randn(classes, 24, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + noise * torch.randn(n, 24, generator=generator), labels


def test_a_draw_is_scikit_learns_classifier_of_these_images() -> None:
    (x, y), (test, labels) = blobs(200), blobs(300, seed=1)
    order, place = sample_order(y, seed=7)
    rows = order[place < 5]
    scaled = [(z - z.mean(1, keepdims=True)) / np.linalg.norm(z - z.mean(1, keepdims=True), axis=1, keepdims=True)
              for z in (x[rows].double().numpy(), test.double().numpy())]  # fmt: skip
    reference = LogisticRegression(C=1 / PROTOCOL.l2, fit_intercept=False, tol=1e-10, max_iter=10_000)
    expected = 100 * reference.fit(scaled[0], y[rows]).score(scaled[1], labels)
    result = PROTOCOL.run(LabeledFeatures(x, y), LabeledFeatures(test, labels), seed=7, device="cpu")
    assert result["top1_n5"] == pytest.approx(expected, abs=0.4) and 40 < expected < 99


def test_each_class_gives_as_many_and_more_shots_hold_fewer() -> None:
    labels = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2, 1, 1, 1])
    order, place = sample_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(11))
    for n in (1, 2, 3):
        assert labels[order[place < n]].bincount().tolist() == [n] * 3
    assert set(order[place < 1].tolist()) < set(order[place < 2].tolist())
    assert not torch.equal(sample_order(labels, seed=1)[0], order)


def test_all_draws_of_all_seeds_make_the_mean_and_the_spread() -> None:
    train, test = LabeledFeatures(*blobs(200)), LabeledFeatures(*blobs(100, seed=1))
    data = (train.features_NF, train.labels_N, test.features_NF, test.labels_N)
    entry = evaluate_features(PROTOCOL, *data, seeds=[0, 3])
    values = entry["metrics"]["top1_n5"]["values"]
    keys = [hashed_seed("few-shot", seed, draw) for seed in (0, 3) for draw in range(3)]
    assert values == [PROTOCOL.run(train, test, seed=key, device="cpu")["top1_n5"] for key in keys]
    assert len(set(values)) > 1 and entry["metrics"]["top1_n5"]["std"] == pytest.approx(float(np.std(values, ddof=1)))
    assert entry["seeds"] == [0, 3] and entry["headline"] == "top1_n5"


def test_more_images_of_separable_classes_are_better_and_random_labels_are_chance() -> None:
    (x, y), (test, labels) = blobs(400, 1.0), blobs(400, 1.0, seed=1)
    metrics = evaluate_features(get_protocol("few-shot"), x, y, test, labels)["metrics"]
    assert metrics["top1_n1"]["mean"] < metrics["top1_n5"]["mean"] < metrics["top1_n10"]["mean"] > 95
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    assert evaluate_features(PROTOCOL, x, y, test, shuffled)["metrics"]["top1_n5"]["mean"] == pytest.approx(25, abs=6)


def test_scale_and_offset_of_an_image_do_not_matter() -> None:
    x = torch.randn(5, 7)
    torch.testing.assert_close(unit_rows(3 * x + 2), unit_rows(x))
    torch.testing.assert_close(unit_rows(x).norm(dim=1), torch.ones(5))


def test_small_classes_and_bad_input() -> None:
    x, y = blobs(60, classes=3)
    y[:] = 0
    y[:20], y[20:22] = 1, 2
    with pytest.warns(UserWarning, match="a class has 2 train images only"):
        evaluate_features(PROTOCOL, x, y, x, y)
    with pytest.raises(InputError, match="few-shot: labels are needed"):
        evaluate_features(PROTOCOL, x, None, x, y)
    with pytest.raises(InputError, match="one class only"):
        evaluate_features(PROTOCOL, x, torch.zeros_like(y), x, y)
    assert dataclasses.replace(PROTOCOL, draws=4).hash != PROTOCOL.hash
