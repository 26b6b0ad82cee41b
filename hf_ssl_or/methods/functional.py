"""Building blocks of losses: functions of embeddings `z_VND` of the global batch, all views at once.

Each is checked against its plain formula in the tests. None waits for the device, none costs V^2 where V will do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_ssl_or.distributed import sum_over_ranks, world_size

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorates a loss to run outside autocast, with half-precision embeddings turned to float32 (float64 stays)."""

    @functools.wraps(loss)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = cast(Tensor, args[0])
        with torch.autocast(first.device.type, enabled=False):
            return loss(*(_at_least_float32(arg) for arg in args), **kwargs)  # type: ignore[arg-type]

    return wrapped


def _at_least_float32(value: object) -> object:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return cast(Tensor, value).float() if half else value


def global_mean(local_mean: Tensor) -> Tensor:
    """Averages each process's mean over its own images, with gradient: the mean over the global batch."""
    return sum_over_ranks(local_mean) / world_size()


def mean_of_others(z_VND: Tensor) -> Tensor:
    """Returns for each view the mean of the other views, at cost V."""
    views = len(z_VND)
    return z_VND.flip(0) if views == 2 else (z_VND.sum(0) - z_VND) / (views - 1)


def batch_standardize(z_VND: Tensor, eps: float = 1e-5) -> tuple[Tensor, ...]:
    """Returns for each view (N, D) with zero mean and unit (biased) variance of every dimension over the batch."""
    return tuple(F.batch_norm(z_ND, None, None, training=True, eps=eps) for z_ND in z_VND)


