"""The solver against scikit-learn's and against the gradient of the objective, on features of wide spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as Reference

from hf_ssl_or.evaluation.protocols.logistic import LogisticRegression


def features(n: int, width: int, classes: int = 5, decay: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy classes whose eigenvalues fall as i^-2 decay, in a rotated basis."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, width, generator=generator) + torch.randn(classes, width, generator=generator)[labels]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (x * torch.arange(1, width + 1).float() ** -decay) @ rotation, labels


def gradient(x: torch.Tensor, labels: torch.Tensor, w: torch.Tensor, b: torch.Tensor, l2: float):
    """Of the objective, by autograd, in float64."""
    x, w, b = x.double(), w.double().requires_grad_(), b.double().requires_grad_()
    value = torch.nn.functional.cross_entropy(x @ w.T + b, labels) + l2 / 2 * w.square().sum()
    return torch.autograd.grad(value, (w, b))


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_it_ends_at_a_stationary_point(l2: float) -> None:
    x, labels = features(400, 30)
    w, b = LogisticRegression(x, labels, 5).solve(l2)
    assert max(float(g.abs().max()) for g in gradient(x, labels, w, b, l2)) < 1.1e-4


def test_probabilities_are_scikit_learns() -> None:
    x, labels = features(600, 40)
    w, b = LogisticRegression(x.double(), labels, 5, tolerance=1e-8).solve(1e-3)
    reference = Reference(C=1 / (600 * 1e-3), tol=1e-9, max_iter=10_000).fit(x.double().numpy(), labels)
    np.testing.assert_allclose((x.double() @ w.T + b).softmax(1), reference.predict_proba(x.double()), atol=1e-5)


def test_a_wide_spectrum_costs_few_evaluations(monkeypatch) -> None:
    """Where the plain method needs hundreds, because some directions are a thousand times flatter than others."""
    x, labels = features(2000, 100, decay=1.5)
    calls = []
    objective = LogisticRegression._objective
    monkeypatch.setattr(LogisticRegression, "_objective", lambda *args: calls.append(1) or objective(*args))
    LogisticRegression(x, labels, 5).solve(1e-4)
    ours = len(calls)
    reference = Reference(C=1 / (2000 * 1e-4), max_iter=10_000).fit(x, labels)
    assert ours < 60 and 3 * ours < reference.n_iter_[0]


def test_more_columns_than_rows_give_the_same_minimum() -> None:
    x, labels = features(40, 60)
    w, b = LogisticRegression(x, labels, 5, bias=False, tolerance=1e-7).solve(1e-2)
    wide = torch.cat([x, x.new_zeros(40, 3)], dim=1)
    assert (
        LogisticRegression(wide, labels, 5, bias=False, tolerance=1e-7).solve(1e-2)[0][:, :60] - w
    ).abs().max() < 1e-4
    assert torch.equal(b, torch.zeros(5))
    assert float(gradient(x, labels, w, b, 1e-2)[0].abs().max()) < 1e-6


def test_the_next_penalty_starts_from_the_last_minimum() -> None:
    x, labels = features(300, 20)
    model = LogisticRegression(x, labels, 5)
    first = model.solve(1e-2)
    model.iterations = 0
    assert all(torch.equal(a, b) for a, b in zip(model.solve(1e-3), first, strict=True))
