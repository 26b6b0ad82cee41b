"""Vision transformer encoders: timm's `VisionTransformer`, on images of any size that its patches divide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_ssl import SSLViTConfig
from .modeling_ssl import SSLBackbone, SSLForImageClassification, SSLModel


class EmbeddingVisionTransformer(VisionTransformer):
    """timm's net, a call of which may end before the first block.

    Class token and positions are parameters of the net itself, and where accelerate offloads them they are there
    during a call of the net alone.
    """

    def forward(self, x: Tensor, *args: Any, embed_only: bool = False, **kwargs: Any) -> Tensor:
        """Runs timm's forward on images (B, C, H, W), or returns the tokens that the first block gets."""
        if not embed_only:
            return super().forward(x, *args, **kwargs)
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))


class SSLViTModel(SSLModel):
    """A vision transformer without a head. Each of its blocks is a stage."""

    config_class = SSLViTConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    @staticmethod
    def build_timm_model(config: Any) -> nn.Module:
        """Builds the net with timm's own initialization."""
        net = SSLModel.build_timm_model(config)
        net.__class__ = EmbeddingVisionTransformer
        return net

    def get_input_embeddings(self) -> nn.Module:
        """Returns the layer that images enter by."""
        return self.timm_model.patch_embed

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Returns the tokens of images (B, C, H, W) with their positions (B, tokens, hidden_size)."""
        height, width = pixel_values.shape[-2:]
        size, patch = self.config.image_size, self.config.patch_size
        if not interpolate_pos_encoding and (height, width) != (size, size):
            raise ValueError(f"pixel_values: images of {height}x{width}, expected {size}x{size}")
        if height % patch or width % patch:
            raise ValueError(f"pixel_values: {height}x{width} is not a multiple of the patch size {patch}")
        return self.timm_model(pixel_values, embed_only=True)

    def keep_patches(self, x: Tensor, kept_patches: Tensor) -> Tensor:
        """Returns the prefix tokens and the patches of indices (B, kept): (B, prefix + kept, hidden_size)."""
        if kept_patches.dim() != 2 or len(kept_patches) != len(x):
            raise ValueError(f"kept_patches: expected shape ({len(x)}, kept), not {tuple(kept_patches.shape)}")
        if not isinstance(self.timm_model.patch_drop, nn.Identity):
            raise ValueError("kept_patches: patch_drop_rate has dropped others; leave it at 0")
        prefix, patches = x.tensor_split([self.timm_model.num_prefix_tokens], dim=1)
        return torch.cat([prefix, torch.take_along_dim(patches, kept_patches[..., None], dim=1)], dim=1)

    def stages(self) -> Iterable[Iterable[Any]]:
        """Returns the transformer blocks, each as a stage of its own."""
        return [[block] for block in self.timm_model.blocks]

    def finish(self, x: Tensor) -> Tensor:
        """Runs the last norm (with average pooling, timm's norm comes after the pooling instead)."""
        return self.timm_model.norm(x)

    def stage_widths(self) -> list[int]:
        """Returns the width of the embedding and of every block."""
        return [self.timm_model.embed_dim] * (len(self.timm_model.blocks) + 1)

    def feature_map(self, output: BaseModelOutputWithPooling, index: int, size: torch.Size) -> Tensor:
        """Returns the patches' hidden state `index`, after the last norm, as a map (B, hidden_size, H', W')."""
        net, patch = self.timm_model, self.config.patch_size
        states: Any = output.hidden_states
        patches = net.norm(states[index])[:, net.num_prefix_tokens :]
        grid = size[0] // patch, size[1] // patch
        if patches.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"a feature map wants all {grid[0] * grid[1]} patches, not {patches.shape[1]} kept ones")
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()


class SSLViTForImageClassification(SSLForImageClassification):
    """A vision transformer and a linear layer on its pooled features."""

    config_class = SSLViTConfig
    encoder_class = SSLViTModel
    _no_split_modules = SSLViTModel._no_split_modules
    _supports_sdpa = True


class SSLViTBackbone(SSLBackbone):
    """A vision transformer that gives its tokens as feature maps."""

    config_class = SSLViTConfig
    encoder_class = SSLViTModel
    _no_split_modules = SSLViTModel._no_split_modules
    _supports_sdpa = True


SSLViTModel.register_for_auto_class("AutoModel")
SSLViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
SSLViTBackbone.register_for_auto_class("AutoBackbone")