def product_split(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Splits A^T B into its diagonal and the sum of its squared off-diagonal elements.

    As ||A^T B||_F^2 = <A A^T, B B^T>, whichever of the D x D and the N x N matrices is smaller is made, not the other.

    Args:
        a_ND: A, (..., N, D).
        b_ND: B, the same shape; pass A itself for its Gram matrix.

    Returns:
        The diagonal, (..., D), and the sum of squares off it, (...).
    """
    split = _SplitByGrams if a_ND.shape[-2] < a_ND.shape[-1] else _SplitByProduct
    return split.apply(a_ND, b_ND)


class _SplitByGrams(torch.autograd.Function):
    """`product_split` by N x N matrices; they are symmetric, so backward needs half of the products autograd makes."""

    @staticmethod
    def forward(ctx: Any, a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
        ctx.same = b_ND is a_ND
        a_NN = a_ND @ a_ND.mT
        b_NN = a_NN if ctx.same else b_ND @ b_ND.mT
        diagonal_D = (a_ND * b_ND).sum(-2)
        ctx.save_for_backward(a_ND, b_ND, a_NN, b_NN, diagonal_D)
        total = torch.linalg.vecdot(a_NN.flatten(-2), b_NN.flatten(-2))
        return diagonal_D, total - diagonal_D.square().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor, grad_squares: Tensor) -> tuple[Tensor, Tensor | None]:
        a_ND, b_ND, a_NN, b_NN, diagonal_D = ctx.saved_tensors
        scale = 2 * grad_squares[..., None, None]
        slope_1D = grad_D[..., None, :] - scale * diagonal_D[..., None, :]
        grad_a = ((scale * b_NN) @ a_ND).addcmul_(b_ND, slope_1D)
        if ctx.same:
            return grad_a.mul_(2), None
        return grad_a, ((scale * a_NN) @ b_ND).addcmul_(a_ND, slope_1D)


class _SplitByProduct(torch.autograd.Function):
    """`product_split` by A^T B; where it is symmetric, backward is one product, where autograd makes two."""

    @staticmethod
    def forward(ctx: Any, a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
        ctx.same = b_ND is a_ND
        product_DD = a_ND.mT @ b_ND
        diagonal_D = product_DD.diagonal(dim1=-2, dim2=-1).clone()
        product_DD.diagonal(dim1=-2, dim2=-1).zero_()
        ctx.save_for_backward(a_ND, b_ND, product_DD)
        return diagonal_D, product_DD.square().sum((-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor, grad_squares: Tensor) -> tuple[Tensor, Tensor | None]:
        a_ND, b_ND, product_DD = ctx.saved_tensors
        grad_DD = 2 * grad_squares[..., None, None] * product_DD
        grad_DD.diagonal(dim1=-2, dim2=-1).copy_(grad_D)
        grad_b = a_ND @ grad_DD
        return (grad_b.mul_(2), None) if ctx.same else (b_ND @ grad_DD.mT, grad_b)


def variance_hinge(variance: Tensor, eps: float = 1e-4) -> Tensor:
    """Returns the mean of max(0, 1 - sqrt(variance + eps)), by which std is below 1 (VICReg, eq. 1-2)."""
    return F.relu(1 - (variance + eps).sqrt()).mean()


def negative_cosine(p_VND: Tensor, target_VND: Tensor) -> Tensor:
    """Returns the mean of -cos(p_v, t_u) over images and ordered pairs of different views, at cost V.

    The cosine is linear in the normalized target, so the mean over pairs is the product with the mean of the other
    views' normalized targets. Targets get no gradient.
    """
    lengths_VN1 = torch.linalg.vector_norm(target_VND, dim=-1, keepdim=True).clamp_min(1e-12)
    return -_ProductWithUnit.apply(p_VND, mean_of_others(target_VND.detach() / lengths_VN1)).mean()


class _ProductWithUnit(torch.autograd.Function):
    """<p / |p|, m> for constants m, (..., D) to (...): p / |p| is never made, forward or backward."""

    @staticmethod
    def forward(ctx: Any, p_VND: Tensor, m_VND: Tensor) -> Tensor:
        shrink_VN1 = torch.linalg.vector_norm(p_VND, dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()
        product_VN1 = torch.linalg.vecdot(p_VND, m_VND).unsqueeze(-1) * shrink_VN1
        ctx.save_for_backward(p_VND, m_VND, product_VN1, shrink_VN1)
        return product_VN1.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VN: Tensor) -> tuple[Tensor, None]:
        p_VND, m_VND, product_VN1, shrink_VN1 = ctx.saved_tensors
        slope_VN1 = grad_VN.unsqueeze(-1) * shrink_VN1
        return (m_VND * slope_VN1).addcmul_(p_VND, slope_VN1 * product_VN1 * shrink_VN1, value=-1), None


def contrast(query_VBD: Tensor, key_VND: Tensor, temperature: float, first: int = 0) -> Tensor:
    """InfoNCE of queries against the keys of another view: which of its N images is the query's?

    The mean over ordered pairs (v, u != v) and images of the cross-entropy of cos(query_vb, key_un) / temperature over
    the N keys of view u. Two views with other projections as keys are half of MoCo v3's loss (ICCV 2021, alg. 1).

    Args:
        query_VBD: Queries, of any length; all of the global batch's or this process's.
        key_VND: Keys of the global batch, of any length.
        temperature: Above 0.
        first: Place among the N images of the queries' first image.
    """
    views, images = query_VBD.shape[:2]
    query_VBD, key_VND = F.normalize(query_VBD, dim=-1) / temperature, F.normalize(key_VND, dim=-1)
    others_OVND = torch.stack([key_VND.roll(-shift, 0) for shift in range(1, views)])
    similarities = (query_VBD @ others_OVND.mT).flatten(0, 2)
    places_B = torch.arange(first, first + images, device=key_VND.device)
    return F.cross_entropy(similarities, places_B.repeat(views * (views - 1)))


def info_nce(z_VND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE with every other view of the image as a positive, and all views of other images as negatives.

    With s = cos / temperature, the mean over ordered pairs (v, u != v) and images n of
    -log(exp s(vn, un) / (exp s(vn, un) + sum over w and m != n of exp s(vn, wm))). One denominator holds one positive,
    so two views give NT-Xent (SimCLR, Chen et al., ICML 2020, eq. 1).

    Args:
        z_VND: Embeddings, of any length.
        temperature: Above 0.

    Returns:
        The loss, and the mean cosine of positive pairs.
    """
    positives_VUN, negatives_VN = similarities(z_VND, temperature)
    loss = mean_of_pairs(-F.logsigmoid(positives_VUN - negatives_VN[:, None]))
    return loss, mean_of_pairs(positives_VUN.detach()) * temperature


def mean_of_pairs(x_VUN: Tensor) -> Tensor:
    """Returns the mean over images and ordered pairs of different views."""
    views, _, images = x_VUN.shape
    different_VU = 1 - torch.eye(views, dtype=x_VUN.dtype, device=x_VUN.device)
    return (x_VUN.sum(-1) * different_VU).sum() / (views * (views - 1) * images)


def similarities(z_VND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compares each view of each image with the views of its own image, and with all views of all others.

    Args:
        z_VND: Embeddings, of any length.
        temperature: Above 0, divides the cosines to give the similarities s.

    Returns:
        s(vn, un) for all views v and u, (V, V, N), and the log of the sum over w and m != n of exp s(vn, wm), (V, N).
    """
    return _Similarities.apply(z_VND, temperature)


class _Similarities(torch.autograd.Function):
    """By hand, with M = V N: one M x M matrix is kept, and backward is one product of matrices in place of two."""

    @staticmethod
    def forward(ctx: Any, z_VND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        views, images = z_VND.shape[:2]
        z_MD = z_VND.flatten(0, 1)
        scale_M1 = temperature**-0.5 / torch.linalg.vector_norm(z_MD, dim=1, keepdim=True).clamp_min(1e-12)
        x_MD = z_MD * scale_M1
        s_MM = x_MD @ x_MD.T
        positives_VUN = _of_one_image(s_MM, views, images).clone()
        _of_one_image(s_MM, views, images).fill_(-torch.inf)
        largest_M1 = s_MM.amax(1, keepdim=True)
        s_MM.sub_(largest_M1).exp_()
        total_M1 = s_MM.sum(1, keepdim=True)
        ctx.save_for_backward(x_MD, scale_M1, s_MM, total_M1)
        ctx.temperature = temperature
        return positives_VUN, (largest_M1 + total_M1.log()).view(views, images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_VUN: Tensor, grad_VN: Tensor) -> tuple[Tensor, None]:
        x_MD, scale_M1, s_MM, total_M1 = ctx.saved_tensors
        grad_MM = s_MM * (grad_VN.reshape(-1, 1) / total_M1)
        _of_one_image(grad_MM, *grad_VN.shape).copy_(grad_VUN)
        grad_MD = (grad_MM + grad_MM.T) @ x_MD
        along_M1 = ctx.temperature * (grad_MD * x_MD).sum(1, keepdim=True)  # what would only change the length
        return grad_MD.addcmul_(x_MD, along_M1, value=-1).mul_(scale_M1).view(*grad_VN.shape, -1), None


def _of_one_image(s_MM: Tensor, views: int, images: int) -> Tensor:
    """Views the elements whose row and column are of the same image, (V, V, N)."""
    return s_MM.view(views, images, views, images).diagonal(dim1=1, dim2=3)
