"""Encoders of any other architecture of timm: ConvNeXt, EfficientNet, Swin, EVA and so on, as timm builds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .blocks import block_names, recompute_in_backward
from .configuration_ssl import SSLTimmConfig
from .modeling_ssl import SSLBackbone, SSLForImageClassification, SSLModel


class SSLTimmModel(SSLModel):
    """A net of timm without a head, run by timm's own forward."""

    config_class = SSLTimmConfig
    _no_split_modules = ["SSLTimmModel"]
    _supports_sdpa = True

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = True,
        return_dict: bool | None = None,
        kept_patches: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: Normalized images (B, C, H, W), of a size that the architecture takes.
            output_hidden_states: Also gives the map (B, channels, H', W') of each stage.
            interpolate_pos_encoding: No matter: each architecture takes other sizes or does not.
            return_dict: False gives a tuple.
            kept_patches: Refused.

        Returns:
            `pooler_output` (B, hidden_size); `last_hidden_state` as timm's `forward_features` gives it, None where
            that is no single tensor.

        Raises:
            ValueError: A choice of patches was given.
        """
        if kept_patches is not None:
            raise ValueError(f"kept_patches: {self.config.architecture} is run as a whole")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, hidden_states = pixel_values.to(self.dtype), None
        if output_hidden_states:
            last, hidden_states = self.timm_model.forward_intermediates(x)
        else:
            last = self.timm_model.forward_features(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=last if isinstance(last, Tensor) else None,
            pooler_output=self.timm_model.forward_head(last, pre_logits=True),
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )

    def stages(self) -> Iterable[Iterable[Any]]:
        """Returns the blocks, each as a stage of its own; none where the architecture has none that are called."""
        name, arguments = self.config.timm_arguments()
        names = _block_names(name, json.dumps(arguments), self.config.image_size)
        return [[self.timm_model.get_submodule(block)] for block in names]

    def check_image_size(self) -> None:
        """Raises ValueError where the architecture takes no images of the configuration's size."""
        try:
            self.blocks()
        except (RuntimeError, AssertionError, ValueError) as error:
            side, name = self.config.image_size, self.config.architecture
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"image_size: {name} takes no images of {side} x {side} pixels: {reason}") from error

    def stage_widths(self) -> list[int]:
        """Returns the channels of every stage."""
        return [info["num_chs"] for info in self.timm_model.feature_info]

    def feature_map(self, output: BaseModelOutputWithPooling, index: int, size: torch.Size) -> Tensor:
        """Returns the map of stage `index`, (B, channels, H', W')."""
        return output.hidden_states[index]  # type: ignore[index]

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        for i, block in enumerate(self.blocks()):
            recompute_in_backward(block, gradient_checkpointing_func if enable and i % every_n_layers == 0 else None)


@lru_cache(maxsize=64)
def _block_names(architecture: str, arguments: str, image_size: int) -> tuple[str, ...]:
    """Finds the blocks on the meta device, where a forward costs nothing."""
    options = json.loads(arguments)
    with torch.device("meta"), torch.no_grad():
        net = timm.create_model(architecture, **options).eval()
        return tuple(block_names(net, lambda: net(torch.zeros(2, options["in_chans"], image_size, image_size))))


class SSLTimmForImageClassification(SSLForImageClassification):
    """A net of timm and a linear layer on its pooled features."""

    config_class = SSLTimmConfig
    encoder_class = SSLTimmModel
    _no_split_modules = SSLTimmModel._no_split_modules
    _supports_sdpa = True


class SSLTimmBackbone(SSLBackbone):
    """A net of timm that gives the feature maps of its stages."""

    config_class = SSLTimmConfig
    encoder_class = SSLTimmModel
    _no_split_modules = SSLTimmModel._no_split_modules
    _supports_sdpa = True


SSLTimmModel.register_for_auto_class("AutoModel")
SSLTimmForImageClassification.register_for_auto_class("AutoModelForImageClassification")
SSLTimmBackbone.register_for_auto_class("AutoBackbone")
