from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import LeJEPALoss
from torch.nn import functional as F

from hf_ssl_or.methods.lejepa import LeJEPA, LeJEPAConfig, _WaveSums, lejepa_loss, sigreg
from hf_ssl_or.structures import MultiViewBatch


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(dim, count):
    return F.normalize(random(dim, count, seed=1), dim=0)


@pytest.fixture
def method(tiny_encoder):
    return LeJEPA(tiny_encoder(), projector_hidden=16, projector_dim=8, directions=32)


def batch(**keys):
    images, local = random(2, 6, 3, 8, 8).float(), random(1, 6, 3, 6, 6).float()
    return MultiViewBatch(views_VBCHW=images, local_views_VBCHW=local, index_B=torch.arange(6), **keys)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("global_views", "local_views"), [(2, 1), (1, 1), (2, 6)])
def test_the_loss_equals_lightly_with_gradient(global_views, local_views, dtype, tolerance):
    z_SBD = (2 * random(global_views + local_views, 20, 8)).to(dtype).requires_grad_()
    directions_DA = directions(8, 50).to(dtype)
    criterion = LeJEPALoss(lambda_param=0.1, sigreg_num_vectors=50).to(dtype)
    criterion.sigreg._generate_unit_vectors = lambda *_: directions_DA
    expected = criterion(global_proj=z_SBD[:global_views], local_proj=z_SBD[global_views:])
    loss, _ = lejepa_loss(z_SBD, directions_DA, global_views, 0.1)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    gradients = torch.autograd.grad(loss, z_SBD)[0], torch.autograd.grad(expected, z_SBD)[0]
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance * gradients[1].abs().max().item())


@pytest.mark.parametrize("views", [2, 3, 4])
def test_the_loss_is_written_out_view_by_view_and_direction_by_direction(views):
    z_SBD, directions_DA = random(views, 7, 5), directions(5, 6)
    t = torch.linspace(-2, 2, 21, dtype=torch.float64)
    statistics = []
    for z_BD in z_SBD:
        for direction in directions_DA.T:
            wave = torch.exp(1j * t * (z_BD @ direction)[:, None]).mean(0)
            error = (wave - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
            statistics.append(7 * torch.trapezoid(error, t))
    distances = [(z_SBD[v] - z_SBD.mean(0)).square().mean() for v in range(views)]
    invariance, normality = torch.stack(distances).mean(), torch.stack(statistics).mean()
    loss, terms = lejepa_loss(z_SBD, directions_DA, views, 0.2, knots=11, largest_frequency=2.0)
    torch.testing.assert_close(loss, 0.8 * invariance + 0.2 * normality, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms, {"invariance": invariance, "sigreg": normality}, rtol=1e-12, atol=0)


def test_the_sums_of_waves_have_the_right_gradient():
    angles = random(2, 4, 3).requires_grad_()
    multiples = angles * torch.arange(1, 6)[:, None, None, None]
    expected = torch.stack([multiples.cos().sum(2), multiples.sin().sum(2)])
    torch.testing.assert_close(_WaveSums.apply(angles, 5), expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(lambda x: _WaveSums.apply(x, 5), angles)


def test_the_backward_keeps_one_number_per_image_and_direction():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        sigreg(random(2, 64, 8).requires_grad_(), directions(8, 32), 17, 3.0)
    assert max(kept) == 2 * 64 * 32 and sum(kept) < 1.5 * max(kept) + 10 * 16 * 2 * 32


def test_a_gaussian_has_the_smallest_statistic():
    gaussian, directions_DA = random(40, 300, 4), directions(4, 64)

    def statistic(z_SBD):
        return sigreg(z_SBD, directions_DA, 33, 6.0).item()

    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)  # the mean over batches of Gaussian samples
    assert statistic(gaussian) == pytest.approx(expected, rel=0.15)
    for other in (1.5 * gaussian, gaussian / 1.5, gaussian + 0.5, gaussian[..., :1].expand_as(gaussian), 0 * gaussian):
        assert statistic(other) > 5 * expected


def test_directions_are_drawn_for_the_seed_and_the_step(method):
    def loss(**keys):
        return method(batch(**keys)).terms["sigreg"].item()

    assert loss(seed=3, step=5) == loss(seed=3, step=5)
    assert len({loss(seed=3, step=5), loss(seed=3, step=6), loss(seed=4, step=5)}) == 3


def test_local_views_follow_the_global_ones_and_lead_nobody():
    def invariance(local):
        z_SBD = torch.cat([random(2, 6, 4), local])
        return lejepa_loss(z_SBD, directions(4, 5), 2)[1]["invariance"]

    local = random(1, 6, 4, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(invariance(local), local)
    torch.testing.assert_close(gradient, 2 * (local - random(2, 6, 4).mean(0)) / (3 * 6 * 4))


def test_half_precision_embeddings_give_a_float32_loss():
    z_SBD = random(2, 32, 8)
    exact, _ = lejepa_loss(z_SBD, directions(8, 16), 2)
    loss, _ = lejepa_loss(z_SBD.bfloat16(), directions(8, 16).float(), 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [{"sigreg_weight": 1.1}, {"directions": 0}, {"knots": 1}, {"largest_frequency": 0.0}, {"projector_dim": "wide"}],
)
def test_a_wrong_setting_is_refused_by_name(settings):
    with pytest.raises(StrictDataclassError, match=next(iter(settings))):
        LeJEPAConfig(**settings)
