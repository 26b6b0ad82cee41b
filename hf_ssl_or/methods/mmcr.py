"""MMCR (Yerxa et al., NeurIPS 2023): the mean views of images fill as many directions as they can, and fill them well.

With z_vn the projections scaled to unit length, c_n = mean_v z_vn the centroid of image n's views, C the N x D matrix
of centroids, Z_n the V x D matrix of image n's views and |.|_* the nuclear norm (the sum of singular values):

    loss = -|C|_* + local_weight mean_n |Z_n|_*

|C|_* is largest where centroids are long, so views agree, and orthogonal. The loss is the published one for every V,
and costs V: views meet in their centroids alone, so only those are gathered from the other processes.

The norm is <C, P> for the polar factor P = U V^T of C = U S V^T, and P, held constant, is also its gradient: it is the
matrix of spectral norm 1 that <C, P> is largest for. `polar_factor` finds it by products of matrices, as a singular
value decomposition would wait for the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.distributed import gather_batch
from hf_ssl_or.methods.base import require_at_least
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, global_mean
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


@settings
class MMCRConfig(ProjectorConfig):
    """Settings of MMCR.

    Attributes:
        local_weight: Weight of the mean nuclear norm of each image's views (lambda in the paper).
    """

    projector_hidden: int | Literal["same"] = 512  # the authors' code, CIFAR
    projector_dim: int = 128  # the authors' code, CIFAR
    projector_layers: int = 2  # the authors' code, CIFAR
    local_weight: float | int = 0.0  # the authors' code, CIFAR and ImageNet

    def validate_ranges(self) -> None:
        """Checks that the weight is not negative."""
        require_at_least(self, 0, "local_weight")


@torch.no_grad()
def polar_factor(x: Tensor) -> Tensor:
    """Returns U V^T of the singular value decomposition x = U S V^T, without gradient and without decomposition.

    Each step maps singular values s in [low, 1] by 1.5 (a s) - 0.5 (a s)^3 into [low', 1] with the largest low'
    (Chen and Chow, "A stable scaling of Newton-Schulz", 2014): 24 steps in float32, 46 in float64. Their bound on `a`
    keeps s = 1 at 0.1, clear of the rounding errors of a step. A singular value that is 0 but for the precision of x
    may end anywhere in [0, 1], which changes U V^T but not <x, U V^T>.

    Args:
        x: (..., M, K), best with M <= K: M x M matrices are made.
    """
    limits = torch.finfo(x.dtype)
    y = x.reshape(-1, *x.shape[-2:])
    y = y / y.abs().amax((-2, -1), keepdim=True).clamp_min(limits.tiny)  # else the squares of small numbers vanish
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_min(1)
    low = limits.eps / 16
    while 1 - low > 2 * limits.eps:
        a = min(math.sqrt(3 / (1 + low + low**2)), 1.69770248526)
        y = torch.baddbmm(y, y @ y.mT, y, beta=1.5 * a, alpha=-0.5 * a**3)
        low = 1.5 * (a * low) - 0.5 * (a * low) ** 3
    return y.view_as(x)


@full_precision
def nuclear_norm(x: Tensor) -> Tensor:
    """Sums the singular values of every matrix of (..., M, K), with gradient; see `polar_factor`."""
    if x.shape[-2] > x.shape[-1]:
        x = x.mT
    return (x * polar_factor(x)).sum((-2, -1))


@full_precision
def mmcr_loss(z_VBD: Tensor, local_weight: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of the global batch and its unweighted terms, from this process's projections."""
    unit_VBD = F.normalize(z_VBD, dim=-1)
    centroid_norm = nuclear_norm(gather_batch(unit_VBD.mean(0)))
    if local_weight == 0:
        return -centroid_norm, {"centroid_norm": centroid_norm}
    local_norm = global_mean(nuclear_norm(unit_VBD.transpose(0, 1)).mean())
    return local_weight * local_norm - centroid_norm, {"centroid_norm": centroid_norm, "local_norm": local_norm}


class MMCR(ProjectionMethod):
    """MMCR for any number of views."""

    config_class = MMCRConfig
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4),)  # the authors' code, CIFAR
    citation = """@inproceedings{yerxa2023learning,
  title = {Learning Efficient Coding of Natural Images with Maximum Manifold Capacity Representations},
  author = {Yerxa, Thomas and Kuang, Yilun and Simoncelli, Eero and Chung, SueYeon},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares the centroids of the global batch."""
        z_VBD = self.projector(self.encode(batch.views_VBCHW))
        loss, terms = mmcr_loss(z_VBD, self.config.local_weight)
        return self.output(loss, terms, z_VBD)
