"""Image processor: any image, or the path of one, becomes the normalized square that an encoder was trained on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast
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
    of_kind,
    open_image,
    output_size,
    resize,
    resize_and_crop,
    scale_pixels,
    to_pixels,
)

if TYPE_CHECKING:  # transformers puts into a folder what is imported beside a class: the pipelines go with it
    from .pipeline_ssl import SSLImageFeatureExtractionPipeline  # noqa: F401


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

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a processor from saved settings; those of version 0.1, which squeezed images, crop the center now."""
        side = image_processor_dict.get("size", {}).get("height")
        if side is not None and "crop_size" not in image_processor_dict:
            geometry = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
            channels = {"num_channels": len(image_processor_dict["image_mean"])}
            image_processor_dict = {**image_processor_dict, **geometry, **channels}
        return super().from_dict(image_processor_dict, **kwargs)

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

    def process_image(  # type: ignore[override]
        self, image: Any, num_channels: int, value_range: Any, eight_bit: bool, **_: Any
    ) -> np.ndarray:
        """Converts an image to an upright array (H, W, C)."""
        pixels = to_pixels(image, num_channels)
        if eight_bit and pixels.dtype == np.float32 and not hasattr(image, "mode"):
            return pixels  # an array of values in [0, 255], as other image processors take it
        return of_kind(pixels, value_range, eight_bit)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return list(_flattened(self.fetch_images(images)))

    def _preprocess(  # type: ignore[override]
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
        how: Any = PILImageResampling(resample).name.lower()
        values = []
        for pixels in images:
            if do_resize and size.shortest_edge and do_center_crop and crop_size.height == crop_size.width:
                pixels = resize_and_crop(pixels, size.shortest_edge, cast(int, crop_size.height), how)
            elif do_resize and size.shortest_edge:
                pixels = resize(pixels, output_size(pixels.shape[:2], size.shortest_edge), how)
            elif do_resize:
                pixels = resize(pixels, (cast(int, size.height), cast(int, size.width)), how)
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
    settings: dict[str, Any] = {
        "size": {"shortest_edge": preprocessing.resize_to},
        "crop_size": {"height": side, "width": side},
        "crop_pct": preprocessing.crop_pct,
        "resample": getattr(PILImageResampling, preprocessing.interpolation.upper()),
        "num_channels": preprocessing.num_channels,
        "value_range": preprocessing.value_range,
        "eight_bit": preprocessing.eight_bit,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    return SSLImageProcessor(**settings)


def preprocessing_of(processor: Any) -> Preprocessing:
    """Returns what an image processor of this package, or of a transformers model, does.

    One that squeezes images to a square is taken to crop their center instead: no encoder here gets a squeezed image.

    Raises:
        ValueError: A value is missing, or out of range.
    """
    settings = processor.to_dict()
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    side, shorter = _side(crop or settings["size"]), _side(settings["size"])
    normalizes = settings.get("do_normalize", True)
    mean = list(settings["image_mean"]) if normalizes else [0.0] * 3
    return Preprocessing(
        image_size=side,
        num_channels=len(mean),
        # Half a pixel more, for the quotient to be rounded down to the size that the processor names.
        crop_pct=settings.get("crop_pct") or (1.0 if shorter <= side else side / (shorter + 0.5)),
        interpolation=cast(Any, PILImageResampling(settings.get("resample", 2)).name.lower()),
        eight_bit=settings.get("eight_bit", True),
        value_range=settings.get("value_range", (0.0, 255.0)),
        mean=tuple(mean),
        std=tuple(settings["image_std"]) if normalizes else (1.0,) * len(mean),
    )


def stock_processor(preprocessing: Preprocessing) -> dict[str, Any] | None:
    """Returns the settings of the one image processor of transformers that does the same to the bit.

    It resizes and crops as timm does, and reads `pretrained_cfg` from the model's config.json; in
    preprocessor_config.json transformers only finds its class.

    Returns:
        None for images that it does not take: it knows 8-bit RGB alone.
    """
    p = preprocessing
    if not p.eight_bit or p.num_channels != 3 or p.value_range != (0, 255):
        return None
    transform = {
        "input_size": [p.num_channels, p.image_size, p.image_size],
        "interpolation": p.interpolation,
        "crop_pct": p.crop_pct,
        "crop_mode": "center",
        "mean": list(p.mean),
        "std": list(p.std),
    }
    return {"image_processor_type": "TimmWrapperImageProcessor", "pretrained_cfg": transform}


def _side(size: Any) -> int:
    """Returns the side that a processor's size names, in any of the forms that it takes."""
    return int(size if isinstance(size, int) else size.get("height") or size.get("shortest_edge"))


SSLImageProcessor.register_for_auto_class("AutoImageProcessor")
