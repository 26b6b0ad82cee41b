"""A module as a user writes it, for `encoders.py`: it imports nothing of this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=4), nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (B, width, H, W)."""
        return x + self.mix(torch.relu(self.norm(self.conv(x))))


class OwnNet(nn.Module):
    """Returns a map in a dict, which is averaged over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, stride=4)
        self.blocks = nn.Sequential(Block(24), Block(24))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to a map (B, 24, H / 4, W / 4)."""
        return {"features": self.blocks(self.stem(images))}
