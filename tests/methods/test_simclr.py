from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import NTXentLoss

from hf_ssl_or.methods.simclr import SimCLRConfig, simclr_loss


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_two_views_equal_lightly_with_gradient(temperature):
    torch.manual_seed(0)
    z_VND = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    loss, _ = simclr_loss(z_VND, temperature)
    expected = NTXentLoss(temperature=temperature)(*z_VND.unbind())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_order_of_views_and_of_images_does_not_matter(views):
    torch.manual_seed(0)
    z_VND = torch.randn(views, 6, 5, dtype=torch.float64)
    loss, _ = simclr_loss(z_VND, 0.2)
    torch.testing.assert_close(simclr_loss(z_VND.flip(0), 0.2)[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(simclr_loss(z_VND.flip(1), 0.2)[0], loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": -0.5}, {"projector_hidden": 1.5}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        SimCLRConfig(**settings)
