"""SimSiam (Chen and He, CVPR 2021): each view predicts the other views' projections, which get no gradient.

With p_v the predictions and z_u the projections of one network, sg the stop-gradient:

    target "pairs":  loss = -mean_{v != u} cos(p_v, sg z_u)
    target "mean":   loss = -mean_v cos(p_v, sg m_v),  m_v the mean of z_u over u != v

over images, ordered pairs and views. Two views have one target each, so both are the published loss. "pairs" is its
mean over pairs; as the cosine is linear in z_u / |z_u|, that is the product with the mean of the other views' unit
vectors, at cost V. "mean" is FastSiam (Pototzky et al., GCPR 2022) with all other views as targets: projections are
averaged as they are, at the length that batch normalization gave them, and the mean is scaled to unit length. So an
image whose targets disagree weighs as much as any other, where "pairs" weighs it by their agreement.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, global_mean, mean_of_others, negative_cosine
from hf_ssl_or.methods.heads import PredictionHead
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec

Target = Literal["pairs", "mean"]


@settings
class SimSiamConfig(ProjectorConfig):
    """Settings of SimSiam.

    Attributes:
        predictor_hidden: Width of the predictor's hidden layer, the bottleneck.
        target: What a view predicts: each of the other views ("pairs"), or their mean ("mean", FastSiam).
    """

    projector_hidden: int | Literal["same"] = 2048  # the paper; solo-learn, CIFAR
    projector_dim: int = 2048  # the paper; solo-learn, CIFAR
    projector_layers: int = 3  # the paper, ImageNet; solo-learn, CIFAR; the paper, CIFAR: 2
    predictor_hidden: int = 512  # the paper; solo-learn, CIFAR
    target: Target = "pairs"  # ours; two views make no difference

    def validate_ranges(self) -> None:
        """Checks that the predictor has a width."""
        require_positive(self, "predictor_hidden")


@full_precision
def simsiam_loss(p_VND: Tensor, z_VND: Tensor, target: Target = "pairs") -> Tensor:
    """Returns the loss from predictions and projections; a mean over images, so shards can be averaged.

    Args:
        p_VND: The predictions.
        z_VND: The projections; they get no gradient.
        target: See `SimSiamConfig`.
    """
    z_VND = z_VND.detach()
    if target == "pairs":
        return negative_cosine(p_VND, z_VND)
    return -F.cosine_similarity(p_VND, mean_of_others(z_VND), dim=-1).mean()


class SimSiam(ProjectionMethod):
    """SimSiam for any number of views."""

    config_class = SimSiamConfig
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4),)  # solo-learn, CIFAR; no blur, as the paper, CIFAR
    citation = """@inproceedings{chen2021exploring,
  title = {Exploring Simple Siamese Representation Learning},
  author = {Chen, Xinlei and He, Kaiming},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2021}
}"""

    def build_heads(self) -> None:
        """Adds the predictor."""
        super().build_heads()
        self.predictor = PredictionHead(self.projection_dim, self.config.predictor_hidden)

    def build_projector(self) -> nn.Module:
        """Builds the projector, whose output is batch-normalized too."""
        return self.projection_head(last_norm=True)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Predicts the projections of the other views."""
        z_VBD = self.projector(self.encode(batch.views_VBCHW))
        p_VBD = self.predictor(z_VBD)
        loss = global_mean(simsiam_loss(p_VBD, z_VBD, self.config.target))
        return self.output(loss, {"cosine": -loss}, p_VBD)
