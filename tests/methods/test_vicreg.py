from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import VICRegLoss

from hf_ssl_or.methods.vicreg import VICRegConfig, vicreg_loss


@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12)])
def test_two_views_equal_lightly_with_gradient(images, dim):
    torch.manual_seed(0)
    z_VND = torch.randn(2, images, dim, dtype=torch.float64, requires_grad=True)
    loss, _ = vicreg_loss(z_VND)
    expected = VICRegLoss()(*z_VND.unbind())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [3, 4])
@pytest.mark.parametrize(("images", "dim"), [(7, 4), (4, 7)])
def test_more_views_are_the_mean_of_two_view_losses_against_the_others(views, images, dim):
    torch.manual_seed(views)
    z_VND = torch.randn(views, images, dim, dtype=torch.float64, requires_grad=True)
    criterion = VICRegLoss(lambda_param=20.0, mu_param=10.0, nu_param=2.0)
    losses = []
    for v in range(views):
        others = torch.stack([z_VND[u] for u in range(views) if u != v]).mean(0)
        losses.append(criterion(z_VND[v], others))
    expected = torch.stack(losses).mean()
    loss, _ = vicreg_loss(z_VND, 20.0, 10.0, 2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    loss, terms = vicreg_loss(torch.randn(3, 6, 4, dtype=torch.float64), 3.0, 5.0, 7.0)
    total = 3 * terms["invariance"] + 5 * terms["variance"] + 7 * terms["covariance"]
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_order_of_views_and_of_images_does_not_matter(views):
    torch.manual_seed(0)
    z_VND = torch.randn(views, 8, 5, dtype=torch.float64)
    loss, _ = vicreg_loss(z_VND)
    torch.testing.assert_close(vicreg_loss(z_VND.flip(0))[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(vicreg_loss(z_VND.flip(1))[0], loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", [{"projector_dim": 0}, {"covariance_weight": -1}, {"variance_weight": "much"}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        VICRegConfig(**settings)
