"""Encoders that are not of this package."""

from torch import nn


def adapt_encoder(encoder: nn.Module) -> nn.Module:
    """Returns the encoder."""
    return encoder
