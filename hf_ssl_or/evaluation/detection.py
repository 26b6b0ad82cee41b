"""Encoders as backbones of torchvision's detectors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import PreTrainedModel


class PyramidBackbone(nn.Module):
    """A transformers backbone and a feature pyramid: what `torchvision.models.detection.FasterRCNN` and its kin take.

    Several maps, as a ResNet's stages give them, are joined by a feature pyramid network (Lin et al., CVPR 2017), with
    a coarser level pooled on top. A single map, as a ViT's last block gives it, is brought to 4, 2, 1 and 1/2 of its
    resolution (Li et al., "Exploring plain vision transformer backbones for object detection", ECCV 2022).

    Example:
        ```python
        backbone = SSLResNetBackbone.from_pretrained(folder, out_features=["stage1", "stage2", "stage3", "stage4"])
        pyramid = PyramidBackbone(backbone)
        sizes = tuple((32 * 2**level,) for level in range(pyramid.levels))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * pyramid.levels)
        pool = MultiScaleRoIAlign(pyramid.names, output_size=7, sampling_ratio=2)
        detector = FasterRCNN(pyramid, num_classes, rpn_anchor_generator=anchors, box_roi_pool=pool)
        ```

    Args:
        backbone: Returns `feature_maps`, finest first, of the widths in `channels`.
        width: Channels of every level.

    Attributes:
        out_channels: The width, by the name that torchvision reads.
        levels: Number of levels.
        names: Keys of the levels that boxes are pooled from.
    """

    def __init__(self, backbone: PreTrainedModel, width: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = backbone, width
        channels: list[int] = list(cast(Any, backbone).channels)
        self.neck: nn.Module
        if len(channels) == 1:
            self.neck, self.levels = _SimplePyramid(channels[0], width), 4
            self.names = ["0", "1", "2", "3"]
        else:
            self.neck, self.levels = FeaturePyramidNetwork(channels, width, LastLevelMaxPool()), len(channels) + 1
            self.names = [str(level) for level in range(len(channels))]

    def forward(self, images_BCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Returns every level's map (B, width, H', W') of normalized images, finest first."""
        maps = self.body(images_BCHW).feature_maps
        return self.neck(OrderedDict((str(level), x) for level, x in enumerate(maps)))


class _SimplePyramid(nn.Module):
    """Maps of 4, 2, 1 and 1/2 times the resolution of one."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        doubled = nn.ConvTranspose2d(channels, half, 2, stride=2)
        fourfold = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, stride=2)
        )
        scaled = ((fourfold, quarter), (doubled, half), (nn.Identity(), channels), (nn.MaxPool2d(2), channels))
        self.levels = nn.ModuleList(
            nn.Sequential(scale, _convolution(before, width, 1), _convolution(width, width, 3))
            for scale, before in scaled
        )

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        (x_BCHW,) = maps.values()
        return OrderedDict((str(i), level(x_BCHW)) for i, level in enumerate(self.levels))


def _convolution(before: int, after: int, size: int) -> nn.Module:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(1, channels)  # over channels and places, whatever the size of the batch

    return Conv2dNormActivation(before, after, size, norm_layer=norm, activation_layer=None)
