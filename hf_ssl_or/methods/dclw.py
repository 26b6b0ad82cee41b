"""DCLW (Yeh et al., ECCV 2022): DCL that pulls more on the positive pairs that are still far apart.

With s(a, b) = cos(a, b) / temperature, view v of image n as anchor and view u of it as positive:

    l(v, u, n) = -w(v, u, n) s(z_vn, z_un) + log sum_{w, m != n} exp s(z_vn, z_wm)
    w(v, u, n) = 2 - exp(cos(z_vn, z_un) / sigma) / mean_m exp(cos(z_vm, z_um) / sigma)

and the loss is the mean of l over images and ordered pairs v != u. The weights, negated von Mises-Fisher densities,
have no gradient; those of one pair of views have mean 1 over the global batch. Each pair of views has weights of its
own, so V = 2 is the published loss. As in DCL all pairs share one matrix of similarities.
"""

from __future__ import annotations

from torch import Tensor

from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.dcl import DCL, DCLConfig
from hf_ssl_or.methods.functional import full_precision, mean_of_pairs, similarities
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch


@settings
class DCLWConfig(DCLConfig):
    """Settings of DCLW.

    Attributes:
        sigma: Divides the cosines in the weights; the smaller, the more the weights differ.
    """

    sigma: float | int = 0.5  # lightly, CIFAR

    def validate_sigma(self) -> None:
        """Checks that sigma makes sense."""
        require_positive(self, "sigma")


@full_precision
def dclw_loss(z_VND: Tensor, temperature: float, sigma: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and the mean cosine of positive pairs, from the projections of the global batch."""
    positives_VUN, negatives_VN = similarities(z_VND, temperature)
    cosine_VUN = temperature * positives_VUN.detach()
    weight_VUN = 2 - z_VND.shape[1] * (cosine_VUN / sigma).softmax(-1)
    loss = negatives_VN.mean() - mean_of_pairs(weight_VUN * positives_VUN)
    return loss, {"positive_cosine": mean_of_pairs(cosine_VUN)}


class DCLW(DCL):
    """DCLW for any number of views."""

    config_class = DCLWConfig

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the projections of the views."""
        return dclw_loss(z_VND, self.config.temperature, self.config.sigma)
