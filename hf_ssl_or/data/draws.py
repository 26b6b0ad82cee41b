"""The distributions that views are drawn from: torchvision's, as functions of uniform numbers."""

from __future__ import annotations

import numpy as np

from hf_ssl_or.structures import ViewSpec

_TRIES = 10  # crops that torchvision tries before it takes the largest one
SLOTS = 2 * _TRIES + 2 + 4 + 4 + 5 + 1  # uniform numbers that a view takes


def draw_view(spec: ViewSpec, uniform_BS: np.ndarray, source_size: int) -> dict[str, np.ndarray]:
    """Draws the parameters of a view for B images.

    Args:
        spec: The view.
        uniform_BS: `SLOTS` uniform numbers per image.
        source_size: Side of the stored images in pixels.

    Returns:
        The arrays of `ViewParameters`, without the axis of views.
    """
    tries_BT, rest_BS = np.split(uniform_BS, [2 * _TRIES + 2], axis=1)
    change_B4, order_B4, chance_B5, sigma_B1 = np.split(rest_BS, [4, 8, 13], axis=1)
    spread_4 = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    chosen_B5 = chance_B5 < np.array([spec.flip, spec.jitter, spec.grayscale, spec.blur, spec.solarize])
    flip_B, jitter_B, grayscale_B, blur_B, solarize_B = chosen_B5.T
    low, high = spec.blur_sigma
    return {
        "box_VB4": _draw_boxes(spec, tries_BT, source_size),
        "flip_VB": flip_B,
        "jitter_VB": jitter_B,
        "factor_VB4": np.array([1, 1, 1, 0]) + (2 * change_B4 - 1) * spread_4,
        "order_VB4": np.argsort(order_B4, axis=-1),
        "grayscale_VB": grayscale_B,
        "sigma_VB": np.where(blur_B, low + sigma_B1[:, 0] * (high - low), 0.0),
        "threshold_VB": np.where(solarize_B, spec.solarize_threshold, np.inf),
    }


def _draw_boxes(spec: ViewSpec, uniform_BT: np.ndarray, side: int) -> np.ndarray:
    """Draws crops as `RandomResizedCrop` does: the first of ten tries that fits, else the largest central one."""
    area_BT, log_ratio_BT, place_B2 = np.split(uniform_BT, [_TRIES, 2 * _TRIES], axis=1)
    low, high = spec.crop_scale
    area_BT = side**2 * (low + area_BT * (high - low))
    low, high = np.log(spec.crop_ratio)
    ratio_BT = np.exp(low + log_ratio_BT * (high - low))
    size_B2T = np.rint(np.sqrt(np.stack([area_BT / ratio_BT, area_BT * ratio_BT], axis=1)))  # height, width
    fits_BT = ((size_B2T > 0) & (size_B2T <= side)).all(axis=1)
    size_B2 = np.take_along_axis(size_B2T, fits_BT.argmax(axis=1)[:, None, None], axis=2)[..., 0]
    largest_2 = np.rint(side * np.minimum(1, [1 / spec.crop_ratio[0], spec.crop_ratio[1]]))
    fits_B1 = fits_BT.any(axis=1)[:, None]
    size_B2 = np.where(fits_B1, size_B2, largest_2)
    start_B2 = np.floor(np.where(fits_B1, place_B2 * (side - size_B2 + 1), (side - size_B2) / 2))
    return np.concatenate([start_B2, size_B2], axis=1).astype(np.int64)
