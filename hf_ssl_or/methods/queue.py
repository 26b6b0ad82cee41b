"""A queue of features of earlier batches: negatives, nearest neighbors, or more samples for Sinkhorn's balance."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.errors import InputError


class FeatureQueue(nn.Module):
    """The last `size` features, oldest replaced first; equal on all processes, as they push the global batch.

    It starts with random unit vectors. Features are replaced in place without asking the device for the position, so
    push in `on_step_end`: before, the backward pass may still need what is replaced.

    Args:
        size: Q, how many features are kept.
        dim: D, their width.
        per_view: One queue per view, with one position: `features_QD` is (V, Q, D), empty until `prepare` knows V.
    """

    features_QD: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, *, per_view: bool = False) -> None:
        super().__init__()
        self.generator_state = torch.get_rng_state()  # the start depends on it, not on when V is known
        features = torch.empty(0, size, dim) if per_view else F.normalize(torch.randn(size, dim), dim=-1)
        self.register_buffer("features_QD", features)
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def prepare(self, batch_size: int, views: int | None = None) -> None:
        """Checks the size and, where there is a queue per view, fills the queues of the views if they are empty.

        Args:
            batch_size: N, how many features each push brings.
            views: V, for a queue per view.

        Raises:
            InputError: The size is not a multiple of the batch, or the queues are those of another number of views.
        """
        size, queues = self.features_QD.shape[-2], len(self.features_QD)
        if size < batch_size or size % batch_size:
            near = max(1, round(size / batch_size)) * batch_size
            raise InputError(
                f"method.queue_size: {size} is not a multiple of training.batch_size, {batch_size}; {near} would be"
            )
        if views is None or views == queues:
            return
        if queues:
            raise InputError(f"views.count: the queues are of {queues} views, not {views}; make a new method")
        generator = torch.Generator()
        generator.set_state(self.generator_state)
        features = torch.randn(views, *self.features_QD.shape[1:], generator=generator)
        self.features_QD = F.normalize(features, dim=-1).to(self.features_QD)

    @torch.no_grad()
    def push(self, features_ND: Tensor) -> None:
        """Replaces the oldest features by those of the global batch: (N, D), or (V, N, D) for a queue per view."""
        size, images = self.features_QD.shape[-2], features_ND.shape[-2]
        places = (self.position + torch.arange(images, device=self.position.device)) % size
        self.features_QD.index_copy_(-2, places, features_ND.to(self.features_QD.dtype))
        self.position.add_(images).remainder_(size)

    @torch.no_grad()
    def unit(self, features: Tensor) -> Tensor:
        """Scales features (..., D) to unit length, in the queue's precision."""
        return F.normalize(features.to(self.features_QD.dtype), dim=-1)

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """Returns for every row of (..., D) the unit vector of the queue with the largest cosine, (..., D)."""
        with torch.autocast(features.device.type, enabled=False):  # in half precision many would be as near
            cosines = self.unit(features) @ self.features_QD.T
        return self.features_QD[cosines.argmax(-1)]
