from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from lightly.loss import MMCRLoss
from torch.nn import functional as F

from hf_ssl_or.methods.mmcr import MMCR, MMCRConfig, mmcr_loss, nuclear_norm, polar_factor
from hf_ssl_or.structures import MultiViewBatch

SHAPES = [(24, 24), (64, 16), (16, 64)]


def matrix(shape, singular_values):
    """A matrix with these singular values and random singular vectors, in float64."""
    left, right = (torch.linalg.qr(torch.randn(size, min(shape), dtype=torch.float64))[0] for size in shape)
    return left * singular_values @ right.mT


def spectra(rank):
    """Spectra from easy to hard, by name."""
    half = torch.arange(rank, dtype=torch.float64) < rank // 2
    return {
        "even": torch.ones(rank, dtype=torch.float64),
        "condition 1e4": torch.logspace(0, -4, rank, dtype=torch.float64),
        "condition 1e12": torch.logspace(3, -9, rank, dtype=torch.float64),
        "half rank": torch.linspace(1, 2, rank, dtype=torch.float64) * half,
        "rank 1": 5.0 * (torch.arange(rank) == 0).double(),
        "one and dust": torch.where(torch.arange(rank) == 0, 1.0, 1e-7).double(),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("spectrum", spectra(8))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nuclear_norm_is_that_of_the_singular_values(shape, spectrum, dtype, tolerance):
    torch.manual_seed(0)
    x = matrix(shape, spectra(min(shape))[spectrum]).to(dtype)
    expected = torch.linalg.matrix_norm(x.double(), ord="nuc")
    torch.testing.assert_close(nuclear_norm(x).double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nuclear_norm_grows_with_the_matrix_where_squares_leave_the_range_of_float32(shape, scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(shape, dtype=torch.float64)).float()
    expected = torch.linalg.matrix_norm(x.double(), ord="nuc")
    torch.testing.assert_close(nuclear_norm(x).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("spectrum", "tolerance"), [("even", 1e-12), ("condition 1e4", 1e-10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_the_polar_factor(shape, spectrum, tolerance):
    torch.manual_seed(1)
    x = matrix(shape, spectra(min(shape))[spectrum]).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(x), x)
    left, _, right = torch.linalg.svd(x.detach(), full_matrices=False)
    torch.testing.assert_close(gradient, left @ right, rtol=0, atol=tolerance)
    single = x.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(single), single)
    torch.testing.assert_close(gradient.double(), left @ right, rtol=0, atol=5e-6 if spectrum == "even" else 2e-3)


def test_where_the_rank_is_not_full_the_gradient_is_a_subgradient():
    """Equal to U V^T on the row and column space, of spectral norm 1 at most off it."""
    torch.manual_seed(2)
    x = matrix((20, 12), spectra(12)["half rank"]).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm(x), x)
    left, _, right = torch.linalg.svd(x.detach(), full_matrices=False)
    left, right = left[:, :6], right[:6]
    torch.testing.assert_close(left.mT @ gradient @ right.mT, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_norm(gradient, ord=2) < 1 + 1e-12


def test_batches_zeros_and_large_or_small_matrices():
    torch.manual_seed(3)
    x_BMK = torch.randn(5, 3, 7, dtype=torch.float64) * torch.tensor([1e-30, 1.0, 0.0, 1e30, 3.0])[:, None, None]
    expected = torch.linalg.matrix_norm(x_BMK, ord="nuc")
    torch.testing.assert_close(nuclear_norm(x_BMK), expected, rtol=1e-12, atol=0)
    zeros = torch.zeros(4, 6, requires_grad=True)
    nuclear_norm(zeros).backward()
    assert zeros.grad.count_nonzero() == 0
    assert not polar_factor(x_BMK.requires_grad_()).requires_grad


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("images", "dim"), [(12, 5), (5, 12)])
@pytest.mark.parametrize("local_weight", [0.0, 0.3])
def test_the_loss_is_the_papers_with_gradient(views, images, dim, local_weight):
    torch.manual_seed(views)
    z_VND = torch.randn(views, images, dim, dtype=torch.float64, requires_grad=True)
    loss, terms = mmcr_loss(z_VND, local_weight)
    z_NVD = F.normalize(z_VND, dim=-1).transpose(0, 1)
    local = torch.linalg.matrix_norm(z_NVD, ord="nuc").mean()
    centroids = torch.linalg.matrix_norm(z_NVD.mean(1), ord="nuc")
    expected = local_weight * local - centroids
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, z_VND), torch.autograd.grad(expected, z_VND)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(terms["centroid_norm"], centroids)
    assert ("local_norm" in terms) == (local_weight > 0)


@pytest.mark.parametrize("views", [2, 4])
def test_lightly_agrees_where_its_teacher_is_the_student(views):
    """Its views are ours twice, so each local norm is sqrt(2) times ours; it leaves the unit length to the caller."""
    torch.manual_seed(4)
    z_VND = torch.randn(views, 9, 6, dtype=torch.float64)
    z_NVD = F.normalize(z_VND, dim=-1).transpose(0, 1)
    expected = MMCRLoss(lmda=0.3 / 2**0.5)(z_NVD, z_NVD)
    torch.testing.assert_close(mmcr_loss(z_VND, 0.3)[0], expected, rtol=1e-12, atol=1e-12)


def test_the_best_centroids_are_orthogonal_unit_vectors():
    z_VND = 3 * torch.eye(8).expand(2, 8, 8)
    torch.testing.assert_close(mmcr_loss(z_VND)[0], torch.tensor(-8.0))
    assert mmcr_loss(z_VND + 0.3 * torch.randn(2, 8, 8))[0] > -8


def test_the_forward_takes_the_weight(tiny_encoder):
    method = MMCR(tiny_encoder(), projector_hidden=16, projector_dim=8, local_weight=0.5)
    batch = MultiViewBatch(views_VBCHW=torch.randn(3, 6, 3, 8, 8), index_B=torch.arange(6))
    output = method(batch)
    torch.testing.assert_close(
        output.loss.detach(), 0.5 * output.terms["local_norm"] - output.terms["centroid_norm"], rtol=1e-6, atol=0
    )


def test_a_negative_weight_is_refused_by_name():
    with pytest.raises(StrictDataclassError, match="local_weight: must be at least 0"):
        MMCRConfig(local_weight=-0.1)
