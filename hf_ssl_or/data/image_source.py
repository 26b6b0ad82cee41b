"""What all sources of images have in common."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from PIL import Image


class ImageReader(Protocol):
    """Images that are opened by number."""

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens image i: a PIL image that need not be decoded yet, or an array (H, W) or (H, W, C).

        Raises:
            ValueError, OSError: This one image cannot be read.
        """
        ...

    def describe(self, i: int) -> str:
        """Returns where image i is, for messages."""
        ...


class ImageSource(ImageReader, Protocol):
    """A split of a data set.

    Attributes:
        name: What the user calls it.
        fingerprint: Changes when the content does.
        labels: int64, (n,), or None where an image has none.
        class_names: Names of the labels, or None.
    """

    name: str
    fingerprint: str
    labels: np.ndarray | None
    class_names: list[str] | None

    def __len__(self) -> int: ...
