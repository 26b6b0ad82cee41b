"""NNCLR (Dwibedi et al., ICCV 2021): an image's positive is its nearest neighbor among earlier images.

With z_v the projections of view v, p_u the predictions of view u, and nn(z) the feature with the largest cosine in a
queue of projections of earlier batches, which gets no gradient:

    l(v, u, n) = -log( exp(cos(nn(z_vn), p_un) / T) / sum_m exp(cos(nn(z_vn), p_um) / T) )

and the loss is the mean of l over images and ordered pairs v != u; V = 2 is the published mean of both directions. As
published, the queue takes the projections of one view, the first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_ssl_or.distributed import gather_batch
from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import ASYMMETRIC_VIEWS, ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import contrast, full_precision, negative_cosine
from hf_ssl_or.methods.heads import PredictionHead, ProjectionHead
from hf_ssl_or.methods.queue import FeatureQueue
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput


@settings
class NNCLRConfig(ProjectorConfig):
    """Settings of NNCLR.

    Attributes:
        predictor_hidden: Width of the predictor's hidden layer.
        temperature: Divides the cosines.
        queue_size: Q, among how many earlier images neighbors are sought; a multiple of the batch size.
    """

    projector_hidden: int | Literal["same"] = 2048  # the paper; solo-learn, CIFAR
    projector_dim: int = 256  # the paper; solo-learn, CIFAR
    projector_layers: int = 3  # the paper; solo-learn
    predictor_hidden: int = 4096  # the paper; solo-learn, CIFAR
    temperature: float | int = 0.2  # solo-learn, CIFAR; the paper: 0.1
    queue_size: int = 65536  # solo-learn, CIFAR; the paper: 98304

    def validate_ranges(self) -> None:
        """Checks that sizes and the temperature make sense."""
        require_positive(self, "predictor_hidden", "temperature", "queue_size")


@full_precision
def nnclr_loss(p_VND: Tensor, neighbor_VND: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss, and the mean cosine of positive pairs, from the predictions of the global batch."""
    cosine = -negative_cosine(p_VND, neighbor_VND)
    return contrast(neighbor_VND, p_VND, temperature), {"positive_cosine": cosine}


class NNCLR(ProjectionMethod):
    """NNCLR for any number of views."""

    config_class = NNCLRConfig
    views = ASYMMETRIC_VIEWS
    citation = """@inproceedings{dwibedi2021little,
  title = {With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations},
  author = {Dwibedi, Debidatta and Aytar, Yusuf and Tompson, Jonathan and Sermanet, Pierre and Zisserman, Andrew},
  booktitle = {International Conference on Computer Vision},
  year = {2021}
}"""

    fresh_ND: Tensor  # this step's projections, until they are pushed

    def build_heads(self) -> None:
        """Adds the predictor and the queue."""
        super().build_heads()
        self.predictor = PredictionHead(self.projection_dim, self.config.predictor_hidden)
        self.queue = FeatureQueue(self.config.queue_size, self.projection_dim)

    def prepare(self, *, num_views: int, batch_size: int, num_local_views: int = 0) -> None:
        """Also checks that the queue is a multiple of the batch."""
        super().prepare(num_views=num_views, batch_size=batch_size, num_local_views=num_local_views)
        self.queue.prepare(batch_size)

    def build_projector(self) -> nn.Module:
        """Builds the projector, with batch normalization (here with scale and shift, as published) at its end."""
        head = self.projection_head(last_norm=True)
        if isinstance(head, ProjectionHead):
            head.mlp[-1] = nn.BatchNorm1d(head.out_features)
        return head

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares the neighbors of each view with the predictions of the others."""
        z_VBD = self.projector(self.encode(batch.views_VBCHW))
        p_VBD = self.predictor(z_VBD)
        own = torch.cat([self.queue.nearest(z_VBD), self.queue.unit(z_VBD[:1])])
        gathered = gather_batch(own, dim=1)
        neighbor_VND, self.fresh_ND = gathered[:-1], gathered[-1]
        loss, terms = nnclr_loss(gather_batch(p_VBD, dim=1), neighbor_VND, self.config.temperature)
        return self.output(loss, terms, p_VBD)

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Pushes this step's projections of the first view."""
        self.queue.push(self.fresh_ND)
