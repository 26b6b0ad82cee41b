"""The decoder of masked autoencoders (MAE, He et al., CVPR 2022): from the tokens of kept patches, masked patches."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def sine_cosine_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Returns the paper's fixed positions of a grid: sines and cosines of the column, then of the row."""
    rates = 10000 ** -(torch.arange(width // 4, device=device) / (width // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    angles = torch.stack([column, row], -1)[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], 3).flatten(2).flatten(0, 1)


class Decoder(nn.Module):
    """The transformer that predicts masked patches.

    Args:
        in_features: Width of the encoder's tokens.
        width: D, width of the decoder; a multiple of 4 for the positions.
        out_features: Number of values of a patch.
        depth: Number of transformer blocks.
        heads: Number of heads of each.
    """

    def __init__(self, in_features: int, width: int, out_features: int, *, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_features, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.Sequential(*[Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, out_features)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(_initialize)

    def forward(self, tokens_MTF: Tensor, kept_MK: Tensor, masked_ML: Tensor, positions_PD: Tensor) -> Tensor:
        """Predicts the masked patches: (M, L, out_features).

        Args:
            tokens_MTF: The encoder's prefix tokens, which get no position here, and its K kept patches.
            kept_MK: The places of the kept patches.
            masked_ML: The places of the masked ones.
            positions_PD: Positions of all patches.
        """
        seen = tokens_MTF.shape[1]
        prefix, kept = self.embed(tokens_MTF).tensor_split([seen - kept_MK.shape[1]], dim=1)
        sequence = [prefix, kept + positions_PD[kept_MK], self.mask_token + positions_PD[masked_ML]]
        return self.predict(self.norm(self.blocks(torch.cat(sequence, dim=1))[:, seen:]))


def _initialize(module: nn.Module) -> None:
    """Initializes linear layers as the authors' code does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
