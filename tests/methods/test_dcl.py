from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import DCLLoss
from torch.nn import functional as F

from hf_ssl_or.methods.dcl import DCLConfig, dcl_loss


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_two_views_equal_lightly_with_gradient(temperature):
    torch.manual_seed(0)
    z_VND = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    loss, terms = dcl_loss(z_VND, temperature)
    expected = DCLLoss(temperature)(*z_VND.unbind())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["positive_cosine"], F.cosine_similarity(*z_VND.unbind(), dim=-1).mean())
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_loss_is_the_mean_over_ordered_pairs(views):
    torch.manual_seed(views)
    z_VND = torch.randn(views, 4, 3, dtype=torch.float64)
    unit = F.normalize(z_VND, dim=-1)
    losses = []
    for n in range(4):
        for v in range(views):
            similar = torch.stack([unit[v, n] @ unit[w, m] / 0.2 for w in range(views) for m in range(4) if m != n])
            negatives = similar.exp().sum().log()
            losses += [negatives - unit[v, n] @ unit[u, n] / 0.2 for u in range(views) if u != v]
    torch.testing.assert_close(dcl_loss(z_VND, 0.2)[0], torch.stack(losses).mean(), rtol=1e-12, atol=1e-12)


def test_a_low_temperature_does_not_overflow():
    loss, _ = dcl_loss(torch.randn(2, 6, 5).to(torch.float16), 0.001)
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": "low"}, {"projector_dim": 0}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        DCLConfig(**settings)
