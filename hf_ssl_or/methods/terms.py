"""Terms that losses are made of: functions of embeddings `z_VND` of the global batch, all views at once.

Each is checked against its plain formula in the tests. None waits for the device, none costs V^2 where V will do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
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
    """Gives for each view the mean of the other views, at cost V."""
    return (z_VND.sum(0) - z_VND) / (z_VND.shape[0] - 1)


def standardise(z_VND: Tensor, eps: float = 1e-5) -> Tensor:
    """Gives every dimension of every view zero mean and unit (biased) variance over the batch."""
    var, mean = torch.var_mean(z_VND, dim=1, correction=0, keepdim=True)
    return (z_VND - mean) * (var + eps).rsqrt()


def product_split(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Splits A^T B into its diagonal and the sum of its squared off-diagonal elements.

    As ||A^T B||_F^2 = <A A^T, B B^T>, whichever of the D x D and the N x N matrices is smaller is made, not the other.

    Args:
        a_ND: A, (..., N, D).
        b_ND: B, the same shape; pass A itself for its Gram matrix.

    Returns:
        The diagonal, (..., D), and the sum of squares off it, (...).
    """
    if a_ND.shape[-2] < a_ND.shape[-1]:
        gram_a = a_ND @ a_ND.mT
        gram_b = gram_a if b_ND is a_ND else b_ND @ b_ND.mT
        total = torch.linalg.vecdot(gram_a.flatten(-2), gram_b.flatten(-2))
    else:
        product = (a_ND.mT @ b_ND).flatten(-2)
        total = torch.linalg.vecdot(product, product)
    diagonal_D = (a_ND * b_ND).sum(-2)
    return diagonal_D, total - diagonal_D.square().sum(-1)


def variance_hinge(variance: Tensor, eps: float = 1e-4) -> Tensor:
    """Means max(0, 1 - sqrt(variance + eps)): how far standard deviations are below 1 (VICReg, eq. 1-2)."""
    return F.relu(1 - (variance + eps).sqrt()).mean()


def negative_cosine(p_VND: Tensor, target_VND: Tensor) -> Tensor:
    """Means -cos(p_v, t_u) over images and ordered pairs of different views, at cost V.

    The cosine is linear in the normalised target, so the mean over pairs is the product with the mean of the other
    views' normalised targets.
    """
    others_VND = mean_of_others(F.normalize(target_VND, dim=-1))
    return -(F.normalize(p_VND, dim=-1) * others_VND).sum(-1).mean()


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
    views, images = z_VND.shape[:2]
    z_VND = F.normalize(z_VND, dim=-1) * temperature**-0.5
    positives_VUN = torch.einsum("vnd,und->vun", z_VND, z_VND)
    z_MD = z_VND.flatten(0, 1)
    same_image = torch.eye(images, dtype=torch.bool, device=z_MD.device).repeat(views, views)
    negatives_VN = (z_MD @ z_MD.T).masked_fill_(same_image, -torch.inf).logsumexp(1).view(views, images)
    losses_VUN = -F.logsigmoid(positives_VUN - negatives_VN[:, None])
    pairs = 1 - torch.eye(views, dtype=z_MD.dtype, device=z_MD.device)[..., None]
    count = views * (views - 1) * images
    cosine = (positives_VUN.detach() * pairs).sum() * (temperature / count)
    return (losses_VUN * pairs).sum() / count, cosine
