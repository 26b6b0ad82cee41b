"""W-MSE (Ermolov et al., ICML 2021): views agree after whitening, which leaves no way to collapse.

A random permutation splits the batch into sub-batches, the same for every view. Each view's projections are whitened
within each sub-batch, w(z) = L^-1 (z - mean) with L L^T their covariance (Cholesky), and scaled to unit length, y:

    loss = mean_{v < u} |y_v - y_u|^2 = 2 - 2 mean_{v != u} cos(w_v, w_u)

over images, pairs of views and permutations. Views are whitened apart, so that the rows of a covariance are of
different images. This is the paper's loss for any V. The cosine is linear in each unit vector, so y_v is compared with
the mean of the other views' y at cost V. Sub-batches are samples of the global batch, whatever the processes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, mean_of_others
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@settings
class WMSEConfig(ProjectorConfig):
    """Settings of W-MSE.

    Attributes:
        whitening_size: Images of a sub-batch, a divisor of the batch; None for the smallest one from 2 D on.
        whitening_iters: Number of permutations that the loss is averaged over.
        whitening_eps: Share of the identity that is mixed into each covariance.
    """

    projector_hidden: int | Literal["same"] = 1024  # solo-learn, CIFAR
    projector_dim: int = 64  # the paper and solo-learn, CIFAR
    projector_layers: int = 2
    whitening_size: int | None = None  # the paper and solo-learn, CIFAR: 128, twice D
    whitening_iters: int = 1  # the paper, CIFAR; its larger images: 4
    whitening_eps: float | int = 0.0  # the paper's code; solo-learn

    def validate_ranges(self) -> None:
        """Checks that sizes and shares make sense."""
        require_positive(self, "whitening_iters")
        if self.whitening_size is not None:
            require_positive(self, "whitening_size")
        if not 0 <= self.whitening_eps < 1:
            raise ValueError(f"whitening_eps: lies in [0, 1), not {self.whitening_eps}")


def sub_batch_size(size: int | None, dim: int, batch_size: int) -> int:
    """Finds how many images are whitened together, unless `size` says it.

    Raises:
        InputError: No sub-batches of that size, or too few images for the covariance to have full rank.
    """
    if size is None:
        size = next((size for size in range(2 * dim, batch_size + 1) if batch_size % size == 0), None)
    if size is None:
        raise InputError(
            f"training.batch_size: {batch_size} images are too few to whiten {dim} dimensions (method.projector_dim); "
            f"take at least {2 * dim} images, or fewer dimensions"
        )
    if batch_size % size:
        raise InputError(f"method.whitening_size: {size} does not divide training.batch_size, {batch_size}")
    if size <= dim:
        raise InputError(
            f"method.whitening_size: {size} images cannot whiten {dim} dimensions (method.projector_dim); "
            f"take more than {dim}, better {2 * dim}"
        )
    return size


@full_precision
def whiten(x_MD: Tensor, eps: float = 0.0) -> Tensor:
    """Returns M rows, (..., M, D), zero mean and, for `eps` 0, the identity as (unbiased) covariance.

    Where a covariance has no full rank all becomes NaN: to raise an error here would be to wait for the device.
    """
    images, dim = x_MD.shape[-2:]
    centered = x_MD - x_MD.mean(-2, keepdim=True)
    covariance = centered.mT @ centered / (images - 1)
    if eps > 0:
        covariance = (1 - eps) * covariance + eps * torch.eye(dim, dtype=x_MD.dtype, device=x_MD.device)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    factor = factor.masked_fill((failed > 0)[..., None, None], torch.nan)
    return torch.linalg.solve_triangular(factor, centered.mT, upper=False).mT


@full_precision
def wmse_loss(z_VND: Tensor, order_PN: Tensor, size: int, eps: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and the mean cosine of whitened views, from the projections of the global batch.

    Args:
        z_VND: The projections.
        order_PN: P permutations of the images, each cut into sub-batches.
        size: Images of a sub-batch, a divisor of N.
        eps: See `whiten`.
    """
    unit = F.normalize(whiten(z_VND[:, order_PN].unflatten(2, (-1, size)), eps), dim=-1)
    cosine = (unit * mean_of_others(unit)).sum(-1).mean()
    return 2 - 2 * cosine, {"cosine": cosine}


class WMSE(ProjectionMethod):
    """W-MSE for any number of views."""

    config_class = WMSEConfig
    views = (ViewSpec(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),)  # solo-learn, CIFAR
    citation = """@inproceedings{ermolov2021whitening,
  title = {Whitening for Self-Supervised Representation Learning},
  author = {Ermolov, Aleksandr and Siarohin, Aliaksandr and Sangineto, Enver and Sebe, Nicu},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}"""

    def prepare(self, *, num_views: int, batch_size: int, num_local_views: int = 0) -> None:
        """Also checks that sub-batches fit the batch."""
        super().prepare(num_views=num_views, batch_size=batch_size, num_local_views=num_local_views)
        sub_batch_size(self.config.whitening_size, self.projection_dim, batch_size)

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the whitened projections of the views."""
        size = sub_batch_size(self.config.whitening_size, self.projection_dim, z_VND.shape[1])
        order_PN = self.permutations(z_VND.shape[1], batch).to(z_VND.device, non_blocking=True)
        return wmse_loss(z_VND, order_PN, size, self.config.whitening_eps)

    def permutations(self, images: int, batch: MultiViewBatch) -> Tensor:
        """Samples this step's permutations of the global batch, (P, N), the same on all processes."""
        key = (batch.seed, batch.step, "sub-batches")
        return torch.from_numpy(
            np.stack([keyed_permutation(images, *key, turn) for turn in range(self.config.whitening_iters)])
        )
