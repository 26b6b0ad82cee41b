"""Random views of a batch of images: parameters on the host, keyed by image, then one batch of tensor operations.

`sample_parameters` returns numbers that depend on (seed, epoch, image, view) alone: an image's view is the same
whatever batch, process or restart it comes in. `render_views` needs no random state and never waits for the device:
all that decides which operation runs on which image is known on the host, which sorts the images so that each
operation works on one slice. The distributions and operations are torchvision's (`RandomResizedCrop`,
`RandomHorizontalFlip`, `ColorJitter` with an order of its own for each image, `RandomGrayscale`, `GaussianBlur`,
`RandomSolarize`), and some for images of other channels than RGB.

Crops are cut in one of two ways. Small images of one size are a tensor on the device, and matrices crop and resize
them there. Of others, which differ in size or are large, `crop_views` cuts each view out of its image on the host, and
the device gets squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data import color
from hf_ssl_or.data.augmentation_sampling import ViewGroup, sample_channels, sample_view
from hf_ssl_or.data.resize_matrices import apply_lines, blur_matrix, crop_matrix, resize_fast
from hf_ssl_or.models.image_conversion import Preprocessing, dtype_range, normalize_pixels, scale_pixels
from hf_ssl_or.randomness import keyed_normal, keyed_uniform

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CHUNK_PIXELS = {"cpu": 2**17}  # what a core's cache holds
_CHUNK_PIXELS_DEVICE = 2**25  # about 2 GB of intermediate results


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """How V views of B images are rendered; numpy arrays, one entry per (view, image).

    Attributes:
        size: Side of the views.
        box_VB4: Crop in pixels of the images that are rendered: top, left, height, width; None where it is done.
        transpose_VB: Whether rows and columns are exchanged.
        flip_rows_VB: Whether the view is upside down, after that.
        flip_columns_VB: Whether it is mirrored, after that.
        jitter_VB: Whether colors are jittered.
        factor_VB4: Factors of brightness, contrast and saturation, and the shift of hue.
        order_VB4: Which of these four is applied first, second, third, fourth.
        channel_factor_VB2C: Factors of brightness and contrast of each channel; None for none.
        grayscale_VB: Whether the view is gray.
        sigma_VB: Standard deviation of the blur in pixels; 0 for none.
        blur_radius: Half-width of the blur's kernel.
        threshold_VB: Threshold of solarization; infinite for none.
        noise_VB: Standard deviation of the noise; 0 for none.
        noise_seed_VB: Key of the noise.
        dropped_VB: Which channel is dropped, as a share of them; -1 for none.
    """

    size: int
    box_VB4: np.ndarray | None
    transpose_VB: np.ndarray
    flip_rows_VB: np.ndarray
    flip_columns_VB: np.ndarray
    jitter_VB: np.ndarray
    factor_VB4: np.ndarray
    order_VB4: np.ndarray
    channel_factor_VB2C: np.ndarray | None
    grayscale_VB: np.ndarray
    sigma_VB: np.ndarray
    blur_radius: int
    threshold_VB: np.ndarray
    noise_VB: np.ndarray
    noise_seed_VB: np.ndarray
    dropped_VB: np.ndarray


def sample_parameters(
    group: ViewGroup,
    index_B: np.ndarray,
    *,
    num_channels: int = 3,
    original_size: tuple[int, int] | None = None,
    stored_size: tuple[int, int] | None = None,
) -> ViewParameters:
    """Samples the parameters of a group of views for each image.

    Args:
        group: The views.
        index_B: Places of the images in the data set.
        num_channels: Channels of the images.
        original_size: Height and width of the originals, whose crops are sampled here; None where crops are cut.
        stored_size: Height and width of the images that are rendered; None for those of the originals.
    """
    views = [sample_view(spec, group.uniform(index_B, view)) for view, spec in enumerate(group.specs)]
    stacked = {name: np.stack([view[name] for view in views]) for name in views[0]}
    box_VB4 = None
    if original_size is not None:
        scale_2 = np.divide(stored_size or original_size, original_size)
        box_VB4 = group.boxes(index_B, np.tile(original_size, (len(index_B), 1))) * np.tile(scale_2, 2)
    blurred = [spec.blur_sigma[1] for spec in group.specs if spec.blur > 0]
    return ViewParameters(
        size=group.size,
        box_VB4=box_VB4,
        channel_factor_VB2C=_channel_factors(group, index_B, num_channels),
        blur_radius=min(math.ceil(4 * max(blurred, default=0)), group.size - 1),
        **stacked,
    )


def _channel_factors(group: ViewGroup, index_B: np.ndarray, num_channels: int) -> np.ndarray | None:
    if not any(spec.channel_brightness or spec.channel_contrast for spec in group.specs):
        return None
    factors = []
    for view, spec in enumerate(group.specs, start=group.first_view):
        uniform = keyed_uniform(np.asarray(index_B), 2 * num_channels, group.seed, "channels", group.epoch, view)
        factors.append(sample_channels(spec, uniform.reshape(-1, 2, num_channels)))
    return np.stack(factors)


def crop_views(
    pixels_HWC: np.ndarray, original_size: tuple[int, int], boxes_V4: np.ndarray, size: int, out_VSSC: np.ndarray
) -> None:
    """Cuts views out of one image on the host: resizes each box, bilinear and antialiased.

    Args:
        pixels_HWC: The image, as large as it was decoded.
        original_size: Height and width of the original, whose pixels the boxes count.
        boxes_V4: Top, left, height and width of each view's crop; rounded to the pixels of the image as it is.
        size: Side of the views.
        out_VSSC: Where they are written.
    """
    height, width = pixels_HWC.shape[:2]
    top, left = boxes_V4[:, 0] * (height / original_size[0]), boxes_V4[:, 1] * (width / original_size[1])
    bottom = top + boxes_V4[:, 2] * (height / original_size[0])
    right = left + boxes_V4[:, 3] * (width / original_size[1])
    edges_V4 = np.rint(np.stack([top, left, bottom, right], axis=1)).astype(np.int64)
    for view, (first_row, first_column, stop_row, stop_column) in enumerate(edges_V4.tolist()):
        rows = slice(min(first_row, height - 1), max(stop_row, first_row + 1))
        columns = slice(min(first_column, width - 1), max(stop_column, first_column + 1))
        out_VSSC[view] = resize_fast(pixels_HWC[rows, columns], (size, size))


@torch.no_grad()
def render_views(images: Tensor, parameters: ViewParameters, preprocessing: Preprocessing) -> Tensor:
    """Renders all views of all images, on the images' device, without waiting for it.

    Args:
        images: Images (B, H, W, C) where the parameters have boxes, else the crops (V, B, size, size, C).
        parameters: From `sample_parameters`, in the order of the images.
        preprocessing: Range of the values, mean and standard deviation.

    Returns:
        views_VBCHW, float32, normalized.
    """
    views, batch = parameters.jitter_VB.shape
    device, size, channels = images.device, parameters.size, images.shape[-1]
    scale, shift = _normalization(preprocessing.mean, preprocessing.std, device)
    plan = _plan(parameters)
    out_NCHW = torch.empty(views * batch, channels, size, size, device=device)
    source = images if parameters.box_VB4 is not None else images.flatten(0, 1)
    chunk = max(1, _CHUNK_PIXELS.get(device.type, _CHUNK_PIXELS_DEVICE) // max(size, *source.shape[1:3]) ** 2)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, views * batch, chunk):
            part = plan.part(start, start + chunk)
            which_N = part.order_N % batch if parameters.box_VB4 is not None else part.order_N
            images_NHWC = source.index_select(0, _move(which_N, device))
            x_NCHW = _render(images_NHWC, part, size, parameters.blur_radius, preprocessing)
            torch.addcmul(shift, x_NCHW, scale, out=x_NCHW)
            if (part.dropped_N >= 0).any():
                _drop_channels_(x_NCHW, part.dropped_N)
            out_NCHW.index_copy_(0, _move(part.order_N, device), x_NCHW)
    return out_NCHW.view(views, batch, channels, size, size)


@torch.no_grad()
def clean_views(squares_BHWC: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scales and normalizes the squares that `Preprocessing.square` makes: (B, C, S, S), float32."""
    x_BCHW = scale_pixels(squares_BHWC, preprocessing.value_range).permute(0, 3, 1, 2).contiguous()
    return normalize_pixels(x_BCHW, preprocessing.mean, preprocessing.std)


