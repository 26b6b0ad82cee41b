"""MoCo v3 (Chen et al., ICCV 2021): each view's prediction finds its image's key among the keys of the batch.

With p_v the predictions of the student, k_u the projections of a momentum teacher for view u, and T the temperature:

    l(v, u, n) = -2 T log( exp(cos(p_vn, k_un) / T) / sum_m exp(cos(p_vn, k_um) / T) )

and the loss is twice the mean of l over images and ordered pairs v != u. The factor 2 makes V = 2 the published sum of
both directions; the factor 2 T, also published, makes gradients depend less on T.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import gather_batch, rank
from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ASYMMETRIC_VIEWS, MomentumConfig, MomentumMethod
from hf_ssl_or.methods.functional import contrast, full_precision, global_mean, negative_cosine
from hf_ssl_or.methods.heads import PredictionHead
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput


@settings
class MoCoV3Config(MomentumConfig):
    """Settings of MoCo v3.

    Attributes:
        temperature: Divides the cosines.
        predictor_hidden: Width of the predictor's hidden layer.
        predictor_norm: Batch normalization at the predictor's end too.
    """

    projector_hidden: int | Literal["same"] = 4096  # the paper; solo-learn, CIFAR
    projector_dim: int = 256  # the paper; solo-learn, CIFAR
    projector_layers: int = 2  # the authors' code and solo-learn, ResNet; vision transformers: 3
    momentum: float | int = 0.99  # solo-learn, CIFAR; the authors' code, but for 1000 epochs: 0.996
    temperature: float | int = 0.2  # solo-learn, CIFAR; the authors' code: 0.2 with vision transformers, 1 with ResNet
    predictor_hidden: int = 4096  # the paper; solo-learn, CIFAR
    predictor_norm: bool = False  # the authors' code and solo-learn, ResNet; vision transformers: True

    def validate_ranges(self) -> None:
        """Checks that the temperature and the predictor make sense."""
        require_positive(self, "temperature", "predictor_hidden")


@full_precision
def moco_v3_loss(p_VBD: Tensor, key_VND: Tensor, temperature: float, first: int = 0) -> Tensor:
    """Returns the loss from predictions, whose first image is the keys' image `first`; shards can be averaged."""
    return 4 * temperature * contrast(p_VBD, key_VND, temperature, first)


class MoCoV3(MomentumMethod):
    """MoCo v3 for any number of views."""

    config_class = MoCoV3Config
    views = ASYMMETRIC_VIEWS
    citation = """@inproceedings{chen2021empirical,
  title = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {International Conference on Computer Vision},
  year = {2021}
}"""

    def build_heads(self) -> None:
        """Adds the predictor."""
        super().build_heads()
        config = self.config
        self.predictor = PredictionHead(self.projection_dim, config.predictor_hidden, last_norm=config.predictor_norm)

    def build_projector(self) -> nn.Module:
        """Builds the projector, with batch normalization at its end."""
        return self.projection_head(last_norm=True)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares this process's predictions with the keys of the global batch."""
        p_VBD = self.predictor(self.projector(self.encode(batch.views_VBCHW)))
        key_VBD = self.targets(batch.views_VBCHW)
        key_VND = gather_batch(key_VBD, dim=1)
        loss = moco_v3_loss(p_VBD, key_VND, self.config.temperature, rank() * p_VBD.shape[1])
        cosine = -full_precision(negative_cosine)(p_VBD.detach(), key_VBD)
        loss, cosine = global_mean(torch.stack([loss, cosine]))
        return self.output(loss, {"positive_cosine": cosine}, p_VBD)
