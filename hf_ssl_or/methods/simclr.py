"""SimCLR (Chen et al., ICML 2020): an image's views are told apart from the views of all other images.

With s(a, b) = cos(a, b) / temperature, view v of image n as anchor and view u of it as positive:

    l(v, u, n) = -log( exp s(z_vn, z_un) / (exp s(z_vn, z_un) + sum_{w, m != n} exp s(z_vn, z_wm)) )

and the loss is the mean of l over images and ordered pairs v != u. Other positives are left out of the denominator, as
they are not to be pushed away, so V = 2 is the published NT-Xent. All pairs share one matrix of similarities.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, info_nce
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, ViewSpec


@settings
class SimCLRConfig(ProjectorConfig):
    """Settings of SimCLR.

    Attributes:
        temperature: Divides the cosines.
    """

    projector_hidden: int | Literal["same"] = 2048  # solo-learn, CIFAR
    projector_dim: int = 256  # solo-learn, CIFAR; the paper: 128
    projector_layers: int = 2
    temperature: float | int = 0.2  # solo-learn, CIFAR; the paper, CIFAR: 0.5

    def validate_ranges(self) -> None:
        """Checks that sizes and the temperature make sense."""
        require_positive(self, "temperature")


@full_precision
def simclr_loss(z_VND: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and the mean cosine of positive pairs, from the projections of the global batch."""
    loss, positive_cosine = info_nce(z_VND, temperature)
    return loss, {"positive_cosine": positive_cosine}


class SimCLR(ProjectionMethod):
    """SimCLR for any number of views."""

    config_class = SimCLRConfig
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4),)  # the paper, CIFAR: color strength 0.5, no blur
    citation = """@inproceedings{chen2020simple,
  title = {A Simple Framework for Contrastive Learning of Visual Representations},
  author = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}"""

    def loss(self, z_VND: Tensor, batch: MultiViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares the projections of the views."""
        return simclr_loss(z_VND, self.config.temperature)
