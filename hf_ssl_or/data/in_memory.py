"""Images that a program holds: PIL images, arrays, paths, or encoded bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_ssl_or.data.labels import content_key, encode_labels
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import open_image


class ListSource:
    """A list of images.

    Args:
        images: PIL images, arrays (H, W) or (H, W, C), tensors, paths, or encoded bytes, in any mixture.
        labels: Numbers or words, one per image; None for unlabeled images.
        name: What the user calls it.
        class_names: Names of the classes 0, 1, ... if the labels are their numbers.

    Raises:
        InputError: An object is no image, there are more or fewer labels than images, or a label has no class.
    """

    def __init__(
        self,
        images: Sequence[Any] | np.ndarray,
        labels: Sequence[Any] | np.ndarray | torch.Tensor | None = None,
        *,
        name: str = "images",
        class_names: list[str] | None = None,
    ) -> None:
        self.name, self._images = name, list(images)
        if labels is not None and len(labels) != len(self._images):
            raise InputError(f"{name}: {len(labels)} labels for {len(self._images)} images")
        values = labels.tolist() if isinstance(labels, torch.Tensor | np.ndarray) else list(labels or ())
        self.labels, self.class_names = encode_labels(values, class_names)
        digest = hashlib.sha256()
        for i, image in enumerate(self._images):
            check_image(image, self.describe(i))
            hash_image(digest, image)
        self.fingerprint = content_key(digest.hexdigest(), self.labels)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> Any:
        """Returns image i, or opens it where it is a path."""
        image = self._images[i]
        return open_image(image) if isinstance(image, str | os.PathLike | bytes) else image

    def describe(self, i: int) -> str:
        """Returns what messages call image i."""
        image = self._images[i]
        path = f" ({os.fspath(image)})" if isinstance(image, str | os.PathLike) else ""
        return f"image {i} of {self.name}{path}"


def check_image(image: Any, place: str) -> None:
    """Refuses what is no image, and no path of one.

    Raises:
        InputError: It is of another type, or a URL.
    """
    if not isinstance(image, str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor):
        raise InputError(f"{place}: {type(image).__name__} is no PIL image, array or path")
    if isinstance(image, str) and "://" in image:
        raise InputError(f"{place}: {image[:200]} is a URL; copy the image here and give its path")


def hash_image(digest: Any, image: Any) -> None:
    """Adds what an image looks like; one that cannot be read adds its path."""
    if isinstance(image, str | os.PathLike):
        try:
            content = Path(image).read_bytes()
        except (OSError, ValueError):  # it is counted, and named, when all are decoded
            content = os.fsencode(image)
        kind: Any = "file"
    elif isinstance(image, bytes):
        content, kind = image, "bytes"
    elif isinstance(image, Image.Image):
        try:
            content = image.tobytes()
        except (OSError, ValueError):
            content = b""
        palette, clear = image.getpalette(), image.info.get("transparency")
        kind = (image.mode, image.size, image.getexif().get(0x0112), palette, clear)
    else:
        array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
        content, kind = np.ascontiguousarray(array).tobytes(), (array.dtype.str, array.shape, type(image).__name__)
    digest.update(f"{kind}:{len(content)}:".encode())
    digest.update(content)
