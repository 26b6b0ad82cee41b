from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.wmse import WMSE, WMSEConfig, sub_batch_size, whiten, wmse_loss
from hf_ssl_or.structures import MultiViewBatch


def plain_whiten(x_MD, eps=0.0):
    """As the paper's code: with the inverse of the Cholesky factor of the shrunk covariance."""
    covariance = (1 - eps) * torch.cov(x_MD.T) + eps * torch.eye(x_MD.shape[1], dtype=x_MD.dtype)
    return (x_MD - x_MD.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T


def plain_loss(z_VND, order_PN, size, eps):
    losses = []
    for order_N in order_PN:
        whitened = torch.empty_like(z_VND)
        for part in order_N.split(size):
            for v in range(len(z_VND)):
                whitened[v, part] = plain_whiten(z_VND[v, part], eps)
        unit = F.normalize(whitened, dim=-1)
        pairs = [(v, u) for v in range(len(z_VND)) for u in range(v)]
        losses += [(unit[v] - unit[u]).square().sum(-1).mean() for v, u in pairs]
    return torch.stack(losses).mean()


@pytest.fixture
def make_method(tiny_encoder):
    def make(batch_size=12, **settings):
        method = WMSE(tiny_encoder(), projector_hidden=16, **{"projector_dim": 3} | settings)
        method.prepare(num_views=2, batch_size=batch_size)
        return method

    return make


def make_batch(seed=0, step=0):
    return MultiViewBatch(views_VBCHW=torch.empty(2, 12, 3, 8, 8), index_B=torch.arange(12), seed=seed, step=step)


@pytest.mark.parametrize(("views", "iterations", "eps"), [(2, 1, 0.0), (2, 3, 0.1), (3, 1, 0.0), (4, 2, 0.05)])
def test_the_loss_and_its_gradient_are_the_published_ones(views, iterations, eps):
    torch.manual_seed(views)
    z_VND = torch.randn(views, 12, 3, dtype=torch.float64, requires_grad=True)
    order_PN = torch.stack([torch.randperm(12) for _ in range(iterations)])
    loss, terms = wmse_loss(z_VND, order_PN, 6, eps)
    expected = plain_loss(z_VND, order_PN, 6, eps)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["cosine"], 1 - expected / 2, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)


def test_whitened_rows_have_the_identity_as_covariance():
    torch.manual_seed(0)
    x_SMD = torch.randn(2, 9, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 5
    for rows in whiten(x_SMD):
        torch.testing.assert_close(torch.cov(rows.T), torch.eye(4, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rows.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_collapsed_sub_batch_is_nan_throughout():
    x_SMD = torch.randn(3, 9, 4)
    x_SMD[1, :, 3] = 1.0
    assert whiten(x_SMD)[1].isnan().all()
    assert whiten(x_SMD)[::2].isfinite().all()
    assert whiten(x_SMD, eps=0.1).isfinite().all()


def test_permutations_are_those_of_the_step(make_method):
    method = make_method(whitening_iters=3)
    first = method.permutations(12, make_batch())
    assert torch.equal(first.sort(-1).values, torch.arange(12).expand(3, -1))
    assert len({tuple(order) for order in first.tolist()}) == 3
    assert torch.equal(method.permutations(12, make_batch()), first)
    assert not torch.equal(method.permutations(12, make_batch(step=1)), first)
    assert not torch.equal(method.permutations(12, make_batch(seed=1)), first)


def test_the_method_whitens_sub_batches_of_its_own_draw(make_method):
    method = make_method(whitening_size=4, whitening_iters=2, whitening_eps=0.1)
    z_VND = torch.randn(2, 12, 3, dtype=torch.float64)
    batch = make_batch(step=7)
    loss, _ = method.loss(z_VND, batch)
    torch.testing.assert_close(loss, plain_loss(z_VND, method.permutations(12, batch), 4, 0.1))


@pytest.mark.parametrize(("dim", "batch_size", "size"), [(64, 256, 128), (64, 300, 150), (64, 128, 128), (3, 14, 7)])
def test_sub_batches_have_twice_as_many_images_as_dimensions(dim, batch_size, size):
    assert sub_batch_size(None, dim, batch_size) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"projector_dim": 8}, "training.batch_size: 12 .* 8 dimensions .*at least 16 images"),
        ({"whitening_size": 5}, "method.whitening_size: 5 does not divide training.batch_size, 12"),
        ({"whitening_size": 24}, "method.whitening_size: 24 does not divide"),
        ({"whitening_size": 3}, "method.whitening_size: 3 images cannot whiten 3 dimensions .*more than 3, better 6"),
    ],
)
def test_an_impossible_size_is_refused(make_method, settings, message):
    with pytest.raises(InputError, match=message):
        make_method(**settings)


@pytest.mark.parametrize("settings", [{"whitening_eps": 1}, {"whitening_iters": 0}, {"whitening_size": -4}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        WMSEConfig(**settings)
