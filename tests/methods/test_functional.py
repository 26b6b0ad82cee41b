from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hf_ssl_or.methods.functional import (
    batch_standardize,
    full_precision,
    global_mean,
    info_nce,
    mean_of_others,
    mean_of_pairs,
    negative_cosine,
    product_split,
    similarities,
    variance_hinge,
)


@pytest.fixture
def z_VND():
    torch.manual_seed(0)
    return torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("views", [2, 3])
def test_mean_of_others(z_VND, views):
    for view in range(views):
        others = torch.stack([z_VND[u] for u in range(views) if u != view])
        close(mean_of_others(z_VND[:views])[view], others.mean(0))


def test_mean_of_pairs():
    x_VUN = torch.arange(27.0).view(3, 3, 3)
    pairs = [x_VUN[v, u] for v in range(3) for u in range(3) if u != v]
    close(mean_of_pairs(x_VUN), torch.stack(pairs).mean(), 1e-6)


def test_standardise_is_batch_norm_of_each_view(z_VND):
    for view, x_ND in zip(z_VND, batch_standardize(z_VND), strict=True):
        close(x_ND, F.batch_norm(view, None, None, training=True))


@pytest.mark.parametrize(("images", "dim"), [(4, 9), (9, 4), (6, 6), (3, 257)])
@pytest.mark.parametrize("same", [True, False])
def test_product_split_equals_the_explicit_matrix_with_gradient(images, dim, same):
    torch.manual_seed(1)
    a = torch.randn(2, images, dim, dtype=torch.float64, requires_grad=True)
    b = a if same else torch.randn(2, images, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(dim, dtype=torch.float64)

    def value(diagonal, off_diagonal):
        return (diagonal * weight).sum() + off_diagonal.square().sum()

    product = a.mT @ b
    eye = torch.eye(dim, dtype=torch.float64)
    expected = product.diagonal(dim1=1, dim2=2), (product * (1 - eye)).square().sum((1, 2))
    split = product_split(a, b)
    close(split, expected, 1e-10)
    inputs = [a] if same else [a, b]
    close(torch.autograd.grad(value(*split), inputs), torch.autograd.grad(value(*expected), inputs), 1e-10)


@pytest.mark.parametrize(("images", "dim"), [(3, 5), (5, 3)])
def test_product_split_has_the_gradient_of_differences(images, dim):
    torch.manual_seed(2)
    a, b = torch.randn(2, 2, images, dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(product_split, (a, b))
    assert torch.autograd.gradcheck(lambda a: product_split(a, a), (a,))


@pytest.mark.parametrize(("images", "dim", "largest"), [(4, 64, 4), (64, 4, 4)])
def test_product_split_never_makes_the_larger_matrix(images, dim, largest):
    sizes = []
    a = torch.randn(images, dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        product_split(a, a)
    assert max(sizes) <= max(images * dim, largest**2)


def test_variance_hinge():
    variance = torch.tensor([0.25, 4.0, 0.81])
    assert variance_hinge(variance, eps=0.0).item() == pytest.approx((0.5 + 0 + 0.1) / 3)
    assert variance_hinge(torch.zeros(2)).item() == pytest.approx(0.99)


def test_negative_cosine_is_the_mean_over_ordered_pairs(z_VND):
    target = torch.randn(3, 6, 5, dtype=torch.float64)
    pairs = [F.cosine_similarity(z_VND[v], target[u], dim=-1) for v in range(3) for u in range(3) if u != v]
    loss, expected = negative_cosine(z_VND, target), -torch.stack(pairs).mean()
    close(loss, expected)
    close(torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND))


@pytest.mark.parametrize("views", [2, 3])
def test_similarities_equal_their_formula_and_have_the_gradient_of_differences(views):
    torch.manual_seed(3)
    z_VND = torch.randn(views, 4, 5, dtype=torch.float64, requires_grad=True)
    positives_VUN, negatives_VN = similarities(z_VND, 0.5)
    s = F.cosine_similarity(z_VND[:, :, None, None], z_VND[None, None], dim=-1) / 0.5  # (V, N, V, N)
    for n in range(4):
        close(positives_VUN[:, :, n], s[:, n, :, n])
        others = [m for m in range(4) if m != n]
        close(negatives_VN[:, n], s[:, n, :, others].exp().sum((1, 2)).log())
    assert torch.autograd.gradcheck(similarities, (z_VND, 0.5))


def test_gradients_by_hand_refuse_to_be_differentiated_again(z_VND):
    for value in (similarities(z_VND, 0.5)[1], product_split(z_VND, z_VND)[1], product_split(z_VND.mT, z_VND.mT)[1]):
        (gradient,) = torch.autograd.grad(value.square().sum(), z_VND, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def info_nce_by_loops(z_VND, temperature):
    views, images, _ = z_VND.shape
    losses, cosines = [], []
    for v in range(views):
        for n in range(images):
            s = {
                (u, m): F.cosine_similarity(z_VND[v, n], z_VND[u, m], dim=0)
                for u in range(views)
                for m in range(images)
            }
            negatives = sum((s[u, m] / temperature).exp() for u in range(views) for m in range(images) if m != n)
            for u in range(views):
                if u != v:
                    positive = (s[u, n] / temperature).exp()
                    losses.append(-(positive / (positive + negatives)).log())
                    cosines.append(s[u, n])
    return torch.stack(losses).mean(), torch.stack(cosines).mean()


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_info_nce_equals_its_formula_with_gradient(views, temperature):
    torch.manual_seed(views)
    z_VND = torch.randn(views, 4, 5, dtype=torch.float64, requires_grad=True)
    loss, cosine = info_nce(z_VND, temperature)
    expected_loss, expected_cosine = info_nce_by_loops(z_VND, temperature)
    close((loss, cosine), (expected_loss, expected_cosine.detach()))
    close(torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected_loss, z_VND), 1e-10)


def test_info_nce_is_exact_at_small_temperatures():
    torch.manual_seed(4)
    z_VND = torch.randn(2, 8, 5, requires_grad=True)
    loss = info_nce(z_VND, 0.005)[0]
    expected = info_nce(z_VND.double(), 0.005)[0]
    close(loss.double(), expected, 1e-5)
    close(torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND), 1e-3)


def test_info_nce_of_perfect_and_of_collapsed_embeddings():
    perfect = torch.eye(4).expand(3, 4, 4)
    assert info_nce(perfect, 0.01)[0].item() == pytest.approx(0, abs=1e-6)
    collapsed = torch.ones(3, 4, 5)
    assert info_nce(collapsed, 0.01)[0].item() == pytest.approx(math.log(1 + 3 * 3), rel=1e-5)


def test_global_mean_is_the_identity_with_one_process():
    x = torch.tensor(3.0, requires_grad=True)
    global_mean(x).backward()
    assert x.grad == 1


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_full_precision_runs_outside_autocast(given, computed):
    @full_precision
    def loss(a, scale, *, b):
        return a @ a * scale + b

    a = torch.ones(3, 3, dtype=given, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(a, 2.0, b=1.0)
    assert result.dtype == computed
    result.sum().backward()
    assert a.grad.dtype == given
