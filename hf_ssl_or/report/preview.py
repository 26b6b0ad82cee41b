"""A picture of what the method will see: one row per image, the clean image and its views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.neighbors import as_rgb
from hf_ssl_or.structures import ViewSpec

TILE = 96  # pixels of a tile's side: small images are enlarged so that a person can see them
GAP = 4


def plot_preview(data: ImageSet, groups: Sequence[list[ViewSpec]], path: Path, *, seed: int, images: int = 8) -> None:
    """Writes a PNG of the views of some images, drawn with the run's own keys for epoch 0.

    Args:
        data: The images.
        groups: Specs of the views and of the smaller local views, see `hf_ssl_or.run.view_specs`.
        path: The PNG.
        seed: Seed of the run.
        images: How many images to show, one per row.
    """
    if images < 1:
        raise InputError(f"--images: at least 1, not {images}")
    index_B = np.linspace(0, len(data) - 1, min(images, len(data))).astype(np.int64)
    plan = ViewPlan(
        index_B,
        tuple(ViewGroup(specs=tuple(specs), size=data.image_size, seed=seed, epoch=0) for specs in groups if specs),
    )
    ((views, shown_B),) = data.views([plan])
    mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    rows = [data.unit_squares(shown_B)[None], *(group_VBCHW * std_C11 + mean_C11 for group_VBCHW in views)]
    rows = [as_rgb(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in rows]
    try:
        Image.fromarray(_grid(rows)).save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written as a picture ({error})") from error


def _grid(groups: list[Tensor]) -> np.ndarray:
    """Lays out groups of (V, B, 3, h, w) in [0, 1] as one (H, W, 3) uint8 picture, B rows."""
    tiles = [F.interpolate(view_BCHW, size=(TILE, TILE), mode="nearest") for group in groups for view_BCHW in group]
    columns = torch.stack(tiles, 1)  # (B, 1 + V, 3, TILE, TILE)
    padded = F.pad(columns, (GAP, 0, GAP, 0), value=1.0)
    picture = padded.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
