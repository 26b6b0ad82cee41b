"""What all families share: timm's net inside a transformers model, its head for classification, its backbone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from .blocks import Recomputed
from .configuration_ssl import SSLConfig

# timm's names of weights to ours; a model's own prefix `encoder.` is added and removed by transformers.
_FROM_TIMM = {
    r"^(?:fc|head)\.(weight|bias)$": r"classifier.\1",
    r"^(?!encoder\.|timm_model\.|classifier\.)(.+)": r"timm_model.\1",
}


class SSLPreTrainedModel(PreTrainedModel):
    """What transformers must know of every model here."""

    config: SSLConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """Loads a folder or a repository as transformers does; the weights may also have timm's names."""
        return super().from_pretrained(*args, key_mapping={**_FROM_TIMM, **(key_mapping or {})}, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Chooses how a ViT computes attention: "sdpa", torch's fused function, or "eager", step by step.

        Raises:
            ValueError: There is no such way; a ResNet has no attention and takes "eager" alone.
        """
        known = ("eager", "sdpa") if self._supports_sdpa else ("eager",)
        if attn_implementation not in known:
            raise ValueError(f"attn_implementation: {' or '.join(known)}, not {attn_implementation!r}")
        self.config._attn_implementation = attn_implementation
        for module in self.modules():
            if isinstance(module, SSLModel):
                module.use_attention(attn_implementation)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, by our names of weights whatever names they were loaded by."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})


class SSLModel(SSLPreTrainedModel):
    """timm's net without a head; its own loop over the blocks gives hidden states and gradient checkpointing.

    Attributes:
        timm_model: The net, in timm's own layout.
    """

    gradient_checkpointing = False
    config_class: type[SSLConfig]
    timm_model: Any

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.timm_model = self.build_timm_model(config)
        self.use_attention(config._attn_implementation)
        if not any(tensor.is_meta for tensor in self.parameters()):
            self._mark_initialized()
        self.post_init()

    @staticmethod
    def build_timm_model(config: Any) -> nn.Module:
        """Builds the net with timm's own initialization."""
        name, arguments = config.timm_arguments()
        return timm.create_model(name, pretrained=False, **arguments)

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
            pixel_values: Normalized images (B, C, H, W).
            output_hidden_states: Also gives the stem's output and that of every stage (every block of a ViT).
            interpolate_pos_encoding: Take images of other sizes than `config.image_size`. A ResNet takes any size; a
                ViT resamples its position embeddings, or refuses with False.
            return_dict: False gives a tuple.
            kept_patches: Indices (B, kept) of the patches that a ViT sees of each image, row by row from the top left,
                in any order; None for all. Its class token and the like stay, and patches keep their positions.

        Returns:
            `pooler_output` (B, hidden_size); `last_hidden_state` (B, hidden_size, H', W') of a ResNet, or
            (B, tokens, hidden_size) of a ViT after its last norm; `hidden_states` are before that norm.

        Raises:
            ValueError: A ViT cannot take images of this size, or a choice of patches cannot be made.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embed(pixel_values.to(self.dtype), interpolate_pos_encoding)
        if kept_patches is not None:
            x = self.keep_patches(x, kept_patches)
        hidden_states = [x] if output_hidden_states else []
        for stage in self.stages():
            for block in stage:
                x = self._run(block, x)
            if output_hidden_states:
                hidden_states.append(x)
        x = self.finish(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.timm_model.forward_head(x, pre_logits=True),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )

    def use_attention(self, implementation: str | None) -> None:
        """Computes attention, where there is any, by torch's fused function ("sdpa") or step by step ("eager")."""
        for module in self.timm_model.modules():
            if "fused_attn" in vars(module):  # each of timm's kinds of attention has this switch
                module.fused_attn = implementation != "eager"

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Runs what comes before the first block."""
        raise NotImplementedError

    def keep_patches(self, x: Tensor, kept_patches: Tensor) -> Tensor:
        """Keeps some of the patches of `embed`'s output, where it has patches."""
        raise ValueError(f"kept_patches: {self.config.architecture} takes whole images, it has no patches")

    def stages(self) -> Iterable[Iterable[Any]]:
        """Returns the blocks of each stage."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of all stages, in order."""
        return [block for stage in self.stages() for block in stage]

    def finish(self, x: Tensor) -> Tensor:
        """Runs the norm after the last block, where there is one."""
        raise NotImplementedError

    def stage_widths(self) -> list[int]:
        """Returns the channels of the stem's output and of every stage."""
        raise NotImplementedError

    def feature_map(self, output: BaseModelOutputWithPooling, index: int, size: torch.Size) -> Tensor:
        """Returns hidden state `index` of images of `size` (H, W) as a map (B, channels, H', W')."""
        raise NotImplementedError

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(Recomputed(block, block), x)
        return block(x)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Returns every tensor that no checkpoint filled the value it has in a fresh net, all at the first call.

        Whatever the net is, this is timm's own initialization; `init.copy_` leaves loaded tensors alone.
        """
        with torch.device("cpu"):
            fresh = self.build_timm_model(self.config)
        values = dict(chain(fresh.named_parameters(), fresh.named_buffers()))
        for name, tensor in chain(self.timm_model.named_parameters(), self.timm_model.named_buffers()):
            init.copy_(tensor, values[name])
        self._mark_initialized()

    def _mark_initialized(self) -> None:
        """Tells transformers to leave the weights as they are."""
        for module in self.modules():
            setattr(module, "_is_hf_initialized", True)  # noqa: B010  (a plain attribute, as transformers sets it)


class SSLForImageClassification(SSLPreTrainedModel):
    """An encoder and a linear layer on its pooled features."""

    encoder_class: type[SSLModel]

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = self.encoder_class(config)
        width = self.encoder.timm_model.head_hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = True,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classifies images.

        Args:
            pixel_values: Normalized images (B, C, H, W).
            labels: Labels (B), for the loss that `config.problem_type` names.
            output_hidden_states: As for the encoder.
            interpolate_pos_encoding: As for the encoder.
            return_dict: False gives a tuple.

        Returns:
            `logits` (B, num_labels), and with labels the scalar `loss`.
        """
        output = self.encoder(
            pixel_values,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        logits = self.classifier(output.pooler_output)
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)


class SSLBackbone(BackboneMixin, SSLPreTrainedModel):
    """An encoder as a backbone of detectors and the like: feature maps of the stages named in `out_features`."""

    encoder_class: type[SSLModel]
    has_attentions = False

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.num_features = self.encoder.stage_widths()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = True,
        return_dict: bool | None = None,
    ) -> BackboneOutput:
        """Returns feature maps.

        Args:
            pixel_values: Normalized images (B, C, H, W).
            output_hidden_states: Also gives all hidden states.
            interpolate_pos_encoding: As for the encoder.
            return_dict: False gives a tuple.

        Returns:
            `feature_maps`: for each of `out_features`, a map (B, channels, H', W') after the last norm (of a ResNet:
            where it is the last stage's).
        """
        output = self.encoder(
            pixel_values,
            output_hidden_states=True,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
        )
        wanted = [self.stage_names.index(name) for name in self.out_features]
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps: Any = tuple(self.encoder.feature_map(output, i, pixel_values.shape[-2:]) for i in wanted)
        return BackboneOutput(
            feature_maps=maps,
            hidden_states=output.hidden_states if keep else None,
        )
