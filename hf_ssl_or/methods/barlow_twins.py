"""Barlow Twins (Zbontar et al., ICML 2021): views agree in each dimension, and dimensions do not repeat each other.

With x_v the projections of view v, standardized over the batch of N images, and C(a, b) = a^T b / N:

    V = 2:  sum_i (C(x_1, x_2)_ii - 1)^2 + beta sum_{i != j} C(x_1, x_2)_ij^2
    V > 2:  mean_v sum_i (C(x_v, m)_ii - 1)^2 + beta sum_{i != j} C(m, m)_ij^2,  m the mean of the views

The second line is how the code of Ghosh et al. (NeurIPS 2024) takes more than two views: one product of matrices in
place of V (V - 1) / 2. With C(x_v, x_v)_ii = 1, its first sum is ((V - 1) / V)^2 times that of each view against the
mean of the other views, which at V = 2 would be the first line's. Its second sum, of an auto-correlation, is not the
first line's at V = 2 under any factor, so two views keep the published loss.

`standardize: per_view` is that of Zbontar et al.: each view by itself, with the biased variance plus 1e-5. The code of
Ghosh et al. standardizes all views together, two views too: `standardize: all_views` takes the mean and the unbiased
variance of each dimension over all V N projections, so it also matters how means and variances of the views differ.
Their network scales projections to unit length before that, which neither setting does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ASYMMETRIC_VIEWS, ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import batch_standardize, full_precision, product_split
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch

Standardize = Literal["per_view", "all_views"]


@settings
class BarlowTwinsConfig(ProjectorConfig):
    """Settings of Barlow Twins.

    Attributes:
        beta: Weight of the off-diagonal term; "auto" follows D, see `auto_beta`.
        scale: Factor on the whole loss; matters beside weight decay and penalties.
        standardize: Over which projections mean and variance are taken: of each view ("per_view"), or of all views
            together ("all_views", the code of Ghosh et al.).
    """

    projector_hidden: int | Literal["same"] = 256  # small projectors: hidden = D; solo-learn, CIFAR: 2048
    projector_dim: int = 256  # solo-learn, CIFAR: 2048; the paper, ImageNet: 8192
    projector_layers: int = 2  # the paper: 3
    beta: float | int | Literal["auto"] = "auto"  # the paper: 0.0051
    scale: float | int = 1.0  # solo-learn, with LARS: 0.1
    standardize: Standardize = "per_view"  # the paper; solo-learn; Ghosh et al.: all_views

    def validate_ranges(self) -> None:
        """Checks that sizes and weights make sense."""
        require_positive(self, "scale")
        if self.beta != "auto" and self.beta < 0:
            raise ValueError(f"beta: must be 'auto' or at least 0, not {self.beta}")


def auto_beta(dim: int) -> float:
    """Returns beta = c / D, c = 5 up to D = 512 and 2 above: what tuning found in Ghosh et al. (NeurIPS 2024)."""
    return (5 if dim <= 512 else 2) / dim


@full_precision
def barlow_twins_loss(
    z_VND: Tensor, beta: float, scale: float = 1.0, standardize: Standardize = "per_view"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its unweighted terms, from the projections of the global batch; see `BarlowTwinsConfig`."""
    views, images, dim = z_VND.shape
    if views == 2 and images < dim and standardize == "per_view":
        diagonal_VD, off_diagonal = _CrossCorrelation.apply(z_VND)
    else:
        x = batch_standardize(z_VND) if standardize == "per_view" else _standardize_together(z_VND)
        if views == 2:
            diagonal_VD, off_diagonal = product_split(*x)
        else:
            x_VND = torch.stack(x)
            mean_ND = x_VND.mean(0)
            diagonal_VD = (x_VND * mean_ND).sum(1)
            off_diagonal = product_split(mean_ND, mean_ND)[1]
    invariance = (diagonal_VD / images - 1).square().sum(-1).mean()
    redundancy = off_diagonal / images**2
    return scale * (invariance + beta * redundancy), {"invariance": invariance, "redundancy": redundancy}


def _standardize_together(z_VND: Tensor) -> tuple[Tensor, ...]:
    """Returns the views with zero mean and unit (unbiased) variance of every dimension over all of them."""
    std_D, mean_D = torch.std_mean(z_VND, dim=(0, 1))
    return ((z_VND - mean_D) / std_D.clamp_min(torch.finfo(z_VND.dtype).eps)).unbind()  # a constant stays finite


class _CrossCorrelation(torch.autograd.Function):
    """`product_split` of two standardized views by N x N matrices, for D > N: a block of dimensions at a time.

    Standardizing is cheap beside the products, so backward does it again: what is as large as the projections is their
    gradient alone.
    """

    block = 512  # dimensions: wide enough for fast products

    @staticmethod
    def forward(ctx: Any, z_VND: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        variance_V1D, mean_V1D = torch.var_mean(z_VND, dim=1, correction=0, keepdim=True)
        scale_V1D = (variance_V1D + eps).rsqrt()
        grams_VNN = z_VND.new_zeros(2, z_VND.shape[1], z_VND.shape[1])
        diagonal_D = torch.empty_like(mean_V1D[0, 0])
        for dims in _blocks(z_VND):
            x_VNC = (z_VND[..., dims] - mean_V1D[..., dims]).mul_(scale_V1D[..., dims])
            grams_VNN.baddbmm_(x_VNC, x_VNC.mT)
            diagonal_D[dims] = (x_VNC[0] * x_VNC[1]).sum(0)
        ctx.save_for_backward(z_VND, mean_V1D, scale_V1D, grams_VNN, diagonal_D)
        return diagonal_D, torch.dot(grams_VNN[0].flatten(), grams_VNN[1].flatten()) - diagonal_D.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: Tensor, grad_squares: Tensor) -> tuple[Tensor, None]:
        z_VND, mean_V1D, scale_V1D, grams_VNN, diagonal_D = ctx.saved_tensors
        products_VNN = grams_VNN.flip(0).mul_(2 * grad_squares)
        slope_D = grad_D - 2 * grad_squares * diagonal_D
        grad_VND = torch.empty_like(z_VND)
        for dims in _blocks(z_VND):
            x_VNC = (z_VND[..., dims] - mean_V1D[..., dims]).mul_(scale_V1D[..., dims])
            grad_VNC = (products_VNN @ x_VNC).addcmul_(x_VNC.flip(0), slope_D[dims])
            along_V1C = (grad_VNC * x_VNC).mean(1, keepdim=True)
            grad_VNC.sub_(grad_VNC.mean(1, keepdim=True)).addcmul_(x_VNC, along_V1C, value=-1)
            torch.mul(grad_VNC, scale_V1D[..., dims], out=grad_VND[..., dims])
        return grad_VND, None


def _blocks(z_VND: Tensor) -> Iterator[slice]:
    for start in range(0, z_VND.shape[-1], _CrossCorrelation.block):
        yield slice(start, start + _CrossCorrelation.block)


class BarlowTwins(ProjectionMethod):
    """Barlow Twins for any number of views.

    Example:
        method = BarlowTwins(encoder, projector_dim=256)
        method(batch).loss.backward()
    """

    config_class = BarlowTwinsConfig
    views = ASYMMETRIC_VIEWS
    citation = """@inproceedings{zbontar2021barlow,
  title = {Barlow Twins: Self-Supervised Learning via Redundancy Reduction},
  author = {Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, St{\\'e}phane},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}"""

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the projections of the views."""
        config = self.config
        beta = auto_beta(self.projection_dim) if config.beta == "auto" else config.beta
        return barlow_twins_loss(z_VND, beta, config.scale, config.standardize)
