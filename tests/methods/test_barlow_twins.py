from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import BarlowTwinsLoss

from hf_ssl_or.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig, auto_beta, barlow_twins_loss
from hf_ssl_or.structures import MultiViewBatch


@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12), (3, 1100)])
def test_two_views_equal_lightly_with_gradient(images, dim):
    torch.manual_seed(0)
    z_VND = torch.randn(2, images, dim, dtype=torch.float64, requires_grad=True)
    loss, _ = barlow_twins_loss(z_VND, 0.02)
    expected = BarlowTwinsLoss(lambda_param=0.02)(*z_VND.unbind())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [3, 5])
@pytest.mark.parametrize(("images", "dim"), [(7, 4), (4, 7)])
def test_more_views_equal_the_formula(views, images, dim):
    torch.manual_seed(views)
    z_VND = torch.randn(views, images, dim, dtype=torch.float64)
    x = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in z_VND]
    mean = sum(x) / views
    invariance = sum(((view.T @ mean / images).diagonal() - 1).square().sum() for view in x) / views
    correlation = mean.T @ mean / images
    redundancy = sum(correlation[i, j] ** 2 for i in range(dim) for j in range(dim) if i != j)
    loss, terms = barlow_twins_loss(z_VND, 0.03, 0.5)
    torch.testing.assert_close(loss, 0.5 * (invariance + 0.03 * redundancy), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["invariance"], invariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["redundancy"], redundancy, rtol=1e-10, atol=1e-10)


def reference_of_all_views(z_VND, beta):
    """Ghosh et al.: the code's loss of projections that are standardized over all views together."""
    views, images, dim = z_VND.shape
    z_MD = z_VND.flatten(0, 1)
    x_VND = ((z_MD - z_MD.mean(0)) / z_MD.std(0)).view(views, images, dim)
    off = ~torch.eye(dim, dtype=torch.bool)
    if views == 2:
        products = [x_VND[v].T @ x_VND[1 - v] / images for v in range(2)]
        return sum((c.diagonal() - 1).square().sum() + beta * c[off].square().sum() for c in products) / 2
    mean_ND = x_VND.sum(0) / views
    on_diagonal = ((x_VND * mean_ND).mean(1) - 1).square().sum()
    return on_diagonal / views + beta * (mean_ND.T @ mean_ND / images)[off].square().sum()


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12)])
def test_all_views_together_equal_the_formula_with_gradient(views, images, dim):
    torch.manual_seed(views)
    means, scales = torch.randn(2, views, 1, dim, dtype=torch.float64)
    z_VND = (torch.randn(views, images, dim, dtype=torch.float64) * scales + means).requires_grad_()
    loss, _ = barlow_twins_loss(z_VND, 0.02, standardize="all_views")
    expected = reference_of_all_views(z_VND, 0.02)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert abs(loss - barlow_twins_loss(z_VND, 0.02)[0]) > 0.1


@pytest.mark.parametrize("views", [2, 4])
def test_both_ways_agree_where_views_have_the_same_statistics(views):
    torch.manual_seed(0)
    z_VND = torch.randn(views, 500, 3, dtype=torch.float64)
    z_VND = 100 * (z_VND - z_VND.mean(1, keepdim=True)) / z_VND.std(1, keepdim=True)
    wanted = barlow_twins_loss(z_VND, 0.02)[0]
    torch.testing.assert_close(barlow_twins_loss(z_VND, 0.02, standardize="all_views")[0], wanted, rtol=1e-2, atol=0)


def test_a_dimension_that_is_constant_over_all_views_stays_finite():
    z_VND = torch.randn(3, 8, 4)
    z_VND[..., 0] = 2
    z_VND.requires_grad_()
    loss, _ = barlow_twins_loss(z_VND, 0.02, standardize="all_views")
    (gradient,) = torch.autograd.grad(loss, z_VND)
    assert loss.isfinite() and gradient.isfinite().all()


def test_the_method_standardizes_as_its_settings_say(tiny_encoder):
    torch.manual_seed(0)
    views_VBCHW = torch.randn(3, 6, 3, 8, 8)
    batch = MultiViewBatch(views_VBCHW=views_VBCHW, index_B=torch.arange(6))
    config = BarlowTwinsConfig(projector_hidden=8, projector_dim=4, standardize="all_views")
    method = BarlowTwins(tiny_encoder(), config)
    z_VND = method.projector(method.encode(views_VBCHW))
    torch.testing.assert_close(method(batch).loss, reference_of_all_views(z_VND, auto_beta(4)))


def test_the_first_sum_is_that_of_each_view_against_the_others_up_to_a_factor():
    torch.manual_seed(0)
    views, images = 4, 9
    z_VND = torch.randn(views, images, 3, dtype=torch.float64) * 100  # eps of the variance does not show
    x = (z_VND - z_VND.mean(1, keepdim=True)) / z_VND.std(1, correction=0, keepdim=True)
    others = (x.sum(0) - x) / (views - 1)
    against_others = ((x * others).sum(1) / images - 1).square().sum(-1).mean()
    _, terms = barlow_twins_loss(z_VND, 0.0)
    expected = ((views - 1) / views) ** 2 * against_others
    torch.testing.assert_close(terms["invariance"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_order_of_views_and_of_images_does_not_matter(views):
    torch.manual_seed(0)
    z_VND = torch.randn(views, 8, 5, dtype=torch.float64)
    loss, _ = barlow_twins_loss(z_VND, 0.02)
    torch.testing.assert_close(barlow_twins_loss(z_VND.flip(0), 0.02)[0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(barlow_twins_loss(z_VND.flip(1), 0.02)[0], loss, rtol=1e-12, atol=0)


def test_beta_follows_the_dimension(tiny_encoder):
    assert auto_beta(256) == pytest.approx(0.0195, rel=0.01)
    assert auto_beta(512) == pytest.approx(5 / 512)
    assert auto_beta(1024) == pytest.approx(2 / 1024)
    z_VND = torch.randn(2, 6, 128)
    for settings, beta in (({}, 5 / 128), ({"beta": 0.0051}, 0.0051)):
        method = BarlowTwins(tiny_encoder(), projector_dim=128, **settings)
        assert torch.equal(method.loss(z_VND, None)[0], barlow_twins_loss(z_VND, beta)[0])


@pytest.mark.parametrize(
    "settings", [{"beta": -1}, {"beta": "automatic"}, {"projector_dim": 0}, {"scale": 0}, {"standardize": "both"}]
)
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        BarlowTwinsConfig(**settings)
