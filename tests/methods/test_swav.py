from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.swav import SwAV, SwAVConfig, sinkhorn
from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.structures import MultiViewBatch

SMALL = {"projector_hidden": 16, "projector_dim": 8, "prototypes": 12, "freeze_prototypes_steps": 0, "queue_size": 0}


def make_method(encoder, views=2, local=0, **settings):
    torch.manual_seed(0)
    method = SwAV(encoder, **SMALL | settings).train()
    method.prepare(num_views=views, batch_size=6, num_local_views=local)
    return method


def make_batch(views=2, local=0, step=0, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(views, 6, 3, size, size, generator=generator, dtype=dtype)
    crops = torch.randn(local, 6, 3, size // 2, size // 2, generator=generator, dtype=dtype) if local else None
    return MultiViewBatch(views_VBCHW=images, local_views_VBCHW=crops, index_B=torch.arange(6), step=step)


@pytest.mark.parametrize(("images", "prototypes"), [(20, 6), (6, 20)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_equal_lightly(images, prototypes, iterations):
    torch.manual_seed(0)
    scores_VNK = torch.rand(3, images, prototypes, dtype=torch.float64, requires_grad=True) * 2 - 1
    codes_VNK = sinkhorn(scores_VNK, 0.07, iterations)
    expected = [lightly_sinkhorn(scores_NK, iterations, 0.07) for scores_NK in scores_VNK]
    torch.testing.assert_close(codes_VNK, torch.stack(expected), rtol=1e-10, atol=1e-14)
    assert not codes_VNK.requires_grad


@pytest.mark.parametrize(("images", "prototypes"), [(20, 6), (2, 30)])
def test_codes_come_to_use_all_prototypes_alike(images, prototypes):
    torch.manual_seed(0)
    scores_NK = torch.rand(images, prototypes, dtype=torch.float64)
    codes_NK = sinkhorn(scores_NK, 0.2, 500)
    torch.testing.assert_close(codes_NK.sum(1), torch.ones(images, dtype=torch.float64))
    shares = torch.full((prototypes,), images / prototypes, dtype=torch.float64)
    torch.testing.assert_close(codes_NK.sum(0), shares)
    assert (codes_NK[0] - codes_NK[1]).abs().max() > 0.01  # and yet they tell images apart


def reference_sinkhorn(scores_NK, epsilon, iterations):
    """Potentials of rows and columns, in float64."""
    log_NK = scores_NK.double() / epsilon
    images, prototypes = log_NK.shape
    row_N1 = torch.zeros(images, 1, dtype=torch.float64)
    for _ in range(iterations):
        column_1K = math.log(images / prototypes) - (log_NK + row_N1).logsumexp(0, keepdim=True)
        row_N1 = -(log_NK + column_1K).logsumexp(1, keepdim=True)
    return (log_NK + row_N1 + column_1K).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.05, 0.01, 0.002, 1e-4])
@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0])
@pytest.mark.parametrize(("images", "prototypes"), [(64, 16), (8, 30)])
def test_codes_of_similar_images_are_exact_for_any_epsilon(images, prototypes, spread, epsilon, dtype):
    torch.manual_seed(0)
    z_ND = F.normalize(torch.randn(1, 32) + spread * torch.randn(images, 32), dim=1)
    weight_KD = F.normalize(torch.randn(prototypes, 32), dim=1)
    weight_KD[0] = F.normalize(z_ND.mean(0), dim=0)  # one prototype is near all images, the others near none
    scores_NK = (z_ND @ weight_KD.T).to(dtype)
    codes_NK = sinkhorn(scores_NK, epsilon, 3)
    assert codes_NK.dtype == dtype
    expected = reference_sinkhorn(scores_NK, epsilon, 3).to(dtype)
    torch.testing.assert_close(codes_NK, expected, rtol=1e-6, atol=1e-12)


def lightly_loss(method, batch, queue_VQD=None):
    """The loss by lightly, from this method's projections and its prototypes, scaled as the authors do."""
    views = len(batch.views_VBCHW)
    weight = F.normalize(method.prototypes.weight, dim=-1)
    scores_SBK = F.normalize(method.projector(method.encode_with_local_views(batch)), dim=-1) @ weight.T
    queue = None if queue_VQD is None else list(F.normalize(queue_VQD, dim=-1) @ weight.T)
    return SwaVLoss()(list(scores_SBK[:views]), list(scores_SBK[views:]), queue).squeeze()


