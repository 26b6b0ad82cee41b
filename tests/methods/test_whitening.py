from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from hf_ssl_or.methods import get_method
from hf_ssl_or.methods.whitening import WhiteningConfig, feature_whitening
from hf_ssl_or.structures import MultiViewBatch


def plain_terms(z_ND, covariance=0.004):
    """Variance and covariance terms of one view, as solo-learn's VICReg writes them."""
    variance = F.relu(1 - (z_ND.var(0) + 1e-4).sqrt()).mean()
    matrix = torch.cov(z_ND.T)
    return variance + covariance * (matrix - torch.diag(matrix.diag())).square().sum() / z_ND.shape[1]


@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12)])
@pytest.mark.parametrize("covariance", [0.004, 1.0])
def test_two_views_equal_the_sum_of_both_views_terms_with_gradient(images, dim, covariance):
    torch.manual_seed(0)
    z_VND = (0.8 * torch.randn(2, images, dim, dtype=torch.float64)).requires_grad_()
    loss = feature_whitening(z_VND, covariance)
    expected = plain_terms(z_VND[0], covariance) + plain_terms(z_VND[1], covariance)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [1, 3, 4])
def test_any_number_of_views_gives_twice_the_mean(views):
    z_VND = 0.8 * torch.randn(views, 7, 4, dtype=torch.float64)
    expected = 2 * torch.stack([plain_terms(z_ND) for z_ND in z_VND]).mean()
    torch.testing.assert_close(feature_whitening(z_VND), expected, rtol=1e-10, atol=1e-10)


def test_white_features_cost_nothing_and_a_constant_costs_most():
    white = torch.eye(6, dtype=torch.float64) - 1 / 6
    basis = torch.linalg.eigh(white).eigenvectors[:, 1:] * 6  # five white dimensions of six images
    assert feature_whitening(basis[None]) < 1e-20
    assert feature_whitening(torch.ones(2, 6, 5)).item() == pytest.approx(2 * (1 - 0.01))


def outputs(tiny_encoder, name, views, whitening):
    torch.manual_seed(0)
    method = get_method(name)(tiny_encoder(), whitening=whitening, projector_hidden=16, projector_dim=8).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(views, 9, 3, 8, 8, dtype=torch.float64, generator=generator)
    return method, method(MultiViewBatch(views_VBCHW=images, index_B=torch.arange(9))), images


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", ["byol", "simclr", "vicreg"])
def test_a_method_adds_the_term_of_its_predictions_or_projections(tiny_encoder, name, views):
    _, plain, _ = outputs(tiny_encoder, name, views, None)
    method, output, images = outputs(tiny_encoder, name, views, WhiteningConfig(weight=3.0, covariance=0.5))
    z_VND = method.projector(method.encode(images))
    if name == "byol":
        z_VND = method.predictor(z_VND)
    expected = 3 * 2 * torch.stack([plain_terms(z_ND, 0.5) for z_ND in z_VND]).mean()
    torch.testing.assert_close(output.loss - plain.loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.terms["whitening"], expected.detach(), rtol=1e-9, atol=1e-9)
    assert plain.terms.keys() == output.terms.keys() - {"whitening"}


def test_the_gradient_of_the_term_is_added_too(tiny_encoder):
    weights = []
    for weight in (0.0, 1.0, 2.0):
        method, output, _ = outputs(tiny_encoder, "byol", 2, WhiteningConfig(weight=weight))
        output.loss.backward()
        weights.append(method.encoder.layers[0].weight.grad)
    torch.testing.assert_close(weights[2] - weights[1], weights[1] - weights[0], rtol=1e-8, atol=1e-10)
    assert (weights[1] - weights[0]).abs().max() > 1e-6


@pytest.mark.parametrize("whitening", [None, WhiteningConfig(), WhiteningConfig(weight=0, covariance=1.0)])
def test_a_weight_of_zero_adds_nothing(tiny_encoder, whitening):
    _, output, _ = outputs(tiny_encoder, "byol", 2, whitening)
    assert "whitening" not in output.terms
    assert torch.equal(output.loss, outputs(tiny_encoder, "byol", 2, None)[1].loss)


@pytest.mark.parametrize("settings", [{"weight": -1}, {"covariance": -0.1}, {"weight": "much"}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        WhiteningConfig(**settings)
