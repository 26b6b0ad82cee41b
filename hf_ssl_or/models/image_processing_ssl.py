"""Image processor: any image, or the path of one, becomes the square, normalized input that an encoder was trained on."""

from __future__ import annotations

import os
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_conversion import (
    Preprocessing,
    normalize_pixels,
    open_image,
    output_size,
    resize,
    resize_and_crop,
    scale_pixels,
    to_pixels,
)


class SSLImageProcessorKwargs(ImagesKwargs, total=False):
    """What this processor takes beside the usual arguments, see `image_conversion.Preprocessing`."""

    num_channels: int
    value_range: Any
    eight_bit: bool
    crop_pct: float


class SSLImageProcessor(TorchvisionBackend):
    """Resizes the shorter side, crops the center, scales the values to [0, 1] and normalizes by channel.

    Images are paths, URLs, PIL images in any mode, arrays or tensors: 1 to 32 channels, of 8 or 16 bits or float32.
    The pixels are those of training's evaluation, of timm and of torchvision: PIL resizes, on the CPU.

    Attributes:
        size: Shorter side after the resize in pixels.
        crop_size: Height and width of the result in pixels.
        crop_pct: Share of the resized shorter side that the result keeps.
        resample: Filter of the resize.
        num_channels: Channels of the result.
        value_range: Pixel values that become 0 and 1, or "dtype" for the range of each image's own type.
        eight_bit: Whether the encoder was trained on 8-bit pixels; images of the other kind are refused.
        image_mean: Mean of each channel, for values in [0, 1].
        image_std: Standard deviation of each channel.
    """

    valid_kwargs = SSLImageProcessorKwargs

    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 224}
    crop_size = {"height": 224, "width": 224}
    crop_pct = 1.0
    default_to_square = False
    num_channels = 3
    value_range = (0.0, 255.0)
    eight_bit = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths and URLs, alone or in lists; passes over what is an image already."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(("http://", "https://")):
            with urlopen(image_url_or_urls, timeout=60) as response:
                return open_image(response.read())
        if isinstance(image_url_or_urls, str | os.PathLike | bytes):
            return open_image(image_url_or_urls)
        return image_url_or_urls

    def process_image(self, image: Any, num_channels: int, value_range: Any, eight_bit: bool, **_: Any) -> np.ndarray:
        """Converts an image to an upright array (H, W, C)."""
        pixels = to_pixels(image, num_channels)
        if eight_bit and pixels.dtype == np.float32 and not hasattr(image, "mode"):
            return pixels  # an array of values in [0, 255], as other image processors take it
        kind = {"num_channels": num_channels, "value_range": value_range, "eight_bit": eight_bit}
        kind |= {"mean": (0,) * num_channels, "std": (1,) * num_channels}
        Preprocessing(image_size=1, **kind).check_kind(pixels)
        return pixels

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return list(_flattened(self.fetch_images(images)))

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        value_range: Any,
        return_tensors: Any = None,
        device: Any = None,
        **_: Any,
    ) -> BatchFeature:
        filter_name = PILImageResampling(resample).name.lower()
        values = []
        for pixels in images:
            if do_resize and size.shortest_edge and do_center_crop and crop_size.height == crop_size.width:
                pixels = resize_and_crop(pixels, size.shortest_edge, crop_size.height, filter_name)
            elif do_resize:
                wanted = (size.height, size.width) if size.height else output_size(pixels.shape, size.shortest_edge)
                pixels = resize(pixels, wanted, filter_name)
            x_CHW = torch.from_numpy(np.array(pixels.transpose(2, 0, 1)))
            x_CHW = scale_pixels(x_CHW, value_range) if do_rescale else x_CHW.float()
            values.append(normalize_pixels(x_CHW, image_mean, image_std) if do_normalize else x_CHW)
        if device is not None:
            values = [x_CHW.to(device) for x_CHW in values]
        return BatchFeature(data={"pixel_values": values}, tensor_type=return_tensors)


def _flattened(images: Any) -> Any:
    """Yields the images of nested lists and of arrays with a batch axis."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from _flattened(item)
    elif getattr(images, "ndim", 3) == 4:
        yield from images
    else:
        yield images


def build_image_processor(preprocessing: Preprocessing) -> SSLImageProcessor:
    """Makes the image processor that does what `preprocessing` says."""
    side = preprocessing.image_size
    return SSLImageProcessor(
        size={"shortest_edge": preprocessing.resize_to},
        crop_size={"height": side, "width": side},
        crop_pct=preprocessing.crop_pct,
        resample=PILImageResampling[preprocessing.interpolation.upper()],
        num_channels=preprocessing.num_channels,
        value_range=preprocessing.value_range,
        eight_bit=preprocessing.eight_bit,
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )


SSLImageProcessor.register_for_auto_class("AutoImageProcessor")
