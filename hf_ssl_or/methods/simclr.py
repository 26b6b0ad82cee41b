"""SimCLR (Chen et al., ICML 2020): an image's views are told apart from the views of all other images.

With s(a, b) = cos(a, b) / temperature, view v of image n as anchor and view u of it as positive:

    l(v, u, n) = -log( exp s(z_vn, z_un) / (exp s(z_vn, z_un) + sum_{w, m != n} exp s(z_vn, z_wm)) )

and the loss is the mean of l over images and ordered pairs v != u. Other positives are left out of the denominator, as
they are not to be pushed away, so V = 2 is the published NT-Xent. All pairs share one matrix of similarities.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_ssl_or.distributed import gather_batch
from hf_ssl_or.methods.base import SSLMethod, require_positive
from hf_ssl_or.methods.heads import ProjectionHead
from hf_ssl_or.methods.terms import full_precision, info_nce
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


@settings
class Config:
    """Settings of SimCLR.

    Attributes:
        projector_hidden: Width of the projector's hidden layers.
        projector_dim: D, the width of the projections.
        projector_layers: Number of linear layers.
        temperature: Divides the cosines.
    """

    projector_hidden: int = 2048  # solo-learn, CIFAR
    projector_dim: int = 256  # solo-learn, CIFAR; the paper: 128
    projector_layers: int = 2
    temperature: float | int = 0.2  # solo-learn, CIFAR; the paper, CIFAR: 0.5

    def validate_ranges(self) -> None:
        """Checks that sizes and the temperature make sense."""
        require_positive(self, "projector_hidden", "projector_dim", "projector_layers", "temperature")


@full_precision
def simclr_loss(z_VND: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Gives the loss, and the mean cosine of positive pairs, from the projections of the global batch."""
    loss, positive_cosine = info_nce(z_VND, temperature)
    return loss, {"positive_cosine": positive_cosine}


class Method(SSLMethod):
    """SimCLR for any number of views."""

    config_class = Config
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4),)  # the paper, CIFAR: colour strength 0.5, no blur
    citation = """@inproceedings{chen2020simple,
  title = {A Simple Framework for Contrastive Learning of Visual Representations},
  author = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}"""

    def __init__(self, encoder: nn.Module, config: Config, **sizes: Any) -> None:
        super().__init__(encoder, config, **sizes)
        self.projector = ProjectionHead(
            self.feature_size, config.projector_hidden, config.projector_dim, layers=config.projector_layers
        )

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares the projections of the views."""
        features_VBF = self.encode(batch.views_VBCHW)
        z_VND = gather_batch(self.projector(features_VBF), dim=1)
        return self.output(*simclr_loss(z_VND, self.config.temperature), features_VBF)
