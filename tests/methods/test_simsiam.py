from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import NegativeCosineSimilarity
from torch.nn import functional as F

from hf_ssl_or.methods.simsiam import SimSiam, SimSiamConfig, simsiam_loss
from hf_ssl_or.structures import MultiViewBatch


def predictions_and_projections(views, images=9, dim=5):
    torch.manual_seed(views)
    p_VND, z_VND = torch.randn(2, views, images, dim, dtype=torch.float64)
    return p_VND.requires_grad_(), z_VND.requires_grad_()


def assert_same_with_gradient(loss, expected, p_VND):
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, p_VND), torch.autograd.grad(expected, p_VND)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["pairs", "mean"])
def test_two_views_equal_lightly_with_gradient(target):
    p_VND, z_VND = predictions_and_projections(2)
    criterion = NegativeCosineSimilarity()
    expected = 0.5 * (criterion(p_VND[0], z_VND[1].detach()) + criterion(p_VND[1], z_VND[0].detach()))
    assert_same_with_gradient(simsiam_loss(p_VND, z_VND, target), expected, p_VND)


@pytest.mark.parametrize("views", [3, 4])
def test_pairs_is_the_mean_of_two_view_losses(views):
    p_VND, z_VND = predictions_and_projections(views)
    p, z = F.normalize(p_VND, dim=-1), F.normalize(z_VND.detach(), dim=-1)
    pairs = [-(p[v] * z[u]).sum(-1).mean() for v in range(views) for u in range(views) if u != v]
    assert_same_with_gradient(simsiam_loss(p_VND, z_VND), torch.stack(pairs).mean(), p_VND)


@pytest.mark.parametrize("views", [3, 4])
def test_mean_is_the_fastsiam_of_lightly(views):
    """As lightly's example: each view against the mean of the other views' projections, unscaled."""
    p_VND, z_VND = predictions_and_projections(views)
    criterion = NegativeCosineSimilarity()
    losses = []
    for v in range(views):
        others = [z_VND[u].detach() for u in range(views) if u != v]
        losses.append(criterion(p_VND[v], torch.stack(others).mean(0)))
    loss = simsiam_loss(p_VND, z_VND, "mean")
    assert_same_with_gradient(loss, torch.stack(losses).mean(), p_VND)
    assert (loss - simsiam_loss(p_VND, z_VND, "pairs")).abs() > 1e-3


@pytest.mark.parametrize("target", ["pairs", "mean"])
def test_projections_get_no_gradient_but_that_of_the_predictor(target):
    p_VND, z_VND = predictions_and_projections(3)
    simsiam_loss(p_VND, z_VND, target).backward()
    assert z_VND.grad is None and p_VND.grad.abs().sum() > 0


@pytest.mark.parametrize("target", ["pairs", "mean"])
def test_the_forward_takes_the_target_and_the_heads_of_the_paper(tiny_encoder, target):
    method = SimSiam(tiny_encoder(), projector_hidden=16, projector_dim=8, predictor_hidden=4, target=target)
    assert [tuple(w.shape) for w in method.projector.parameters() if w.dim() == 2] == [(16, 16), (16, 16), (8, 16)]
    assert [tuple(w.shape) for w in method.predictor.parameters() if w.dim() == 2] == [(4, 8), (8, 4)]
    views_VBCHW = torch.randn(3, 6, 3, 8, 8)
    z_VBD = method.projector(method.encode(views_VBCHW))
    torch.testing.assert_close(z_VBD.flatten(0, 1).mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    output = method(MultiViewBatch(views_VBCHW=views_VBCHW, index_B=torch.arange(6)))
    torch.testing.assert_close(output.loss, simsiam_loss(method.predictor(z_VBD), z_VBD, target))
    torch.testing.assert_close(output.terms["cosine"], -output.loss.detach())


@pytest.mark.parametrize("settings", [{"predictor_hidden": 0}, {"target": "median"}, {"projector_layers": -1}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        SimSiamConfig(**settings)
