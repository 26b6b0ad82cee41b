"""FroSSL (Skean et al., ECCV 2024): views agree, and the spectrum of each view's covariance is as flat as can be.

With u_v the projections of view v, each dimension scaled to unit length over the batch of N images, the trace-one
matrix C_v = u_v^T u_v / D, and m the mean of the views:

    loss = sum_v log |C_v|_F^2 + invariance_weight V / N sum_v |u_v - m|^2
         = sum_v log |C_v|_F^2 + invariance_weight / N sum_{v < u} |u_v - u_u|^2

The first line is the authors' current code, for any V at cost V (their factor D cancels that of the mean over
dimensions); the second says that V = 2 is the published loss of two views. There each dimension was centered before;
the current code, for all V, does not center. Minus log |C|_F^2 is an entropy of C's eigenvalues, at most log of their
number. |C|_F is that of u u^T as well, so the smaller of the D x D and the N x N matrices is made.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.methods.base import require_at_least
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, product_split
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@settings
class FroSSLConfig(ProjectorConfig):
    """Settings of FroSSL.

    Attributes:
        invariance_weight: Weight of the squared distance of views.
    """

    projector_hidden: int | Literal["same"] = 2048  # the authors' code, CIFAR
    projector_dim: int = 1024  # the authors' code, CIFAR
    projector_layers: int = 3  # the authors' code
    invariance_weight: float | int = 1.0  # the authors' code, CIFAR

    def validate_ranges(self) -> None:
        """Checks that the weight is not negative."""
        require_at_least(self, 0, "invariance_weight")


@full_precision
def frossl_loss(z_VND: Tensor, invariance_weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and its unweighted terms, from the projections of the global batch."""
    views, images = z_VND.shape[:2]
    unit_VND = F.normalize(z_VND, dim=1)
    diagonal_VD, off_diagonal_V = product_split(unit_VND, unit_VND)
    square_V = off_diagonal_V + diagonal_VD.square().sum(-1)
    trace_V = diagonal_VD.sum(-1)  # D, unless a dimension is all 0
    tiny = torch.finfo(trace_V.dtype).tiny  # a view that is all 0 has log 1, as one with all images in one place
    log_norm = (square_V.clamp_min(tiny).log() - trace_V.square().clamp_min(tiny).log()).sum()
    invariance = views / images * (unit_VND - unit_VND.mean(0)).square().sum()
    return log_norm + invariance_weight * invariance, {"log_norm": log_norm, "invariance": invariance}


class FroSSL(ProjectionMethod):
    """FroSSL for any number of views."""

    config_class = FroSSLConfig
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4),)  # the authors' code, CIFAR
    citation = """@inproceedings{skean2024frossl,
  title = {{FroSSL}: Frobenius Norm Minimization for Efficient Multiview Self-Supervised Learning},
  author = {Skean, Oscar and Dhakal, Aayush and Jacobs, Nathan and Sanchez Giraldo, Luis Gonzalo},
  booktitle = {European Conference on Computer Vision},
  year = {2024}
}"""

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the projections of the views."""
        return frossl_loss(z_VND, self.config.invariance_weight)
