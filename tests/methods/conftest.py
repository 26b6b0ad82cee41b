"""What tests of methods share: a tiny encoder, with or without batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_ssl_or.models.auto import create_encoder
from hf_ssl_or.models.modeling_ssl import SSLModel
from hf_ssl_or.models.modeling_ssl_vit import SSLViTModel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: waking other threads takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TinyEncoder(SSLModel):  # methods take it as it is
    def __init__(self, batch_norm: bool) -> None:
        nn.Module.__init__(self)  # without timm's net
        norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3), nn.ReLU()
        )
        self.config = SimpleNamespace(hidden_size=16)
        self.seen: list[int] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.seen.append(len(pixel_values))
        return SimpleNamespace(pooler_output=self.layers(pixel_values).mean((2, 3)))


@pytest.fixture
def tiny_encoder() -> Callable[..., TinyEncoder]:
    def make(batch_norm: bool = True, seed: int = 0) -> TinyEncoder:
        torch.manual_seed(seed)
        return TinyEncoder(batch_norm)

    return make


@pytest.fixture
def tiny_vit() -> Callable[..., SSLViTModel]:
    def make(batch_norm: bool = False, seed: int = 0) -> SSLViTModel:
        torch.manual_seed(seed)
        return create_encoder("vit_tiny", image_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2)

    return make
