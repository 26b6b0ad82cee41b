"""Image processor: any image becomes the square, normalised input that an encoder was pretrained on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class SSLImageProcessor(TorchvisionBackend):
    """Resizes to a square (bilinear, antialiased), scales to [0, 1] and normalises by channel.

    Attributes:
        size: Height and width of the result in pixels.
        image_mean: Mean of each channel, for values in [0, 1].
        image_std: Standard deviation of each channel.
    """

    resample = PILImageResampling.BILINEAR
    size = {"height": 224, "width": 224}
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


def build_image_processor(image_size: int, mean: Sequence[float], std: Sequence[float]) -> SSLImageProcessor:
    """Makes the image processor of a data set.

    Args:
        image_size: Side of the square images in pixels.
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel.

    Raises:
        ValueError: A value is out of range, or the channels differ in number.
    """
    if image_size < 1:
        raise ValueError(f"image_size: at least 1 pixel, not {image_size}")
    if len(mean) != len(std):
        raise ValueError(f"std: {len(std)} channels, but mean has {len(mean)}")
    if min(std) <= 0:
        raise ValueError(f"std: positive, not {list(std)}")
    return SSLImageProcessor(
        size={"height": image_size, "width": image_size},
        image_mean=[float(value) for value in mean],
        image_std=[float(value) for value in std],
        do_convert_rgb=len(mean) == 3,
    )


SSLImageProcessor.register_for_auto_class("AutoImageProcessor")