def normalize_views(views_VBCHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalizes views with values in [0, 1], without waiting for the device."""
    scale, shift = _normalization(preprocessing.mean, preprocessing.std, views_VBCHW.device)
    return torch.addcmul(shift, views_VBCHW, scale)


def _render(images_NHWC: Tensor, plan: _Plan, size: int, blur_radius: int, preprocessing: Preprocessing) -> Tensor:
    """Returns the views of `plan`, in its order, in [0, 1]."""
    device, channels = images_NHWC.device, images_NHWC.shape[-1]
    flip_rows, flip_columns, hue, *rest = _move(plan.table_NP.T.copy(), device).unbind(0)
    blends, box = rest[:9], rest[9:]
    if box:
        x_NCHW = _crop(images_NHWC, box, flip_rows, flip_columns, size, preprocessing)
    else:
        x_NCHW = _flip(images_NHWC, plan, preprocessing)
    if plan.transpose_N.any():
        _replace_(x_NCHW, plan.transpose_N, lambda x: x.transpose(2, 3))
    bounds = np.searchsorted(plan.stage_N, range(_PLAIN + 1))
    jittered = slice(0, int(bounds[_PLAIN]))
    for stage in range(4):
        shifted = slice(int(bounds[stage]), int(bounds[stage + 1]))
        if shifted.start < shifted.stop:
            color.shift_hue_(x_NCHW[shifted], hue[shifted])
        if stage < 3 and jittered.stop:
            color.blend_(x_NCHW[jittered], *(weight[jittered] for weight in blends[3 * stage : 3 * stage + 3]))
    if plan.channel_factor_N2C is not None and jittered.stop:
        brightness_NC, contrast_NC = _move(plan.channel_factor_N2C, device).unbind(1)
        color.jitter_channels_(x_NCHW[jittered], brightness_NC[jittered], contrast_NC[jittered])
    if plan.gray_N.any():
        _replace_(x_NCHW, plan.gray_N, lambda x: color.gray(x).expand(-1, channels, -1, -1))
    if (blurred := plan.sigma_N > 0).any():
        matrix = blur_matrix(_move(plan.sigma_N[blurred], device), blur_radius, size)
        _replace_(x_NCHW, blurred, lambda x: apply_lines(x, matrix, matrix))
    if np.isfinite(plan.threshold_N).any():
        color.solarize_(x_NCHW, _move(plan.threshold_N, device))
    if (noisy := plan.noise_N > 0).any():
        strength, seeds = _move(plan.noise_N[noisy], device), _move(plan.noise_seed_N[noisy], device)
        _replace_(x_NCHW, noisy, lambda x: color.add_noise(x, strength, keyed_normal(seeds, x[0].numel())))
    return x_NCHW


def _crop(
    images_NHWC: Tensor,
    box: list[Tensor],
    flip_rows: Tensor,
    flip_columns: Tensor,
    size: int,
    preprocessing: Preprocessing,
) -> Tensor:
    """Crops, resizes and flips by matrices, and scales values to [0, 1]."""
    low, high = preprocessing.value_range if preprocessing.value_range != "dtype" else _dtype_range(images_NHWC)
    top, left, height, width = box
    rows = crop_matrix(top, height, size, images_NHWC.shape[1], flip_rows).div_(high - low)
    columns = crop_matrix(left, width, size, images_NHWC.shape[2], flip_columns)
    x_NCHW = apply_lines(images_NHWC.permute(0, 3, 1, 2), rows, columns)
    if images_NHWC.dtype != torch.uint8 or (low, high) != (0, 255):
        x_NCHW.sub_(low / (high - low)).clamp_(0, 1)
    return x_NCHW


def _dtype_range(images: Tensor) -> tuple[float, float]:
    return dtype_range(str(images.dtype).removeprefix("torch."))


def _flip(crops_NSSC: Tensor, plan: _Plan, preprocessing: Preprocessing) -> Tensor:
    """Flips crops, and scales values to [0, 1]."""
    x_NCHW = scale_pixels(crops_NSSC.permute(0, 3, 1, 2).contiguous(), preprocessing.value_range)
    for flips_N, axis in ((plan.flip_rows_N, 2), (plan.flip_columns_N, 3)):
        if flips_N.any():
            _replace_(x_NCHW, flips_N, lambda x, axis=axis: x.flip(axis))  # type: ignore[misc]
    return x_NCHW


def _replace_(x_NCHW: Tensor, chosen_N: np.ndarray, change: Callable[[Tensor], Tensor]) -> None:
    """Changes some of the images in place."""
    which = _move(np.flatnonzero(chosen_N), x_NCHW.device)
    x_NCHW.index_copy_(0, which, change(x_NCHW.index_select(0, which)))


def _drop_channels_(x_NCHW: Tensor, dropped_N: np.ndarray) -> None:
    """Sets one channel of some normalized images to the mean, which is 0."""
    channels = x_NCHW.shape[1]
    kept_NC = np.floor(dropped_N[:, None] * channels) != np.arange(channels)
    x_NCHW.mul_(_move(kept_NC.astype(np.float32), x_NCHW.device)[:, :, None, None])


# ---------------------------------------------------------------------------------------------------------------------
# What the host decides, so that the device need not

_NO_HUE, _PLAIN = 4, 5


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Parameters of N = V*B views, sorted by stage: how many other jitters come before the shift of hue.

    Attributes:
        order_N: Place of each in the flat (V*B) order.
        stage_N: 0-3; 4 for jitter without a shift of hue; 5 for none.
        table_NP: Flips of rows and of columns before a transposition, shift of hue, for each of the three other
            jitters the weights of `color.blend_` (9), and the box (4) if there is one.

    The others are those of `ViewParameters`, but for the flips, which are those before a transposition.
    """

    order_N: np.ndarray
    stage_N: np.ndarray
    table_NP: np.ndarray
    transpose_N: np.ndarray
    flip_rows_N: np.ndarray
    flip_columns_N: np.ndarray
    channel_factor_N2C: np.ndarray | None
    gray_N: np.ndarray
    sigma_N: np.ndarray
    threshold_N: np.ndarray
    noise_N: np.ndarray
    noise_seed_N: np.ndarray
    dropped_N: np.ndarray

    def part(self, start: int, stop: int) -> _Plan:
        parts = {name: None if values is None else values[start:stop] for name, values in vars(self).items()}
        return _Plan(**parts)  # type: ignore[arg-type]


def _plan(parameters: ViewParameters) -> _Plan:
    factor_N4, order_N4 = parameters.factor_VB4.reshape(-1, 4), parameters.order_VB4.reshape(-1, 4)
    stage_N = (order_N4 == _HUE).argmax(axis=1)
    stage_N[factor_N4[:, _HUE] == 0] = _NO_HUE
    stage_N[~parameters.jitter_VB.reshape(-1)] = _PLAIN
    order_N = np.argsort(stage_N, kind="stable")

    def flat(values: np.ndarray, dtype: type | None = None) -> np.ndarray:
        return values.reshape(-1, *values.shape[2:]).astype(dtype or values.dtype)[order_N]

    transpose_N, rows_N, columns_N = (
        flat(values) for values in (parameters.transpose_VB, parameters.flip_rows_VB, parameters.flip_columns_VB)
    )
    # Flipping the rows of a transposed image is flipping its columns before.
    rows_N, columns_N = np.where(transpose_N, columns_N, rows_N), np.where(transpose_N, rows_N, columns_N)
    columns = [rows_N[:, None], columns_N[:, None], factor_N4[order_N, _HUE:], _blends(factor_N4, order_N4)[order_N]]
    if parameters.box_VB4 is not None:
        columns.append(flat(parameters.box_VB4))
    factors = parameters.channel_factor_VB2C
    return _Plan(
        order_N=order_N,
        stage_N=stage_N[order_N],
        table_NP=np.concatenate(columns, axis=1).astype(np.float32),
        transpose_N=transpose_N,
        flip_rows_N=rows_N,
        flip_columns_N=columns_N,
        channel_factor_N2C=None if factors is None else flat(factors, np.float32),
        gray_N=flat(parameters.grayscale_VB),
        sigma_N=flat(parameters.sigma_VB, np.float32),
        threshold_N=flat(parameters.threshold_VB, np.float32),
        noise_N=flat(parameters.noise_VB, np.float32),
        noise_seed_N=flat(parameters.noise_seed_VB),
        dropped_N=flat(parameters.dropped_VB),
    )


def _blends(factor_N4: np.ndarray, order_N4: np.ndarray) -> np.ndarray:
    """Returns the weights of the three jitters but hue, in their order: (N, 9)."""
    kind_N3 = order_N4[order_N4 != _HUE].reshape(-1, 3)
    factor_N3 = np.take_along_axis(factor_N4, kind_N3, axis=1)
    other_N3 = 1 - factor_N3
    weights = [factor_N3, other_N3 * (kind_N3 == _SATURATION), other_N3 * (kind_N3 == _CONTRAST)]
    return np.stack(weights, axis=-1).reshape(-1, 9)


def _move(values: np.ndarray, device: torch.device) -> Tensor:
    """Copies a small array to the device; from pinned memory, for the host not to wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@lru_cache(maxsize=8)
def _normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift that normalize, (C, 1, 1) each."""
    mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / std_C).float().view(-1, 1, 1).to(device), (-mean_C / std_C).float().view(-1, 1, 1).to(device)