def gradients(method, loss):
    return torch.autograd.grad(loss, [p for p in method.parameters() if p.requires_grad], retain_graph=True)


@pytest.mark.parametrize(("views", "local"), [(2, 0), (2, 3), (3, 0), (4, 2)])
def test_the_loss_equals_lightly_with_gradient(tiny_encoder, views, local):
    method = make_method(tiny_encoder(batch_norm=False), views, local).double()
    batch = make_batch(views, local, dtype=torch.float64)
    output, expected = method(batch), lightly_loss(method, batch)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(method, output.loss), gradients(method, expected), rtol=1e-8, atol=1e-12)
    assert 0 < output.terms["code_confidence"] < 1


@pytest.mark.parametrize(("views", "local"), [(2, 0), (3, 2)])
@pytest.mark.parametrize(("queue_from_step", "first"), [(0, 3), (4, 4)])
def test_the_queue_is_used_from_its_step_on_and_once_full(tiny_encoder, views, local, queue_from_step, first):
    settings = {"queue_size": 18, "queue_from_step": queue_from_step}
    method = make_method(tiny_encoder(batch_norm=False), views, local, **settings).double()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    seen = []
    for step in range(6):
        batch = make_batch(views, local, step, dtype=torch.float64)
        queue_VQD = torch.cat(seen[-3:], dim=1) if step >= first else None
        output, expected = method(batch), lightly_loss(method, batch, queue_VQD)
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
        found = gradients(method, output.loss)
        torch.testing.assert_close(found, gradients(method, expected), rtol=1e-8, atol=1e-12)
        if step == first:
            assert abs(output.loss - lightly_loss(method, batch)) > 1e-4
        seen.append(method.projector(method.encode_with_local_views(batch))[:views].detach())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.on_step_end(step, 6)


def test_the_queue_holds_the_global_views(tiny_encoder):
    method = make_method(tiny_encoder(batch_norm=False), 3, 1, queue_size=12)
    before = method.queue.features_QD.clone()
    batch = make_batch(3, 1)
    method(batch)
    assert torch.equal(method.queue.features_QD, before)
    method.on_step_end(0, 10)
    z_VBD = method.projector(method.encode_with_local_views(batch))[:3]  # batch norm sees the local view too
    torch.testing.assert_close(method.queue.features_QD[:, :6], z_VBD)
    assert torch.equal(method.queue.features_QD[:, 6:], before[:, 6:])


def test_the_queue_never_asks_for_a_value(tiny_encoder):
    method = make_method(tiny_encoder(), local=1, queue_size=12, queue_from_step=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method(make_batch(local=1, step=2)).loss.backward()
        method.on_step_end(2, 10)


def test_prototypes_stay_for_the_first_steps(tiny_encoder):
    method = make_method(tiny_encoder(), freeze_prototypes_steps=3)
    for step, moves in ((0, False), (2, False), (3, True)):
        method.zero_grad()
        method(make_batch(step=step)).loss.backward()
        assert bool(method.prototypes.weight.grad.any()) == moves
        assert all(p.grad.any() for p in method.encoder.parameters())


def test_local_views_of_another_size_and_a_vision_transformer():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny", image_size=32, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    method = make_method(encoder, local=3)
    output = method(make_batch(local=3, size=32))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("queue_size", [5, 3, 16])
def test_a_queue_that_batches_do_not_fill_evenly_is_refused(tiny_encoder, queue_size):
    with pytest.raises(InputError, match=f"method.queue_size: {queue_size} is not a multiple"):
        make_method(tiny_encoder(), queue_size=queue_size)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"epsilon": 0},
        {"epsilon": -0.05},
        {"sinkhorn_iterations": 0},
        {"prototypes": 1},
        {"queue_size": -1},
        {"queue_from_step": -1},
        {"freeze_prototypes_steps": -1},
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        SwAVConfig(**settings)
