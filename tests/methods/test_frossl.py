from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import FroSSLLoss
from torch.nn import functional as F

from hf_ssl_or.methods.frossl import FroSSLConfig, frossl_loss


def assert_same_with_gradient(loss, expected, z_VND):
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12), (7, 7)])
@pytest.mark.parametrize("weight", [1.0, 1.4])
def test_any_number_of_views_equals_lightly_with_gradient(views, images, dim, weight):
    torch.manual_seed(views)
    z_VND = (torch.randn(views, images, dim, dtype=torch.float64) + 0.5).requires_grad_()
    assert_same_with_gradient(frossl_loss(z_VND, weight)[0], FroSSLLoss(weight)(list(z_VND)), z_VND)


@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12)])
def test_two_centerd_views_give_the_published_loss_of_two_views(images, dim):
    """That loss has dimensions of length sqrt(D), the mean squared error of the views, and C of trace 1."""
    torch.manual_seed(0)
    z_VND = torch.randn(2, images, dim, dtype=torch.float64)
    z_VND = (z_VND - z_VND.mean(1, keepdim=True)).requires_grad_()
    scaled = dim**0.5 * F.normalize(z_VND, dim=1)
    covariances = scaled.mT @ scaled / dim**2
    expected = F.mse_loss(scaled[0], scaled[1]) + 2 * torch.linalg.matrix_norm(covariances).log().sum()
    assert_same_with_gradient(frossl_loss(z_VND)[0], expected, z_VND)


@pytest.mark.parametrize("views", [3, 4])
def test_the_invariance_is_the_sum_over_pairs(views):
    torch.manual_seed(views)
    z_VND = torch.randn(views, 8, 5, dtype=torch.float64)
    unit = F.normalize(z_VND, dim=1)
    pairs = [(unit[v] - unit[u]).square().sum() / 8 for v in range(views) for u in range(v)]
    torch.testing.assert_close(frossl_loss(z_VND)[1]["invariance"], torch.stack(pairs).sum(), rtol=1e-12, atol=0)


def test_the_best_spectrum_is_flat_and_the_scale_of_dimensions_does_not_matter():
    flat = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))[0].expand(2, 9, 4)
    loss, terms = frossl_loss(flat * torch.tensor([1.0, 20.0, 0.1, 3.0], dtype=torch.float64))
    torch.testing.assert_close(loss.item(), -2 * math.log(4))
    assert terms["invariance"] == 0
    assert frossl_loss(flat + 0.1)[0] > loss


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_a_view_that_vanishes_is_as_one_that_has_collapsed(scale):
    z_VND = torch.randn(2, 9, 4)
    z_VND[1] *= scale
    z_VND.requires_grad_()
    _, terms = frossl_loss(z_VND)
    expected = frossl_loss(torch.stack([z_VND[0], torch.ones(9, 4)]))[1]["log_norm"]
    torch.testing.assert_close(terms["log_norm"], expected)
    (gradient,) = torch.autograd.grad(terms["log_norm"], z_VND)
    assert gradient.isfinite().all() and gradient[0].any()


def test_a_dimension_that_is_all_zero_is_left_out():
    z_VND = torch.randn(2, 9, 4)
    z_VND[:, :, 0] = 0
    z_VND.requires_grad_()
    loss, _ = frossl_loss(z_VND)
    torch.testing.assert_close(loss, FroSSLLoss()(list(z_VND)), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert z_VND.grad.isfinite().all()


def test_a_negative_weight_is_refused_by_name():
    with pytest.raises(StrictDataclassError, match="invariance_weight: must be at least 0"):
        FroSSLConfig(invariance_weight=-1)
