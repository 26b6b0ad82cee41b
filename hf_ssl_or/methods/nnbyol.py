"""NNBYOL (solo-learn, after NNCLR, ICCV 2021): BYOL whose targets are nearest neighbors among earlier images.

With p_v the predictions of the student, t_u the projections of the momentum teacher, and nn(t) the feature with the
largest cosine in a queue of the teacher's projections of earlier batches:

    loss = 4 - 4 mean_{v != u} cos(p_v, nn(t_u))

over images and ordered pairs of views: BYOL's loss with nn(t_u) for t_u, so V = 2 is solo-learn's sum of both
directions and V views cost V, each against the mean of the other views' neighbors. As in solo-learn, the queue takes
the projections of one view, the first.
"""

from __future__ import annotations

from torch import Tensor

from hf_ssl_or.distributed import gather_batch
from hf_ssl_or.methods.base import require_positive
from hf_ssl_or.methods.byol import BYOL, BYOLConfig
from hf_ssl_or.methods.nnclr import NNCLR
from hf_ssl_or.methods.queue import FeatureQueue
from hf_ssl_or.settings import settings


@settings
class NNBYOLConfig(BYOLConfig):
    """Settings of NNBYOL, with BYOL's defaults, as in solo-learn's CIFAR recipes.

    Attributes:
        queue_size: Q, among how many earlier images neighbors are sought; a multiple of the batch size.
    """

    queue_size: int = 65536  # solo-learn, CIFAR

    def validate_queue(self) -> None:
        """Checks that there is a queue."""
        require_positive(self, "queue_size")


class NNBYOL(BYOL):
    """NNBYOL for any number of views."""

    config_class = NNBYOLConfig
    citation = NNCLR.citation

    fresh_ND: Tensor  # this step's projections, until they are pushed

    def build_heads(self) -> None:
        """Adds the queue."""
        super().build_heads()
        self.queue = FeatureQueue(self.config.queue_size, self.projection_dim)

    def prepare(self, *, num_views: int, batch_size: int, num_local_views: int = 0) -> None:
        """Also checks that the queue is a multiple of the batch."""
        super().prepare(num_views=num_views, batch_size=batch_size, num_local_views=num_local_views)
        self.queue.prepare(batch_size)

    def targets(self, views_VBCHW: Tensor) -> Tensor:
        """Returns the queue's nearest neighbors of the teacher's projections, of this process's views: (V, B, D)."""
        target_VBD = super().targets(views_VBCHW)
        self.fresh_ND = gather_batch(self.queue.unit(target_VBD[0]))
        return self.queue.nearest(target_VBD)

    def on_step_end(self, step: int, total_steps: int) -> None:
        """Moves the teacher and pushes this step's projections of the first view."""
        super().on_step_end(step, total_steps)
        self.queue.push(self.fresh_ND)
