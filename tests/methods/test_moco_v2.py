from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import NTXentLoss
from torch import nn
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.moco_v2 import MoCoV2, MoCoV2Config, moco_v2_loss
from hf_ssl_or.structures import MultiViewBatch

N, Q, D = 4, 12, 5


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def queries(views, seed=3):
    return (3 * unit(views, N, D, seed=seed)).requires_grad_()


def others_of(key_VND):
    """The other views of each view, from the next one on."""
    views = len(key_VND)
    return torch.stack([torch.stack([key_VND[(v + s) % views] for s in range(1, views)]) for v in range(views)])


def plain_loss(q_ND, key_ND, queue_QD, temperature):
    """One direction, by the paper's formula: cross-entropy with the positive in front."""
    q_ND = F.normalize(q_ND, dim=-1)
    logits = torch.cat([(q_ND * key_ND).sum(1, keepdim=True), q_ND @ queue_QD.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q_ND), dtype=torch.long))


def check_equal(loss, expected, q_VBD):
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, q_VBD), torch.autograd.grad(expected, q_VBD)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def make_method(encoder, views=2, batch_norm=True, **settings):
    small = {"projector_hidden": 16, "projector_dim": D, "queue_size": Q}
    torch.manual_seed(0)
    method = MoCoV2(encoder(batch_norm), **small | settings).double().train()
    method.prepare(num_views=views, batch_size=N)
    return method


def make_batch(views, step=0):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(views, N, 3, 8, 8, generator=generator, dtype=torch.float64)
    return MultiViewBatch(views_VBCHW=images, index_B=torch.arange(N), step=step)


def test_one_direction_equals_lightly_with_gradient():
    q_VBD, key_ND, queue_QD = queries(1), unit(N, D, seed=1), unit(Q, D, seed=2)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(Q, D)).double()
    criterion.memory_bank.bank.copy_(queue_QD)
    loss, _ = moco_v2_loss(q_VBD, key_ND[None, None], queue_QD[None], 0.2)
    check_equal(loss, criterion(q_VBD[0], key_ND), q_VBD)


def test_two_views_are_the_mean_of_both_directions():
    q_VBD, key_VND, queue_VQD = queries(2), unit(2, N, D, seed=1), unit(2, Q, D, seed=2)
    loss, cosine = moco_v2_loss(q_VBD, others_of(key_VND), queue_VQD, 0.1)
    first = plain_loss(q_VBD[0], key_VND[1], queue_VQD[0], 0.1)
    second = plain_loss(q_VBD[1], key_VND[0], queue_VQD[1], 0.1)
    check_equal(loss, (first + second) / 2, q_VBD)
    torch.testing.assert_close(cosine, F.cosine_similarity(q_VBD, key_VND.flip(0), dim=-1).mean().detach())


@pytest.mark.parametrize("views", [3, 4])
def test_more_views_are_the_mean_over_pairs(views):
    q_VBD, key_VND, queue_VQD = queries(views), unit(views, N, D, seed=1), unit(views, Q, D, seed=2)
    pairs = [plain_loss(q_VBD[v], key_VND[u], queue_VQD[v], 0.2) for v in range(views) for u in range(views) if u != v]
    loss, _ = moco_v2_loss(q_VBD, others_of(key_VND), queue_VQD, 0.2)
    check_equal(loss, torch.stack(pairs).mean(), q_VBD)


def keys_of(method, batch):
    """The teacher's keys of all views, by a forward of their own."""
    with torch.no_grad():
        features = method.teacher.encoder(batch.views_VBCHW.flatten(0, 1)).pooler_output
        return F.normalize(method.teacher.projector(features[None])[0], dim=-1).unflatten(
            0, batch.views_VBCHW.shape[:2]
        )


def test_two_views_have_solo_learns_queues(tiny_encoder):
    """A queue of each view's keys; a query looks in that of the other view."""
    method = make_method(tiny_encoder)
    expected_VQD = method.queue.features_QD.flip(0).clone()
    for step in range(5):
        batch = make_batch(2, step)
        k_VND = keys_of(method, batch)
        q_VND = method.projector(method.encode(batch.views_VBCHW))
        expected = [plain_loss(q_VND[v], k_VND[1 - v], expected_VQD[1 - v], 0.2) for v in range(2)]
        torch.testing.assert_close(method(batch).loss, torch.stack(expected).mean(), rtol=1e-10, atol=0)
        method.on_step_end(step, 5)
        place = N * step % Q
        expected_VQD[:, place : place + N] = k_VND
        torch.testing.assert_close(method.queue.features_QD.flip(0), expected_VQD, rtol=1e-12, atol=1e-12)


def test_a_querys_queue_takes_the_other_views_in_turn(tiny_encoder):
    method = make_method(tiny_encoder, views=4)
    for step in range(3):
        batch = make_batch(4, step)
        k_VND = keys_of(method, batch)
        method(batch)
        method.on_step_end(step, 5)
        for v in range(4):
            pushed_ND = method.queue.features_QD[v, N * step : N * (step + 1)]
            torch.testing.assert_close(pushed_ND, k_VND[(v + 1 + step) % 4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("views", [2, 3])
def test_one_direction_encodes_one_query_and_the_other_views_keys(tiny_encoder, views):
    method = make_method(tiny_encoder, views, batch_norm=False, symmetric=False)
    assert method.queue.features_QD.shape == (1, Q, D)
    batch = make_batch(views)
    output = method(batch)
    assert method.encoder.seen == [N] and method.teacher.encoder.seen == [(views - 1) * N]
    q_ND = method.projector(method.encode(batch.views_VBCHW))[0]
    k_VND = keys_of(method, batch)
    pairs = [plain_loss(q_ND, k_VND[u], method.queue.features_QD[0], 0.2) for u in range(1, views)]
    torch.testing.assert_close(output.loss, torch.stack(pairs).mean(), rtol=1e-10, atol=0)
    method.on_step_end(0, 5)
    torch.testing.assert_close(method.queue.features_QD[0, :N], k_VND[1], rtol=1e-12, atol=1e-12)


def test_it_learns_once_its_queue_holds_keys(tiny_encoder):
    """The first negatives are random and easy, so the loss rises before it falls."""
    method = make_method(tiny_encoder)
    generator = torch.Generator().manual_seed(0)
    color = torch.randn(8, 1, N, 3, 1, 1, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(160):
        batch = make_batch(2, step)
        batch.views_VBCHW = color[step % 8] + 0.3 * batch.views_VBCHW
        loss = method(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.on_step_end(step, 160)
        losses.append(loss.item())
    filled = Q // N
    assert losses[0] < losses[filled]
    assert sum(losses[-8:]) < 0.7 * sum(losses[filled : filled + 8])


def test_the_projector_has_no_batch_norm_and_the_teacher_follows(tiny_encoder):
    method = make_method(tiny_encoder)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in method.projector.modules())
    with torch.no_grad():
        for p in method.encoder.parameters():
            p += 1
    before = method.teacher.encoder.layers[0].weight.clone()
    method(make_batch(2))
    method.on_step_end(0, 100)
    moved = method.teacher.encoder.layers[0].weight - before
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01))


def test_a_queue_that_the_batch_does_not_divide_is_refused(tiny_encoder):
    with pytest.raises(InputError, match="method.queue_size: 14 is not a multiple of training.batch_size, 4"):
        make_method(tiny_encoder, queue_size=14)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"queue_size": 0}, {"momentum": 2}, {"symmetric": 1}])
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        MoCoV2Config(**settings)
