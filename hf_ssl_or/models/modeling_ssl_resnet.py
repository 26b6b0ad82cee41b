"""ResNet encoders: timm's `ResNet` (and Wide ResNet-28-2), with a stem for small images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import timm
import torch
from timm.models.resnetv2 import PreActBasic, ResNetV2
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_ssl import OWN_RESNETS, SSLResNetConfig
from .modeling_ssl import SSLBackbone, SSLForImageClassification, SSLModel


class PreActBlock(PreActBasic):
    """timm's basic pre-activation block, with plain norms: what replaces BatchNorm by class keeps the activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Adds the residual to (B, C, H, W)."""
        active = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        residual = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return shortcut + self.drop_path(residual)


def _plain_norm(channels: int, **kwargs: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **kwargs)


def _make_stem_small(net: Any, channels: int) -> None:
    conv = nn.Conv2d(channels, net.feature_info[0]["num_chs"], 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(net, ResNetV2):
        net.stem.conv, net.stem.pool = conv, nn.Identity()
    else:
        net.conv1, net.maxpool = conv, nn.Identity()


class SSLResNetModel(SSLModel):
    """A ResNet without a head. Its stages are timm's `layer1` and so on."""

    config_class = SSLResNetConfig
    _no_split_modules = ["BasicBlock", "Bottleneck", "PreActBlock"]

    @staticmethod
    def build_timm_model(config: Any) -> nn.Module:
        """Builds the net with timm's own initialization, and with the stem of `config.stem`."""
        name, arguments = config.timm_arguments()
        if config.architecture in OWN_RESNETS:
            arguments["norm_layer"] = _plain_norm
        net = timm.create_model(name, pretrained=False, **arguments)
        for module in net.modules():
            if type(module) is PreActBasic:
                module.__class__ = PreActBlock
        if config.stem == "small":
            _make_stem_small(net, config.num_channels)
        return net

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Runs the stem on images (B, C, H, W) of any size."""
        net = self.timm_model
        if isinstance(net, ResNetV2):
            return net.stem(pixel_values)
        return net.maxpool(net.act1(net.bn1(net.conv1(pixel_values))))

    def stages(self) -> Iterable[Iterable[Any]]:
        """Returns the residual blocks of each stage."""
        net = self.timm_model
        if isinstance(net, ResNetV2):
            return [cast(nn.Sequential, stage.blocks) for stage in net.stages]
        return [getattr(net, info["module"]) for info in net.feature_info[1:]]

    def finish(self, x: Tensor) -> Tensor:
        """Runs the last norm and activation of a pre-activation net."""
        return F.relu(self.timm_model.norm(x)) if isinstance(self.timm_model, ResNetV2) else x

    def stage_widths(self) -> list[int]:
        """Returns the channels of the stem's output and of every stage."""
        return [info["num_chs"] for info in self.timm_model.feature_info]

    def feature_map(self, output: BaseModelOutputWithPooling, index: int, size: torch.Size) -> Tensor:
        """Returns hidden state `index` (B, channels, H', W'), the last one after the last norm."""
        states: Any = output.hidden_states
        return (*states[:-1], output.last_hidden_state)[index]


class SSLResNetForImageClassification(SSLForImageClassification):
    """A ResNet and a linear layer on its pooled features."""

    config_class = SSLResNetConfig
    encoder_class = SSLResNetModel
    _no_split_modules = SSLResNetModel._no_split_modules


class SSLResNetBackbone(SSLBackbone):
    """A ResNet that gives the feature maps of its stages."""

    config_class = SSLResNetConfig
    encoder_class = SSLResNetModel
    _no_split_modules = SSLResNetModel._no_split_modules


SSLResNetModel.register_for_auto_class("AutoModel")
SSLResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
SSLResNetBackbone.register_for_auto_class("AutoBackbone")
