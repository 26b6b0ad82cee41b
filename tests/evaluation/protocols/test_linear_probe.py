"""Probes against scikit-learn and against what can be known: separable data, chance, the loss's stationary point."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.protocols.linear_probe import LINEAR_PROTOCOLS, LogisticProtocol, linear_probe

PROTOCOLS = {protocol.name: protocol for protocol in LINEAR_PROTOCOLS}


def short(name: str):
    """The protocol with fewer epochs, so that a test takes a fraction of a second."""
    protocol = PROTOCOLS[name]
    epochs = {"linear-sgd": 15, "linear-averaged-views": 60}
    return dataclasses.replace(protocol, epochs=epochs[name], batch_size=64) if name in epochs else protocol


def blobs(n: int, noise: float, classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    centers = torch.randn(classes, 20, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + noise * torch.randn(n, 20, generator=generator), labels


@pytest.mark.parametrize("name", PROTOCOLS)
def test_separable_data_are_learned(name: str) -> None:
    result = linear_probe(*blobs(600, 0.1), *blobs(200, 0.1, seed=1), protocol=short(name))
    assert list(result) == ["top1", "top5", "train_top1", "train_top5"]
    assert result["top1"] > 99 and result["train_top1"] > 99 and result["top5"] == 100


@pytest.mark.parametrize("name", PROTOCOLS)
def test_random_labels_are_chance(name: str) -> None:
    train, test = blobs(600, 1.0), blobs(600, 1.0, seed=1)
    shuffled = test[1][torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(*train, test[0], shuffled, protocol=short(name))["top1"] == pytest.approx(100 / 6, abs=5)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_probes_come_near_logistic_regression(name: str) -> None:
    train, test = blobs(1500, 1.6), blobs(1000, 1.6, seed=1)
    expected = 100 * LogisticRegression(max_iter=1000).fit(*train).score(*test)
    assert 50 < expected < 95
    assert linear_probe(*train, *test, protocol=short(name))["top1"] == pytest.approx(expected, abs=2.5)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_lbfgs_finds_the_minimum_that_scikit_learn_finds(l2: float) -> None:
    x, y = blobs(500, 1.6)
    x = x * torch.linspace(0.1, 10, 20) + 3
    protocol = LogisticProtocol(name="one penalty", penalties=(l2,))
    classifier = protocol.fit(x, y, num_classes=6, seed=0)
    scaler = StandardScaler().fit(x)
    scaler.scale_ = x.numpy().std(0, ddof=1)
    reference = LogisticRegression(C=1 / (500 * l2), tol=1e-8, max_iter=5000).fit(scaler.transform(x), y)
    with torch.no_grad():
        probabilities = classifier(x).softmax(1)
    np.testing.assert_allclose(probabilities, reference.predict_proba(scaler.transform(x)), atol=3e-3)


def test_lbfgs_chooses_the_penalty_on_held_out_images() -> None:
    (x, y), (test, labels) = blobs(600, 0.3), blobs(200, 0.3, seed=1)
    accuracy = {}
    for penalties in ((1e4,), (1e4, 1e-3), (1e-3, 1e4)):
        protocol = LogisticProtocol(name="grid", penalties=penalties)
        accuracy[penalties] = linear_probe(x, (y == 0).long(), test, (labels == 0).long(), protocol=protocol)["top1"]
    assert accuracy[1e4,] < 90  # the larger class for every image
    assert accuracy[1e4, 1e-3] > 98 and accuracy[1e-3, 1e4] > 98


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_seed_decides_everything(name: str) -> None:
    data = (*blobs(300, 3.0), *blobs(500, 3.0, seed=1))
    torch.manual_seed(1)
    first = linear_probe(*data, protocol=short(name), seed=3)
    torch.manual_seed(2)
    assert linear_probe(*data, protocol=short(name), seed=3) == first
    if name != "linear-lbfgs":
        assert linear_probe(*data, protocol=short(name), seed=4) != first


def test_the_learning_rate_falls_where_the_paper_says() -> None:
    rates = []
    protocol = PROTOCOLS["linear-sgd"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=protocol.learning_rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, protocol.milestones, gamma=0.1)
    for _ in range(protocol.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 60 + [0.01] * 40)


def test_it_trains_under_no_grad_and_on_constant_dimensions() -> None:
    (x, y), (test, labels) = blobs(300, 0.1), blobs(100, 0.1, seed=1)
    x[:, 3], test[:, 3] = 5, 5
    with torch.no_grad():
        for name in PROTOCOLS:
            assert linear_probe(x, y, test, labels, protocol=short(name))["top1"] > 95


def test_bad_input_is_refused() -> None:
    (x, y), test = blobs(100, 0.1), blobs(50, 0.1, seed=1)
    with pytest.raises(InputError, match="linear-sgd: labels are needed: set data.label_column"):
        linear_probe(x, None, *test)
    with pytest.raises(InputError, match="did you mean 'linear-sgd'"):
        linear_probe(x, y, *test, protocol="linear-sdg")
    with pytest.raises(InputError, match="one class only"):
        linear_probe(x, torch.zeros_like(y), *test)
    with pytest.raises(InputError, match="diverged"):
        linear_probe(1e30 * x, y, *test, protocol=short("linear-sgd"))
