"""SwAV (Caron et al., NeurIPS 2020): each view predicts the codes of the other views, which use all prototypes alike.

With s_v the cosines of view v with K prototypes, and q_u the codes of view u, balanced over the global batch:

    q_u  = Sinkhorn-Knopp(exp(s_u / epsilon)): each image's code sums to 1, and all prototypes get about as much
    loss = mean_{u, v != u} -sum_k q_uk log softmax(s_v / temperature)_k

over images and pairs, q_u without gradient. Codes are made of the V global views, and every other view, global or
local, predicts them. The mean over all pairs is the published loss for any number of views; for two it is the mean of
both directions. Its cost is that of the views, as `swapped_cross_entropy` says.

The authors scale the prototypes to unit length after each step; here the forward does, which is the same function.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_ssl_or.distributed import gather_batch, rank
from hf_ssl_or.methods.base import require_at_least, require_positive
from hf_ssl_or.methods.base_methods import ProjectionMethod, ProjectorConfig
from hf_ssl_or.methods.functional import full_precision, global_mean
from hf_ssl_or.methods.heads import PrototypeHead, swapped_cross_entropy
from hf_ssl_or.methods.queue import FeatureQueue
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import MultiViewBatch, SSLOutput, ViewSpec


@settings
class SwAVConfig(ProjectorConfig):
    """Settings of SwAV.

    Two images and two prototypes are all that balanced codes need: with fewer images (batch and queue) than
    prototypes, each code spreads over several prototypes. The queue makes such codes sharper.

    Attributes:
        prototypes: K, their number.
        freeze_prototypes_steps: In how many first steps the prototypes stay as they are.
        temperature: Divides the cosines that predict.
        epsilon: Divides the cosines that codes are made of.
        sinkhorn_iterations: How often the codes are balanced.
        queue_size: Q, how many images of earlier batches are balanced together with the batch, a multiple of the
            batch; 0 for none.
        queue_from_step: First step whose codes use the queue, which is also filled first.
    """

    projector_hidden: int | Literal["same"] = 2048  # the paper; solo-learn, CIFAR
    projector_dim: int = 128  # the paper; solo-learn, CIFAR
    prototypes: int = 3000  # the paper; solo-learn, CIFAR
    freeze_prototypes_steps: int = 390  # solo-learn, CIFAR: 2 epochs of 195 steps; the authors' code: 313
    temperature: float | int = 0.1
    epsilon: float | int = 0.05
    sinkhorn_iterations: int = 3
    queue_size: int = 3840  # solo-learn, CIFAR; the paper, a batch of 256
    queue_from_step: int = 9750  # solo-learn, CIFAR: 50 of 1000 epochs; the paper: 15 epochs

    def validate_ranges(self) -> None:
        """Checks that sizes, temperatures and steps make sense."""
        require_positive(self, "temperature", "epsilon", "sinkhorn_iterations")
        require_at_least(self, 2, "prototypes")
        require_at_least(self, 0, "freeze_prototypes_steps", "queue_size", "queue_from_step")


@torch.no_grad()
@full_precision
def sinkhorn(scores_NK: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Returns for each of N images a code over K prototypes, such that all prototypes are used alike.

    Alternately gives all prototypes the same total and all images the total 1 (Cuturi, NeurIPS 2013), the images last.
    Both are done to logarithms, in float64: with a small epsilon, exponentials of similar images or of prototypes that
    no image is near leave the range of any floating-point type, and rounding errors grow by 1 / epsilon.

    Args:
        scores_NK: Similarities, (..., N, K); leading dimensions are problems of their own.
        epsilon: Weight of the entropy: the smaller, the sharper the codes.
        iterations: How often both are done.

    Returns:
        Codes of the same shape without gradient, each with sum 1.
    """
    log_codes_NK = scores_NK.double() / epsilon
    for _ in range(iterations):  # the total of each prototype is 1, not N / K: the images' totals are set after it
        log_codes_NK = log_codes_NK.log_softmax(-2).log_softmax(-1)
    return log_codes_NK.exp().to(scores_NK.dtype)


class SwAV(ProjectionMethod):
    """SwAV for any number of global and local views."""

    config_class = SwAVConfig
    takes_local_views = True
    views = (  # solo-learn, CIFAR: symmetric
        ViewSpec(crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),
    )
    citation = """@inproceedings{caron2020unsupervised,
  title = {Unsupervised Learning of Visual Features by Contrasting Cluster Assignments},
  author = {Caron, Mathilde and Misra, Ishan and Mairal, Julien and Goyal, Priya and Bojanowski, Piotr and
            Joulin, Armand},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""

    queue: FeatureQueue | None

    def build_heads(self) -> None:
        """Adds the prototypes and the queue."""
        super().build_heads()
        config, self.queue = self.config, None
        self.prototypes = PrototypeHead(self.projection_dim, config.prototypes)
        if config.queue_size:
            self.queue = FeatureQueue(config.queue_size, self.projection_dim, per_view=True)

    def prepare(self, *, num_views: int, batch_size: int, num_local_views: int = 0) -> None:
        """Also fills the queue, of the global views."""
        super().prepare(num_views=num_views, batch_size=batch_size, num_local_views=num_local_views)
        if self.queue is not None:
            self.queue.prepare(batch_size, num_views)

    def forward(self, batch: MultiViewBatch) -> SSLOutput:
        """Predicts the codes of the global views from all other views."""
        config, (views, images) = self.config, batch.views_VBCHW.shape[:2]
        z_SBD = self.projector(self.encode_with_local_views(batch))
        scores_SBK = self.prototypes(z_SBD, frozen=batch.step < config.freeze_prototypes_steps)
        self.global_z_VND = gather_batch(z_SBD[:views].detach(), dim=1)
        codes_VBK = self.codes(self.global_z_VND, batch.step).narrow(1, rank() * images, images)
        loss_and_confidence = swapped_cross_entropy(scores_SBK, codes_VBK, config.temperature)
        loss, confidence = global_mean(torch.stack(loss_and_confidence)).unbind()
        return self.output(loss, {"code_confidence": confidence}, z_SBD)

    @torch.no_grad()
    def codes(self, z_VND: Tensor, step: int) -> Tensor:
        """Balances the images of the global batch, and of the queue from its first step on: codes (V, N, K)."""
        config, images = self.config, z_VND.shape[1]
        if self.queue is not None and step >= max(config.queue_from_step, config.queue_size // images):
            z_VND = torch.cat([z_VND, self.queue.features_QD], dim=1)
        return sinkhorn(self.prototypes(z_VND), config.epsilon, config.sinkhorn_iterations)[:, :images]

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Puts the projections of the global views into the queue."""
        if self.queue is not None:
            self.queue.push(self.global_z_VND)
