from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn import functional as F

from hf_ssl_or.methods.functional import contrast
from hf_ssl_or.methods.moco_v3 import MoCoV3, MoCoV3Config, moco_v3_loss
from hf_ssl_or.structures import MultiViewBatch


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loss(p_ND, key_ND, temperature):
    """One direction, by the paper's algorithm 1."""
    logits = F.normalize(p_ND, dim=1) @ F.normalize(key_ND, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(p_ND)))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_two_views_are_the_published_sum_of_both_directions(temperature):
    p_VND, key_VND = random(2, 7, 5).requires_grad_(), random(2, 7, 5, seed=1)
    loss = moco_v3_loss(p_VND, key_VND, temperature)
    expected = plain_loss(p_VND[0], key_VND[1], temperature) + plain_loss(p_VND[1], key_VND[0], temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, p_VND), torch.autograd.grad(expected, p_VND)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("views", [3, 4])
def test_more_views_are_twice_the_mean_over_pairs(views):
    p_VND, key_VND = random(2, views, 6, 5)
    pairs = [plain_loss(p_VND[v], key_VND[u], 0.2) for v in range(views) for u in range(views) if u != v]
    loss = moco_v3_loss(p_VND, key_VND, 0.2)
    torch.testing.assert_close(loss, 2 * torch.stack(pairs).mean(), rtol=1e-12, atol=1e-12)
    order = torch.randperm(views)
    torch.testing.assert_close(moco_v3_loss(p_VND[order], key_VND[order], 0.2), loss, rtol=1e-12, atol=0)


def test_contrast_has_a_gradient_for_keys_too():
    query_VND, key_VND = random(2, 2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: contrast(q, k, 0.5), (query_VND, key_VND))


@pytest.mark.parametrize("views", [2, 3])
def test_shards_of_queries_average_to_the_whole(views):
    query_VND, key_VND = random(2, views, 6, 5)
    shards = [contrast(query_VND[:, first : first + 2], key_VND, 0.2, first) for first in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(shards).mean(), contrast(query_VND, key_VND, 0.2), rtol=1e-12, atol=0)


def test_contrast_is_chance_for_equal_keys_and_none_for_clear_ones():
    same = torch.ones(3, 8, 5, dtype=torch.float64)
    torch.testing.assert_close(contrast(same, same, 0.2), torch.tensor(8.0, dtype=torch.float64).log())
    clear = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
    assert contrast(clear, clear, 0.01) < 1e-12


def make_method(encoder, **settings):
    return MoCoV3(encoder(), **{"projector_hidden": 16, "projector_dim": 8, "predictor_hidden": 16} | settings)


def test_the_forward_compares_predictions_with_the_teachers_keys(tiny_encoder):
    method = make_method(tiny_encoder).double().train()
    batch = MultiViewBatch(views_VBCHW=random(2, 6, 3, 8, 8), index_B=torch.arange(6))
    output = method(batch)
    with torch.no_grad():
        p_VBD = method.predictor(method.projector(method.encode(batch.views_VBCHW)))
        key_VBD = method.teacher.projector(method.encode(batch.views_VBCHW, method.teacher.encoder))
    torch.testing.assert_close(output.loss, moco_v3_loss(p_VBD, key_VBD, 0.2))
    cosine = F.cosine_similarity(p_VBD, key_VBD.flip(0), dim=-1).mean()
    torch.testing.assert_close(output.terms["positive_cosine"], cosine)
    output.loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("norm", "predictor"), [(False, 1), (True, 2)])
def test_batch_norm_ends_the_projector_and_where_asked_the_predictor(tiny_encoder, norm, predictor):
    method = make_method(tiny_encoder, projector_layers=3, predictor_norm=norm)
    counts = [
        sum(isinstance(m, nn.BatchNorm1d) for m in head.modules()) for head in (method.projector, method.predictor)
    ]
    assert counts == [3, predictor]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"predictor_hidden": 0}, {"momentum": -1}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        MoCoV3Config(**settings)
