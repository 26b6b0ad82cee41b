from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional as F

from hf_ssl_or.methods.vibcreg import IterNorm, VIbCReg, VIbCRegConfig, newton_whitening, vibcreg_loss


def plain_loss(a, b, invariance=25.0, variance=25.0, covariance=200.0):
    """As solo-learn writes it."""
    loss = invariance * F.mse_loss(a, b)
    for z in (a, b):
        loss = loss + variance * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        correlation = torch.corrcoef(z.T)
        loss = loss + covariance * (correlation - torch.diag(correlation.diag())).square().mean()
    return loss


def plain_iternorm(x_ND, group, steps=5, eps=1e-5):
    parts = []
    for x in x_ND.split(group, dim=1):
        covariance = torch.cov(x.T, correction=0) + eps * torch.eye(group, dtype=x.dtype)
        power = torch.eye(group, dtype=x.dtype)
        for _ in range(steps):
            power = (3 * power - torch.linalg.matrix_power(power, 3) @ covariance / covariance.trace()) / 2
        parts.append((x - x.mean(0)) @ (power / covariance.trace().sqrt()).T)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("images", "dim"), [(9, 4), (4, 9)])
def test_the_loss_and_its_gradient_are_the_mean_of_two_view_losses(views, images, dim):
    torch.manual_seed(views)
    z_VND = torch.randn(views, images, dim, dtype=torch.float64, requires_grad=True)
    others = [torch.stack([z_VND[u] for u in range(views) if u != v]).mean(0) for v in range(views)]
    weights = 20.0, 10.0, 150.0
    expected = torch.stack([plain_loss(z_VND[v], others[v], *weights) for v in range(views)]).mean()
    loss, terms = vibcreg_loss(z_VND, *weights)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(w * t for w, t in zip(weights, terms.values(), strict=True)), loss)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_two_views_give_the_published_loss_at_the_default_weights():
    z_VND = torch.randn(2, 8, 5, dtype=torch.float64)
    torch.testing.assert_close(vibcreg_loss(z_VND)[0], plain_loss(*z_VND), rtol=1e-12, atol=1e-12)
    config = VIbCRegConfig()
    assert (config.invariance_weight, config.variance_weight, config.covariance_weight) == (25, 25, 200)


@pytest.mark.parametrize("images", [12, 3])
def test_iternorm_and_its_gradient_are_those_of_each_view_and_group(images):
    torch.manual_seed(0)
    norm = IterNorm(6, 3).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    x_VND = (torch.randn(2, images, 6, dtype=torch.float64) * 3 + 7).requires_grad_()
    out = norm(x_VND)
    expected = torch.stack([plain_iternorm(x_ND, 3) for x_ND in x_VND]) * norm.weight + norm.bias
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(out)
    gradients = (torch.autograd.grad(y, [x_VND, norm.weight, norm.bias], weights) for y in (out, expected))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


def test_newton_steps_converge_to_the_inverse_square_root():
    torch.manual_seed(0)
    x_VND = torch.randn(2, 40, 4, dtype=torch.float64)
    _, matrix = newton_whitening(x_VND, 4, steps=15, eps=0.0)
    for view in range(2):
        covariance = torch.cov(x_VND[view].T, correction=0)
        whitened = matrix[view, 0] @ covariance @ matrix[view, 0].T
        torch.testing.assert_close(whitened, torch.eye(4, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_evaluation_uses_the_running_statistics():
    torch.manual_seed(0)
    norm = IterNorm(4, 2)
    x_VND = torch.randn(2, 9, 4) + 3
    mean, matrix = newton_whitening(x_VND, 2)
    norm(x_VND)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean[1] + 0.9 * 0.1 * mean[0])
    torch.testing.assert_close(norm.running_matrix, 0.1 * matrix[1] + 0.09 * matrix[0] + 0.81 * torch.eye(2))
    before = norm.running_matrix.clone()
    out = norm.eval()(x_VND)
    x_VNGC = x_VND.unflatten(-1, (2, 2)) - norm.running_mean[..., 0]
    expected = torch.einsum("gij,vngj->vngi", before, x_VNGC).flatten(2)
    torch.testing.assert_close(out, expected)
    assert torch.equal(norm.running_matrix, before)


@pytest.mark.parametrize("iternorm", [True, False])
def test_the_method_compares_what_iternorm_gives(tiny_encoder, iternorm):
    settings = {"projector_hidden": 8, "projector_dim": 6, "iternorm_group": 3, "variance_weight": 3.0}
    method = VIbCReg(tiny_encoder(), **settings, iternorm=iternorm)
    assert any(isinstance(module, nn.GELU) for module in method.projector.modules())
    z_VND = torch.randn(3, 9, 6, dtype=torch.float64)
    whitened = torch.stack([plain_iternorm(z_ND, 3) for z_ND in z_VND]) if iternorm else z_VND
    torch.testing.assert_close(method.double().loss(z_VND, None)[0], vibcreg_loss(whitened, variance_weight=3.0)[0])


@pytest.mark.parametrize(
    "settings",
    [{"iternorm_group": 0}, {"iternorm_group": 3, "projector_dim": 8}, {"iternorm": 1}, {"covariance_weight": -1}],
)
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        VIbCRegConfig(**settings)
    assert VIbCRegConfig(iternorm=False, iternorm_group=3, projector_dim=8)
