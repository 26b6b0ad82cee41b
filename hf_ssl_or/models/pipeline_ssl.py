"""Pipelines that hand an image to the image processor as it is: transformers' own first make 8-bit RGB of it."""

from __future__ import annotations

from typing import Any

from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline


class _OwnPixels:
    image_processor: Any
    dtype: Any

    def preprocess(self, image: Any, timeout: float | None = None, **image_processor_kwargs: Any) -> Any:
        """Returns the inputs of the model.

        Args:
            image: What the image processor takes: a path, a URL, a PIL image, an array or a tensor.
            timeout: Seconds to wait for an image from the web, for image processors of transformers.
            **image_processor_kwargs: Arguments for the image processor.
        """
        # By its name: code in a folder of the Hub is loaded once for the processor, and again for the pipeline.
        if type(self.image_processor).__name__ != "SSLImageProcessor":
            return super().preprocess(image, timeout=timeout, **image_processor_kwargs)  # type: ignore[misc]
        return self.image_processor(image, return_tensors="pt", **image_processor_kwargs).to(self.dtype)


class SSLImageFeatureExtractionPipeline(_OwnPixels, ImageFeatureExtractionPipeline):
    """Image feature extraction from images of any kind."""


class SSLImageClassificationPipeline(_OwnPixels, ImageClassificationPipeline):
    """Image classification of images of any kind."""
