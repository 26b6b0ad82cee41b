from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.models.modules import NNMemoryBankModule
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.nnbyol import NNBYOL, NNBYOLConfig
from hf_ssl_or.structures import MultiViewBatch

N, Q, D = 6, 18, 8


def make_method(encoder, views, **settings):
    small = {"projector_hidden": 16, "projector_dim": D, "predictor_hidden": 16, "queue_size": Q}
    torch.manual_seed(0)
    method = NNBYOL(encoder(), **small | settings).double().train()
    method.prepare(num_views=views, batch_size=N)
    return method


def make_batch(views, step=0):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(views, N, 3, 8, 8, generator=generator, dtype=torch.float64)
    return MultiViewBatch(views_VBCHW=images, index_B=torch.arange(N), step=step)


@pytest.mark.parametrize("views", [2, 3, 4])
def test_steps_equal_byols_loss_against_neighbors_in_a_queue_of_the_first_view(tiny_encoder, views):
    """Neighbors by lightly's memory bank; two views are solo-learn's sum of both directions."""
    method = make_method(tiny_encoder, views)
    bank = NNMemoryBankModule((Q, D)).double()
    bank.bank.copy_(method.queue.features_QD)
    for step in range(5):
        batch = make_batch(views, step)
        with torch.no_grad():
            p_VND = method.predictor(method.projector(method.encode(batch.views_VBCHW)))
            t_VND = method.teacher.projector(method.encode(batch.views_VBCHW, method.teacher.encoder))
        nn_VND = [bank(t_ND) for t_ND in t_VND]
        pairs = [
            2 - 2 * F.cosine_similarity(p_VND[v], nn_VND[u], dim=-1).mean()
            for v in range(views)
            for u in range(views)
            if u != v
        ]
        torch.testing.assert_close(method(batch).loss, 2 * torch.stack(pairs).mean(), rtol=1e-10, atol=1e-12)
        method.on_step_end(step, 5)
        bank(F.normalize(t_VND[0], dim=1), update=True)
        torch.testing.assert_close(method.queue.features_QD, bank.bank, rtol=1e-12, atol=1e-12)


def test_the_teacher_follows_slowly_and_gets_no_gradient(tiny_encoder):
    method = make_method(tiny_encoder, 2)
    method(make_batch(2)).loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():
        for p in method.encoder.parameters():
            p += 1
    before = method.teacher.encoder.layers[0].weight.clone()
    method.on_step_end(0, 100)
    moved = method.teacher.encoder.layers[0].weight - before
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))


def test_a_queue_that_the_batch_does_not_divide_is_refused(tiny_encoder):
    with pytest.raises(InputError, match="method.queue_size: 20 is not a multiple of training.batch_size, 6"):
        make_method(tiny_encoder, 2, queue_size=20)


@pytest.mark.parametrize("settings", [{"queue_size": 0}, {"predictor_hidden": 0}, {"momentum": 1.5}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        NNBYOLConfig(**settings)
