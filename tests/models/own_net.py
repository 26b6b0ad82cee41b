"""A module of the user's own, in a file that imports nothing of this package."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Own(nn.Module):
    """A module of the user's, with batch statistics and blocks."""

    def __init__(self) -> None:
        super().__init__()
        block = (nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.stem = nn.Conv2d(3, 6, 3)
        self.blocks = nn.Sequential(nn.Sequential(*block), _Block(), _Block())

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.norm(self.a(x))))
