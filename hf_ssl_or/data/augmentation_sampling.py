"""The distributions that views are sampled from: torchvision's, as functions of uniform numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_ssl_or.randomness import keyed_uniform
from hf_ssl_or.structures import ViewSpec

_TRIES = 10  # crops that torchvision tries before it takes the largest one
_BOX = 2 * _TRIES + 2
SLOTS = _BOX + 4 + 4 + 5 + 1 + 8  # uniform numbers that a view takes


@dataclass(frozen=True, kw_only=True)
class ViewGroup:
    """Views of one size that are rendered together.

    Attributes:
        specs: One spec per view.
        size: Side of the views in pixels.
        seed: Seed of the run.
        epoch: Pass over the data.
        first_view: Number of the first view, so that local views get other numbers than global ones.
    """

    specs: tuple[ViewSpec, ...]
    size: int
    seed: int
    epoch: int
    first_view: int = 0

    def __post_init__(self) -> None:
        sizes = {spec.size or self.size for spec in self.specs}
        if len(sizes) > 1:
            raise ValueError(f"views of sizes {sorted(sizes)} cannot be rendered together")
        for size in sizes:
            object.__setattr__(self, "size", size)

    def uniform(self, index_B: np.ndarray, view: int) -> np.ndarray:
        """Returns the numbers of a view: float64 (B, SLOTS), functions of (seed, epoch, image, view) alone."""
        return keyed_uniform(np.asarray(index_B), SLOTS, self.seed, "view", self.epoch, self.first_view + view)

    def boxes(self, index_B: np.ndarray, sizes_B2: np.ndarray) -> np.ndarray:
        """Samples each view's crop of each image, see `sample_boxes`: (V, B, 4)."""
        return np.stack(
            [
                sample_boxes(spec, self.uniform(index_B, view)[:, :_BOX], sizes_B2)
                for view, spec in enumerate(self.specs)
            ]
        )


@dataclass(frozen=True)
class ViewPlan:
    """What a step wants of some images.

    Attributes:
        index_B: Places of the images in their set.
        groups: Views of them.
    """

    index_B: np.ndarray
    groups: tuple[ViewGroup, ...]


def sample_boxes(spec: ViewSpec, uniform_BT: np.ndarray, sizes_B2: np.ndarray) -> np.ndarray:
    """Samples crops as `torchvision.transforms.v2.RandomResizedCrop` does: the first of ten tries that fits.

    If none fits it is the largest central crop whose aspect ratio is allowed.

    Args:
        spec: The view.
        uniform_BT: 22 uniform numbers per image.
        sizes_B2: Height and width of each original in pixels.

    Returns:
        Top, left, height and width in pixels of the original, int64 (B, 4).
    """
    area_BT, log_ratio_BT, place_B2 = np.split(uniform_BT, [_TRIES, 2 * _TRIES], axis=1)
    sizes_B2 = np.asarray(sizes_B2, dtype=np.float64)
    low, high = spec.crop_scale
    area_BT = sizes_B2.prod(axis=1, keepdims=True) * (low + area_BT * (high - low))
    low, high = np.log(spec.crop_ratio)
    ratio_BT = np.exp(low + log_ratio_BT * (high - low))
    size_B2T = np.rint(np.sqrt(np.stack([area_BT / ratio_BT, area_BT * ratio_BT], axis=1)))  # height, width
    fits_BT = ((size_B2T > 0) & (size_B2T <= sizes_B2[..., None])).all(axis=1)
    size_B2 = np.take_along_axis(size_B2T, fits_BT.argmax(axis=1)[:, None, None], axis=2)[..., 0]
    fits_B1 = fits_BT.any(axis=1)[:, None]
    size_B2 = np.where(fits_B1, size_B2, _largest_boxes(spec, sizes_B2))
    start_B2 = np.floor(np.where(fits_B1, place_B2 * (sizes_B2 - size_B2 + 1), (sizes_B2 - size_B2) / 2))
    return np.concatenate([start_B2, size_B2], axis=1).astype(np.int64)


