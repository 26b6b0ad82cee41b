"""VIbCReg (Lee and Aune, 2021): VICReg with correlations for covariances, behind a projector that whitens.

For two batches a and b of N projections, with `var` (unbiased) and the correlation `corr` over the batch:

    L(a, b) = 25 mean (a - b)^2 + 25 (h(a) + h(b)) + 200 (c(a) + c(b))
    h(a) = mean_i max(0, 1 - sqrt(var(a)_i + 1e-4)),   c(a) = sum_{i != j} corr(a)_ij^2 / D^2

V views: the mean over v of L(z_v, mean of the other views), as for VICReg. Two views are each other's "others", and L
is symmetric, so V = 2 is the published loss. The cost is V such losses in place of V^2.

The projector's last layer is IterNorm, which whitens groups of dimensions over the batch, each view by itself as
published. Here it takes the gathered projections: the global batch, and nothing of its own to send.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.errors import InputError
from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ProjectionMethod
from hf_ssl_or.methods.functional import full_precision, mean_of_others, product_split, variance_hinge
from hf_ssl_or.methods.vicreg import VICRegConfig
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@settings
class VIbCRegConfig(VICRegConfig):
    """Settings of VIbCReg: those of VICReg, and of IterNorm.

    Attributes:
        iternorm: Whether IterNorm whitens the projections.
        iternorm_group: How many dimensions are whitened together, a divisor of D.
    """

    covariance_weight: float | int = 200.0  # of correlations; the authors' code; solo-learn, CIFAR
    iternorm: bool = True
    iternorm_group: int = 32  # solo-learn, CIFAR: 64 groups of D = 2048

    def validate_iternorm(self) -> None:
        """Checks that groups fill the projections."""
        require_positive(self, "iternorm_group")
        if self.iternorm and self.projector_dim % self.iternorm_group:
            raise ValueError(
                f"iternorm_group: must divide projector_dim, {self.projector_dim}, not {self.iternorm_group}"
            )


@full_precision
def vibcreg_loss(
    z_VND: Tensor, invariance_weight: float = 25.0, variance_weight: float = 25.0, covariance_weight: float = 200.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its unweighted terms, from the projections of the global batch."""
    images, dim = z_VND.shape[1:]
    others_VND = mean_of_others(z_VND)
    invariance = (z_VND - others_VND).square().mean()
    batches = z_VND if len(z_VND) == 2 else torch.cat([z_VND, others_VND])  # two views are each other's "others"
    centered = batches - batches.mean(1, keepdim=True)
    variance = 2 * variance_hinge(centered.square().sum(1) / (images - 1))
    unit = F.normalize(centered, dim=1)
    covariance = 2 * product_split(unit, unit)[1].mean() / dim**2
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}


@full_precision
def newton_whitening(x_VND: Tensor, group: int, steps: int = 5, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Approaches covariance^(-1/2) of each view and group of dimensions by Newton's method, without decomposition.

    Huang et al., "Iterative normalization", CVPR 2019, alg. 1: the covariance (biased, plus eps) over its trace has
    eigenvalues in (0, 1], for which P <- (3 P - P^3 covariance) / 2 converges from the identity.

    Args:
        x_VND: The batch.
        group: C, how many dimensions are whitened together; G = D / C.
        steps: Newton steps.
        eps: Is added to the variances.

    Returns:
        The means, (V, G, C, 1), and the whitening matrices, (V, G, C, C).
    """
    x_VGCN = x_VND.mT.unflatten(1, (-1, group))
    mean = x_VGCN.mean(-1, keepdim=True)
    centered = x_VGCN - mean
    identity = torch.eye(group, dtype=x_VND.dtype, device=x_VND.device)
    covariance = centered @ centered.mT / x_VND.shape[1] + eps * identity
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scaled, power = covariance / trace, identity
    for _ in range(steps):
        power = 1.5 * power - 0.5 * (power @ power @ power @ scaled)
    return mean, power * trace.rsqrt()


@full_precision
def apply_whitening(x_VND: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """Returns matrix (x - mean) for every group of dimensions, (V, N, D)."""
    x_VGCN = x_VND.mT.unflatten(1, (-1, mean.shape[-2]))
    return (matrix @ (x_VGCN - mean)).flatten(1, 2).mT


class IterNorm(nn.Module):
    """Whitens groups of dimensions over the batch, each view by itself; then scales and shifts each dimension.

    Unlike batch normalization it takes the global batch, gathered before: all processes compute the same.

    Args:
        dim: D, the width of the input.
        group: How many dimensions are whitened together, a divisor of D.
        momentum: Weight of a view's statistics in the running ones, which evaluation uses.
    """

    running_mean: Tensor
    running_matrix: Tensor

    def __init__(self, dim: int, group: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.group, self.momentum = group, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim // group, group, 1))
        self.register_buffer("running_matrix", torch.eye(group).repeat(dim // group, 1, 1))

    def forward(self, z_VND: Tensor) -> Tensor:
        """Whitens (V, N, D)."""
        mean, matrix = self.running_mean, self.running_matrix
        if self.training:
            mean, matrix = newton_whitening(z_VND, self.group)
            self._update_running(mean, matrix)
        return apply_whitening(z_VND, mean, matrix) * self.weight + self.bias

    @torch.no_grad()
    def _update_running(self, mean: Tensor, matrix: Tensor) -> None:
        for mean_GC1, matrix_GCC in zip(mean, matrix, strict=True):
            self.running_mean.lerp_(mean_GC1.to(self.running_mean.dtype), self.momentum)
            self.running_matrix.lerp_(matrix_GCC.to(self.running_matrix.dtype), self.momentum)


class VIbCReg(ProjectionMethod):
    """VIbCReg for any number of views; feature whitening, where asked for, sees what comes before IterNorm."""

    config_class = VIbCRegConfig
    views = (ViewSpec(solarize=0.1),)  # solo-learn, CIFAR
    citation = """@article{lee2021vibcreg,
  title = {{VIbCReg}: Variance-Invariance-better-Covariance Regularization for Self-Supervised Learning on Time
           Series},
  author = {Lee, Daesoo and Aune, Erlend},
  journal = {arXiv preprint arXiv:2109.00783},
  year = {2021}
}"""

    def build_heads(self) -> None:
        """Adds IterNorm."""
        super().build_heads()
        config = self.config
        if config.iternorm and self.projection_dim % config.iternorm_group:
            raise InputError(
                f"method.iternorm_group: must divide the encoder's width, {self.projection_dim}, "
                f"not {config.iternorm_group}"
            )
        self.norm = IterNorm(self.projection_dim, config.iternorm_group) if config.iternorm else nn.Identity()

    def build_projector(self) -> nn.Module:
        """Builds solo-learn's projector, with GELU."""
        return self.projection_head(gelu=True)

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the whitened projections of the views."""
        config = self.config
        weights = config.invariance_weight, config.variance_weight, config.covariance_weight
        return vibcreg_loss(self.norm(z_VND), *weights)
