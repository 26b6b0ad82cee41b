from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import DCLWLoss
from torch.nn import functional as F

from hf_ssl_or.methods.dcl import dcl_loss
from hf_ssl_or.methods.dclw import DCLW, DCLWConfig, dclw_loss


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize(("temperature", "sigma"), [(0.1, 0.5), (0.5, 0.2)])
def test_two_views_equal_lightly_with_gradient(temperature, sigma):
    torch.manual_seed(0)
    z_VND = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    loss, terms = dclw_loss(z_VND, temperature, sigma)
    expected = DCLWLoss(temperature, sigma)(*z_VND.unbind())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["positive_cosine"], F.cosine_similarity(*z_VND.unbind(), dim=-1).mean())
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_each_pair_of_views_has_weights_of_its_own(views):
    torch.manual_seed(views)
    z_VND = torch.randn(views, 4, 3, dtype=torch.float64)
    unit = F.normalize(z_VND, dim=-1)
    losses = []
    for v in range(views):
        for u in [u for u in range(views) if u != v]:
            density = ((unit[v] * unit[u]).sum(-1) / 0.3).exp()
            for n in range(4):
                weight = 2 - density[n] / density.mean()
                similar = [unit[v, n] @ unit[w, m] / 0.2 for w in range(views) for m in range(4) if m != n]
                losses.append(torch.stack(similar).exp().sum().log() - weight * (unit[v, n] @ unit[u, n]) / 0.2)
    torch.testing.assert_close(dclw_loss(z_VND, 0.2, 0.3)[0], torch.stack(losses).mean(), rtol=1e-12, atol=1e-12)


def test_a_large_sigma_gives_dcl():
    z_VND = torch.randn(3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(dclw_loss(z_VND, 0.2, 1e9)[0], dcl_loss(z_VND, 0.2)[0], rtol=1e-8, atol=1e-8)
    assert abs(dclw_loss(z_VND, 0.2, 0.5)[0] - dcl_loss(z_VND, 0.2)[0]) > 1e-3


def test_the_method_takes_its_settings(tiny_encoder):
    method = DCLW(tiny_encoder(), temperature=0.3, sigma=0.2)
    z_VND = torch.randn(3, 6, 4)
    assert torch.equal(method.loss(z_VND, None)[0], dclw_loss(z_VND, 0.3, 0.2)[0])


@pytest.mark.parametrize("settings", [{"sigma": 0}, {"sigma": "wide"}, {"temperature": -1}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        DCLWConfig(**settings)
