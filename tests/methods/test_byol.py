from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import NegativeCosineSimilarity
from torch.nn import functional as F

from hf_ssl_or.methods.byol import BYOL, BYOLConfig, byol_loss
from hf_ssl_or.structures import MultiViewBatch


@pytest.fixture
def method(tiny_encoder):
    return BYOL(tiny_encoder(), projector_hidden=16, projector_dim=8, predictor_hidden=16)


def test_two_views_equal_lightly_with_gradient():
    torch.manual_seed(0)
    p_VND = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    t_VND = torch.randn(2, 9, 5, dtype=torch.float64)
    criterion = NegativeCosineSimilarity()
    loss = byol_loss(p_VND, t_VND)
    expected = (2 + 2 * criterion(p_VND[0], t_VND[1])) + (2 + 2 * criterion(p_VND[1], t_VND[0]))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(loss, p_VND), torch.autograd.grad(expected, p_VND)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_loss_is_twice_the_mean_squared_distance_over_pairs(views):
    torch.manual_seed(views)
    p_VND, t_VND = torch.randn(2, views, 6, 5, dtype=torch.float64)
    p, t = F.normalize(p_VND, dim=-1), F.normalize(t_VND, dim=-1)
    pairs = [(p[v] - t[u]).square().sum(-1).mean() for v in range(views) for u in range(views) if u != v]
    torch.testing.assert_close(byol_loss(p_VND, t_VND), 2 * torch.stack(pairs).mean(), rtol=1e-12, atol=1e-12)
    order = torch.randperm(views)
    torch.testing.assert_close(byol_loss(p_VND[order], t_VND[order]), byol_loss(p_VND, t_VND), rtol=1e-12, atol=0)


def test_the_teacher_gives_targets_without_gradient_and_follows_slowly(method):
    batch = MultiViewBatch(views_VBCHW=torch.randn(2, 6, 3, 8, 8), index_B=torch.arange(6))
    method(batch).loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():
        for p in method.encoder.parameters():
            p += 1
    before = method.teacher.encoder.layers[0].weight.clone()
    method.on_step_end(0, 100)
    moved = method.teacher.encoder.layers[0].weight - before
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))
    method.on_step_end(99, 100)
    assert (method.teacher.encoder.layers[0].weight - before - moved).abs().max() < 1e-5


def test_the_teacher_uses_statistics_of_the_batch(method):
    method.train()
    before = method.teacher.encoder.layers[1].running_mean.clone()
    method(MultiViewBatch(views_VBCHW=torch.randn(2, 6, 3, 8, 8), index_B=torch.arange(6)))
    assert method.teacher.training
    assert not torch.equal(method.teacher.encoder.layers[1].running_mean, before)


def test_encoders_names_the_teacher_too(method):
    assert method.encoders() == [method.encoder, method.teacher.encoder]


@pytest.mark.parametrize("settings", [{"momentum": 1.5}, {"final_momentum": -0.1}, {"predictor_hidden": 0}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        BYOLConfig(**settings)
