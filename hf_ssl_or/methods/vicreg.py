"""VICReg (Bardes et al., ICLR 2022): views agree, each dimension varies, and dimensions do not covary.

For two batches a and b of N projections, with `var` and `cov` over the batch (unbiased):

    L(a, b) = 25 mean (a - b)^2 + 25 (h(a) + h(b)) / 2 + 1 (c(a) + c(b))
    h(a) = mean_i max(0, 1 - sqrt(var(a)_i + 1e-4)),   c(a) = sum_{i != j} cov(a)_ij^2 / D

V views: the mean over v of L(z_v, mean of the other views), as in the code of Ghosh et al. (NeurIPS 2024), but for the
1e-4, which it leaves out. Two views give the mean of L(z_1, z_2) and L(z_2, z_1), which is the published loss. The
cost is V such losses in place of V^2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.methods.base import require_at_least
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, mean_of_others, product_split, variance_hinge
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@settings
class VICRegConfig(ProjectorConfig):
    """Settings of VICReg.

    Attributes:
        invariance_weight: Weight of the squared distance of views.
        variance_weight: Weight of the hinge on standard deviations.
        covariance_weight: Weight of the squared covariances.
    """

    projector_hidden: int | Literal["same"] = 2048  # solo-learn, CIFAR; the paper, ImageNet: 8192
    projector_dim: int = 2048  # solo-learn, CIFAR; Ghosh et al.: 256
    projector_layers: int = 3
    invariance_weight: float | int = 25.0
    variance_weight: float | int = 25.0
    covariance_weight: float | int = 1.0

    def validate_ranges(self) -> None:
        """Checks that sizes and weights make sense."""
        require_at_least(self, 0, "invariance_weight", "variance_weight", "covariance_weight")


@full_precision
def vicreg_loss(
    z_VND: Tensor, invariance_weight: float = 25.0, variance_weight: float = 25.0, covariance_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its unweighted terms, from the projections of the global batch."""
    views, images, dim = z_VND.shape
    constant_VND = z_VND.detach()  # for means: the gradients below sum to 0 over views and over images
    to_others = views / (views - 1)  # times as far as to the mean of all
    invariance = to_others**2 * F.mse_loss(z_VND, constant_VND.mean(0).expand_as(z_VND))
    centered = z_VND - constant_VND.mean(1, keepdim=True)
    if views > 2:  # two views are each other's "others"
        centered = torch.cat([centered, mean_of_others(centered)])
    squares, off_diagonal = product_split(centered, centered)
    variance = variance_hinge(squares / (images - 1))
    covariance = 2 * off_diagonal.mean() / ((images - 1) ** 2 * dim)
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}


class VICReg(ProjectionMethod):
    """VICReg for any number of views."""

    config_class = VICRegConfig
    views = (ViewSpec(solarize=0.1),)  # solo-learn, CIFAR
    citation = """@inproceedings{bardes2022vicreg,
  title = {{VICReg}: Variance-Invariance-Covariance Regularization for Self-Supervised Learning},
  author = {Bardes, Adrien and Ponce, Jean and LeCun, Yann},
  booktitle = {International Conference on Learning Representations},
  year = {2022}
}"""

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the projections of the views."""
        config = self.config
        return vicreg_loss(z_VND, config.invariance_weight, config.variance_weight, config.covariance_weight)
