"""MoCo v2 (Chen et al., 2020): each view finds its image's key among a queue of keys of earlier images.

With q_v the projections of view v, k_u those of a momentum teacher for view u, both of unit length, and a queue Q_v of
keys of earlier batches:

    l(v, u, n) = -log( exp(q_vn k_un / T) / (exp(q_vn k_un / T) + sum_{k in Q_v} exp(q_vn k / T)) )

and the loss is the mean of l over images and ordered pairs v != u, the symmetric form of solo-learn's MoCo v2+. All
pairs of a query share its negatives, so the queues, which are what costs, are compared V times, not V (V - 1) times.
Q_v takes each batch's keys from one other view, and from the others in turn: negatives come from the same views as
positives, so augmentations that differ cannot tell them apart. With V = 2 each query's queue holds the keys of the
view that its positives come from, which is the published loss. `symmetric: false` keeps view 0 as the only query: the
original MoCo v2, at half the cost.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.distributed import gather_batch
from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.base_methods import MomentumConfig, MomentumMethod
from hf_ssl_or.methods.functional import full_precision, global_mean
from hf_ssl_or.methods.queue import FeatureQueue
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


@settings
class MoCoV2Config(MomentumConfig):
    """Settings of MoCo v2.

    Attributes:
        temperature: Divides the cosines.
        queue_size: Q, how many keys each query has as negatives; a multiple of the batch size.
        symmetric: Whether every view is a query; otherwise only the first one is.
    """

    projector_hidden: int | Literal["same"] = 2048  # the paper; solo-learn, CIFAR
    projector_dim: int = 256  # solo-learn, CIFAR; the paper: 128
    momentum: float | int = 0.99  # solo-learn, CIFAR; the paper: 0.999 throughout
    final_momentum: float | int = 0.999  # solo-learn, CIFAR
    temperature: float | int = 0.2  # the paper; solo-learn, CIFAR
    queue_size: int = 65536  # the paper; solo-learn, CIFAR: 32768
    symmetric: bool = True  # solo-learn; the paper: False

    def validate_ranges(self) -> None:
        """Checks that the temperature and the queue make sense."""
        require_positive(self, "temperature", "queue_size")


@full_precision
def moco_v2_loss(q_VBD: Tensor, key_VOBD: Tensor, queue_VQD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the loss and the mean cosine of positive pairs; means over images, so shards can be averaged.

    Args:
        q_VBD: Queries, of any length.
        key_VOBD: For each query the keys of the other views, of unit length.
        queue_VQD: For each view of queries its negatives, of unit length.
        temperature: Above 0.
    """
    q_VBD = F.normalize(q_VBD, dim=-1) / temperature
    positives_VOB = (q_VBD[:, None] * key_VOBD).sum(-1)
    negatives_VB = (q_VBD @ queue_VQD.mT).logsumexp(-1)
    return F.softplus(negatives_VB[:, None] - positives_VOB).mean(), positives_VOB.detach().mean() * temperature


class MoCoV2(MomentumMethod):
    """MoCo v2 for any number of views.

    Example:
        method = MoCoV2(encoder, queue_size=16384)
        method.prepare(num_views=2, batch_size=256)  # or the first batch does
    """

    config_class = MoCoV2Config
    views = (ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4, blur=0.5),)  # solo-learn, CIFAR
    order_of_views_matters = True  # each view has a queue of its own
    citation = """@article{chen2020improved,
  title = {Improved Baselines with Momentum Contrastive Learning},
  author = {Chen, Xinlei and Fan, Haoqi and Girshick, Ross and He, Kaiming},
  journal = {arXiv preprint arXiv:2003.04297},
  year = {2020}
}"""

    fresh_VND: Tensor  # this step's keys, until they are pushed

    def build_heads(self) -> None:
        """Adds a queue for each view of queries."""
        super().build_heads()
        self.queue = FeatureQueue(self.config.queue_size, self.projection_dim, per_view=True)

    def prepare(self, *, num_views: int, batch_size: int, num_local_views: int = 0) -> None:
        """Also fills the queues, one for each view of queries."""
        super().prepare(num_views=num_views, batch_size=batch_size, num_local_views=num_local_views)
        self.queue.prepare(batch_size, num_views if self.config.symmetric else 1)

    def build_projector(self) -> nn.Module:
        """Builds the projector, without batch normalization."""
        return self.projection_head(norm=False)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Compares each query with the keys of the other views and with its queue."""
        q_VBD = self.projector(self.encode(batch.views_VBCHW if self.config.symmetric else batch.views_VBCHW[:1]))
        key_VOBD = self.keys(batch.views_VBCHW)
        self.fresh_VND = gather_batch(key_VOBD[:, batch.step % key_VOBD.shape[1]], dim=1)
        loss, cosine = moco_v2_loss(q_VBD, key_VOBD, self.queue.features_QD, self.config.temperature)
        loss, cosine = global_mean(torch.stack([loss, cosine]))
        return self.output(loss, {"positive_cosine": cosine}, q_VBD)

    def keys(self, views_VBCHW: Tensor) -> Tensor:
        """Returns for each query the teacher's keys of the other views, the next one first: (queries, V - 1, B, D)."""
        if not self.config.symmetric:
            return self.queue.unit(self.targets(views_VBCHW[1:]))[None]
        key_VBD = self.queue.unit(self.targets(views_VBCHW))
        return torch.stack([key_VBD.roll(-shift, 0) for shift in range(1, len(key_VBD))], dim=1)

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Moves the teacher and pushes this step's keys."""
        super().on_step_end(step, total_steps)
        self.queue.push(self.fresh_VND)
