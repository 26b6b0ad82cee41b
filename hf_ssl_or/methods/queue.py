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
        size: Q, how many features are kept; a multiple of `batch_size`.
        dim: D, their width.
        batch_size: N, how many features each push brings.
        views: V for one queue per view, with one position: `features_QD` is then (V, Q, D).
        name: Name of the setting that gave `size`, for the error.

    Raises:
        InputError: `size` is not a multiple of the batch.
    """

    features_QD: Tensor
    position: Tensor

    def __init__(
        self, size: int, dim: int, batch_size: int, *, views: int | None = None, name: str = "queue_size"
    ) -> None:
        super().__init__()
        if size < batch_size or size % batch_size:
            near = max(1, round(size / batch_size)) * batch_size
            raise InputError(
                f"method.{name}: {size} is not a multiple of training.batch_size, {batch_size}; {near} would be"
            )
        shape = (size, dim) if views is None else (views, size, dim)
        self.register_buffer("features_QD", F.normalize(torch.randn(shape), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

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