def _largest_boxes(spec: ViewSpec, sizes_B2: np.ndarray) -> np.ndarray:
    """Returns height and width of the largest crop of an allowed aspect ratio."""
    height_B, width_B = sizes_B2.T
    low, high = spec.crop_ratio
    return np.stack([np.minimum(height_B, np.rint(width_B / low)), np.minimum(width_B, np.rint(height_B * high))], 1)


def sample_view(spec: ViewSpec, uniform_BS: np.ndarray) -> dict[str, np.ndarray]:
    """Samples everything about a view of B images but the crop.

    Args:
        spec: The view.
        uniform_BS: `SLOTS` uniform numbers per image.

    Returns:
        The arrays of `ViewParameters`, without the axis of views.
    """
    rest_BS = uniform_BS[:, _BOX:]
    change_B4, order_B4, chance_B5, sigma_B1, new_B8 = np.split(rest_BS, [4, 8, 13, 14], axis=1)
    spread_4 = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    chosen_B5 = chance_B5 < np.array([spec.flip, spec.jitter, spec.grayscale, spec.blur, spec.solarize])
    flip_B, jitter_B, grayscale_B, blur_B, solarize_B = chosen_B5.T
    chances_4 = np.array([spec.vertical_flip, spec.rotate, spec.noise, spec.channel_drop])
    vertical_B, rotate_B, noise_B, drop_B = (new_B8[:, :4] < chances_4).T
    turns_B, level_B, seed_B, channel_B = new_B8[:, 4:].T
    low, high = spec.blur_sigma
    quiet, loud = spec.noise_std
    return {
        **_oriented(flip_B, vertical_B, np.where(rotate_B, 1 + np.floor(3 * turns_B), 0)),
        "jitter_VB": jitter_B,
        "factor_VB4": np.array([1, 1, 1, 0]) + (2 * change_B4 - 1) * spread_4,
        "order_VB4": np.argsort(order_B4, axis=-1),
        "grayscale_VB": grayscale_B,
        "sigma_VB": np.where(blur_B, low + sigma_B1[:, 0] * (high - low), 0.0),
        "threshold_VB": np.where(solarize_B, spec.solarize_threshold, np.inf),
        "noise_VB": np.where(noise_B, quiet + level_B * (loud - quiet), 0.0),
        "noise_seed_VB": (seed_B * 2**53).astype(np.int64),
        "dropped_VB": np.where(drop_B, channel_B, -1.0),
    }


def sample_channels(spec: ViewSpec, uniform_B2C: np.ndarray) -> np.ndarray:
    """Samples factors of brightness and contrast of every channel on its own: (B, 2, C) around 1."""
    spread_21 = np.array([[spec.channel_brightness], [spec.channel_contrast]])
    return 1 + (2 * uniform_B2C - 1) * spread_21


def _oriented(flip_B: np.ndarray, vertical_B: np.ndarray, turns_B: np.ndarray) -> dict[str, np.ndarray]:
    """Writes flips and counterclockwise quarter turns after them as a transposition, then flips of the result.

    A turn is a transposition and a flip of the rows. Where axes are exchanged, flips that came before exchange too.
    """
    odd_B, half_B = turns_B % 2 == 1, turns_B >= 2
    rows_B = np.where(odd_B, flip_B, vertical_B) ^ odd_B ^ half_B
    columns_B = np.where(odd_B, vertical_B, flip_B) ^ half_B
    return {"transpose_VB": odd_B, "flip_rows_VB": rows_B, "flip_columns_VB": columns_B}


def check_channels(specs: Sequence[ViewSpec], num_channels: int) -> str | None:
    """Names what specs ask for that images of so many channels do not have; None if all is well."""
    needs_rgb = ("saturation", "hue", "grayscale")
    asked = [name for name in needs_rgb if any(getattr(spec, name) > 0 for spec in specs)]
    if asked and num_channels != 3:
        found = f"{num_channels} channel{'s' * (num_channels > 1)}"
        return f"{', '.join(asked)} need RGB images, not {found}; set them to 0"
    if num_channels == 1 and any(spec.channel_drop > 0 for spec in specs):
        return "channel_drop leaves nothing of images of 1 channel; set it to 0"
    return None


def without_color(spec: ViewSpec) -> ViewSpec:
    """Returns a spec without what needs RGB."""
    return dataclasses.replace(spec, saturation=0.0, hue=0.0, grayscale=0.0)
