from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.nnclr import NNCLR, NNCLRConfig, nnclr_loss
from hf_ssl_or.structures import MultiViewBatch

N, Q, D = 6, 18, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loss(neighbor_ND, p_ND, temperature):
    """One direction, by the paper's formula: each neighbor against the predictions of the batch."""
    logits = F.normalize(neighbor_ND, dim=1) @ F.normalize(p_ND, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(p_ND)))


@pytest.fixture
def method(tiny_encoder):
    small = {"projector_hidden": 16, "projector_dim": D, "predictor_hidden": 16, "queue_size": Q}
    return NNCLR(tiny_encoder(), **small).double().train()


def make_batch(step=0):
    return MultiViewBatch(views_VBCHW=random(3, N, 3, 8, 8, seed=step), index_B=torch.arange(N), step=step)


def test_two_views_are_the_published_mean_of_both_directions():
    p_VND, neighbor_VND = random(2, N, D).requires_grad_(), random(2, N, D, seed=1)
    loss, terms = nnclr_loss(p_VND, neighbor_VND, 0.1)
    expected = plain_loss(neighbor_VND[0], p_VND[1], 0.1) / 2 + plain_loss(neighbor_VND[1], p_VND[0], 0.1) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, p_VND), torch.autograd.grad(expected, p_VND)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms["positive_cosine"], F.cosine_similarity(p_VND, neighbor_VND.flip(0), -1).mean())


@pytest.mark.parametrize("views", [3, 4])
def test_more_views_are_the_mean_over_pairs(views):
    p_VND, neighbor_VND = random(2, views, N, D)
    pairs = [plain_loss(neighbor_VND[v], p_VND[u], 0.2) for v in range(views) for u in range(views) if u != v]
    loss, _ = nnclr_loss(p_VND, neighbor_VND, 0.2)
    torch.testing.assert_close(loss, torch.stack(pairs).mean(), rtol=1e-12, atol=1e-12)


def test_steps_equal_lightlys_neighbors_in_a_queue_of_the_first_view(method):
    bank = NNMemoryBankModule((Q, D)).double()
    bank.bank.copy_(method.queue.features_QD)
    for step in range(5):
        batch = make_batch(step)
        with torch.no_grad():
            z_VND = method.projector(method.encode(batch.views_VBCHW))
            p_VND = method.predictor(z_VND)
        neighbor_VND = torch.stack([bank(F.normalize(z_ND, dim=1)) for z_ND in z_VND])
        torch.testing.assert_close(method(batch).loss, nnclr_loss(p_VND, neighbor_VND, 0.2)[0])
        method.on_step_end(step, 5)
        bank(F.normalize(z_VND[0], dim=1), update=True)
        torch.testing.assert_close(method.queue.features_QD, bank.bank, rtol=1e-12, atol=1e-12)


def test_the_gradient_goes_through_the_predictions_only(method):
    embeddings = []
    method.projector.register_forward_hook(lambda *call: embeddings.append(call[-1]))
    method.predictor.register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
    method(make_batch()).loss.backward()
    assert all(p.grad is None for p in method.projector.parameters())
    assert embeddings[0].requires_grad


def test_the_heads_are_lightlys(method):
    def shapes(*heads):
        return sorted(tuple(p.shape) for head in heads for p in head.parameters() if p.dim() == 2 or len(p) == D)

    lightly = NNCLRProjectionHead(16, 16, D), NNCLRPredictionHead(D, 16, D)
    assert shapes(method.projector, method.predictor) == shapes(*lightly)


def test_a_queue_that_the_batch_does_not_divide_is_refused(tiny_encoder):
    with pytest.raises(InputError, match="method.queue_size: 4096 is not a multiple of training.batch_size, 6"):
        NNCLR(tiny_encoder(), queue_size=4096).prepare(num_views=2, batch_size=6)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"queue_size": 0}, {"predictor_hidden": -1}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        NNCLRConfig(**settings)
