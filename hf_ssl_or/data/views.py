"""Random views of a batch of images: parameters on the host, keyed by image, then one batch of tensor operations.

`draw_parameters` gives numbers that depend on (seed, epoch, image, view) alone: an image's view is the same whatever
batch, process or restart it comes in. `render_views` needs no random state and never waits for the device: all that
decides which operation runs on which image is known on the host, which sorts the images so that each operation works
on one slice. The distributions and operations are torchvision's (`RandomResizedCrop`, `RandomHorizontalFlip`,
`ColorJitter` with an order of its own for each image, `RandomGrayscale`, `GaussianBlur`, `RandomSolarize`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.data import color
from hf_ssl_or.data.draws import SLOTS, draw_view
from hf_ssl_or.data.resample import apply_lines, blur_matrix, crop_matrix
from hf_ssl_or.randomness import keyed_uniform
from hf_ssl_or.structures import ViewSpec

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CHUNK_PIXELS = {"cpu": 2**17}  # what a core's cache holds
_CHUNK_PIXELS_DEVICE = 2**25  # about 2 GB of intermediate results


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """How V views of B images are rendered; numpy arrays, one entry per (view, image).

    Attributes:
        size: Side of the views.
        source_size: Side of the images they are cut from.
        box_VB4: Crop in pixels of the source: top, left, height, width.
        flip_VB: Whether the view is mirrored.
        jitter_VB: Whether colours are jittered.
        factor_VB4: Factors of brightness, contrast and saturation, and the shift of hue.
        order_VB4: Which of these four is applied first, second, third, fourth.
        grayscale_VB: Whether the view is grey.
        sigma_VB: Standard deviation of the blur in pixels; 0 for none.
        blur_radius: Half-width of the blur's kernel.
        threshold_VB: Threshold of solarisation; infinite for none.
    """

    size: int
    source_size: int
    box_VB4: np.ndarray
    flip_VB: np.ndarray
    jitter_VB: np.ndarray
    factor_VB4: np.ndarray
    order_VB4: np.ndarray
    grayscale_VB: np.ndarray
    sigma_VB: np.ndarray
    blur_radius: int
    threshold_VB: np.ndarray


def draw_parameters(
    specs: Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    index_B: np.ndarray,
    source_size: int,
    image_size: int | None = None,
    first_view: int = 0,
) -> ViewParameters:
    """Draws the parameters of one view per spec for each image.

    Args:
        specs: The views; all of one size.
        seed: Seed of the run.
        epoch: Pass over the data.
        index_B: Indices of the images in the data set.
        source_size: Side of the stored images in pixels.
        image_size: Size of views whose spec names none; None takes `source_size`.
        first_view: Number of the first view, so that local views draw other numbers than global ones.

    Raises:
        ValueError: The views differ in size.
    """
    sizes = {spec.size or image_size or source_size for spec in specs}
    if len(sizes) != 1:
        raise ValueError(f"views of sizes {sorted(sizes)} cannot be rendered together")
    size = sizes.pop()
    views = []
    for view, spec in enumerate(specs, start=first_view):
        uniform_BS = keyed_uniform(np.asarray(index_B), SLOTS, seed, "view", epoch, view)
        views.append(draw_view(spec, uniform_BS, source_size))
    blurred = [spec.blur_sigma[1] for spec in specs if spec.blur > 0]
    return ViewParameters(
        size=size,
        source_size=source_size,
        blur_radius=min(math.ceil(4 * max(blurred, default=0)), size - 1),
        **{name: np.stack([view[name] for view in views]) for name in views[0]},
    )


@torch.no_grad()
def render_views(
    images_BCHW: Tensor, parameters: ViewParameters, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Renders all views of all images, on the images' device, without waiting for it.

    Args:
        images_BCHW: uint8 images of side `parameters.source_size`, in the order of the parameters.
        parameters: From `draw_parameters`.
        mean: Mean per channel of images in [0, 1].
        std: Standard deviation per channel.

    Returns:
        views_VBCHW, float32: (x / 255 - mean) / std.
    """
    views, batch = parameters.flip_VB.shape
    device, size = images_BCHW.device, parameters.size
    scale, shift = _normalisation(tuple(mean), tuple(std), device)
    plan = _plan(parameters)
    out_NCHW = torch.empty(views * batch, 3, size, size, device=device)
    chunk = max(1, _CHUNK_PIXELS.get(device.type, _CHUNK_PIXELS_DEVICE) // max(size, parameters.source_size) ** 2)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, views * batch, chunk):
            part = plan.part(start, start + chunk)
            images_NCHW = images_BCHW.index_select(0, _move(part.order_N % batch, device))
            x_NCHW = _render(images_NCHW, part, size, parameters.blur_radius)
            torch.addcmul(shift, x_NCHW, scale, out=x_NCHW)
            out_NCHW.index_copy_(0, _move(part.order_N, device), x_NCHW)
    return out_NCHW.view(views, batch, 3, size, size)


@torch.no_grad()
def clean_views(images_BCHW: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resizes whole uint8 images and normalises them, without randomness: (B, 3, size, size), float32."""
    x_BCHW = images_BCHW.float() / 255
    if x_BCHW.shape[-1] != size:
        x_BCHW = F.interpolate(x_BCHW, (size, size), mode="bilinear", antialias=True)
    scale, shift = _normalisation(tuple(mean), tuple(std), images_BCHW.device)
    return torch.addcmul(shift, x_BCHW, scale)


def _render(images_NCHW: Tensor, plan: _Plan, size: int, blur_radius: int) -> Tensor:
    """Gives the views of `plan`, in its order, in [0, 1]."""
    device = images_NCHW.device
    top, left, height, width, flip, hue, *blends = _move(plan.table_NP.T.copy(), device).unbind(0)
    rows = crop_matrix(top, height, size, images_NCHW.shape[2]).div_(255)
    columns = crop_matrix(left, width, size, images_NCHW.shape[3], flip)
    x_NCHW = apply_lines(images_NCHW, rows, columns)
    bounds = np.searchsorted(plan.stage_N, range(_PLAIN + 1))
    jittered = slice(0, int(bounds[_PLAIN]))
    for stage in range(4):
        shifted = slice(int(bounds[stage]), int(bounds[stage + 1]))
        if shifted.start < shifted.stop:
            color.shift_hue_(x_NCHW[shifted], hue[shifted])
        if stage < 3 and jittered.stop:
            color.blend_(x_NCHW[jittered], *(weight[jittered] for weight in blends[3 * stage : 3 * stage + 3]))
    if (gray := np.flatnonzero(plan.gray_N)).size:
        which = _move(gray, device)
        x_NCHW.index_copy_(0, which, color.gray(x_NCHW.index_select(0, which)).expand(-1, 3, -1, -1))
    if (blurred := np.flatnonzero(plan.sigma_N)).size:
        which = _move(blurred, device)
        matrix = blur_matrix(_move(plan.sigma_N[blurred], device), blur_radius, size)
        x_NCHW.index_copy_(0, which, apply_lines(x_NCHW.index_select(0, which), matrix, matrix))
    if np.isfinite(plan.threshold_N).any():
        color.solarize_(x_NCHW, _move(plan.threshold_N, device))
    return x_NCHW


# ---------------------------------------------------------------------------------------------------------------------
# What the host decides, so that the device need not

_NO_HUE, _PLAIN = 4, 5


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Parameters of N = V*B views, sorted by stage: how many other jitters come before the shift of hue.

    Attributes:
        order_N: Place of each in the flat (V*B) order.
        stage_N: 0-3; 4 for jitter without a shift of hue; 5 for none.
        table_NP: Box (4), flip, hue shift, and for each of the three other jitters the weights of `color.blend_`.
        gray_N: Whether the view is grey.
        sigma_N: Standard deviation of the blur.
        threshold_N: Threshold of solarisation.
    """

    order_N: np.ndarray
    stage_N: np.ndarray
    table_NP: np.ndarray
    gray_N: np.ndarray
    sigma_N: np.ndarray
    threshold_N: np.ndarray

    def part(self, start: int, stop: int) -> _Plan:
        return _Plan(**{name: values[start:stop] for name, values in vars(self).items()})


def _plan(parameters: ViewParameters) -> _Plan:
    factor_N4, order_N4 = parameters.factor_VB4.reshape(-1, 4), parameters.order_VB4.reshape(-1, 4)
    stage_N = (order_N4 == _HUE).argmax(axis=1)
    stage_N[factor_N4[:, _HUE] == 0] = _NO_HUE
    stage_N[~parameters.jitter_VB.reshape(-1)] = _PLAIN
    kind_N3 = order_N4[order_N4 != _HUE].reshape(-1, 3)
    factor_N3 = np.take_along_axis(factor_N4, kind_N3, axis=1)
    other_N3 = 1 - factor_N3
    blends = [factor_N3, other_N3 * (kind_N3 == _SATURATION), other_N3 * (kind_N3 == _CONTRAST)]
    columns = [
        parameters.box_VB4.reshape(-1, 4),
        parameters.flip_VB.reshape(-1, 1),
        factor_N4[:, _HUE:],
        np.stack(blends, axis=-1).reshape(-1, 9),
    ]
    order_N = np.argsort(stage_N, kind="stable")
    return _Plan(
        order_N=order_N,
        stage_N=stage_N[order_N],
        table_NP=np.concatenate(columns, axis=1).astype(np.float32)[order_N],
        gray_N=parameters.grayscale_VB.reshape(-1)[order_N],
        sigma_N=parameters.sigma_VB.reshape(-1).astype(np.float32)[order_N],
        threshold_N=parameters.threshold_VB.reshape(-1).astype(np.float32)[order_N],
    )


def _move(values: np.ndarray, device: torch.device) -> Tensor:
    """Copies a small array to the device; from pinned memory, for the host not to wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@lru_cache(maxsize=8)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift that normalise, (3, 1, 1) each."""
    mean_3, std_3 = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / std_3).float().view(3, 1, 1).to(device), (-mean_3 / std_3).float().view(3, 1, 1).to(device)
