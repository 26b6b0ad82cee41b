"""The momentum teacher: a slow copy of the student, whose projections are the student's targets."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class MomentumTeacher(nn.Module):
    """Exponential moving average of an encoder and its projector, never trained by gradient.

    Only parameters are averaged. Batch normalization keeps statistics of the teacher's own forwards, as the published
    methods do. He et al., "Momentum contrast", CVPR 2020, eq. 2.

    Args:
        encoder: The student's encoder, copied.
        projector: The student's projector, copied.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.projector = copy.deepcopy(projector)
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, encoder: nn.Module, projector: nn.Module, momentum: float) -> None:
        """Moves every parameter to momentum * own + (1 - momentum) * student's."""
        own: list[Tensor] = [*self.encoder.parameters(), *self.projector.parameters()]
        student: list[Tensor] = [*encoder.parameters(), *projector.parameters()]
        torch._foreach_lerp_(own, student, 1 - momentum)


def cosine_momentum(start: float, end: float, step: int, total_steps: int) -> float:
    """Rises from `start` at step 0 towards `end` along half a cosine (BYOL, Grill et al., NeurIPS 2020, sec. 3.3)."""
    return end - (end - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
