"""Color operations on a batch of images in [0, 1], in place, each image with parameters of its own.

They mean what torchvision's functions of the same name mean on float images. The loops over pixels are written for
planes: an image's channels are three contiguous planes, and no operation needs a mask or a branch per pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # gray as torchvision weighs it


def gray(x_NCHW: Tensor) -> Tensor:
    """Returns the gray plane of each image, (N, 1, H, W); of other images than RGB the mean of the channels."""
    if x_NCHW.shape[1] != 3:
        return x_NCHW.mean(1, keepdim=True)
    red, green, blue = x_NCHW.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend_(x_NCHW: Tensor, factor_N: Tensor, to_gray_N: Tensor, to_mean_N: Tensor) -> None:
    """Adjusts brightness, contrast or saturation: a blend with black, with the mean gray, or with the gray image.

    All three are clamp(factor * x + (1 - factor) * other); which one an image gets is in the two other weights.

    Args:
        x_NCHW: Images, changed in place.
        factor_N: Weight of the image.
        to_gray_N: 1 - factor where saturation is adjusted, else 0.
        to_mean_N: 1 - factor where contrast is adjusted, else 0.
    """
    other = gray(x_NCHW)
    # Summing row by row, then over rows, keeps an image's mean the same bits in whatever batch it comes.
    mean_N11 = other.mean(-1).mean(-1, keepdim=True)
    other.mul_(to_gray_N.view(-1, 1, 1, 1)).add_((mean_N11 * to_mean_N.view(-1, 1, 1)).unsqueeze(-1))
    torch.addcmul(other, x_NCHW, factor_N.view(-1, 1, 1, 1), out=x_NCHW).clamp_(0, 1)


def jitter_channels_(x_NCHW: Tensor, brightness_NC: Tensor, contrast_NC: Tensor) -> None:
    """Adjusts brightness, then contrast, of every channel on its own, about the channel's own mean."""
    x_NCHW.mul_(brightness_NC[:, :, None, None]).clamp_(0, 1)
    mean_NC11 = x_NCHW.mean(-1).mean(-1)[:, :, None, None]
    factor_NC11 = contrast_NC[:, :, None, None]
    torch.addcmul(mean_NC11 * (1 - factor_NC11), x_NCHW, factor_NC11, out=x_NCHW).clamp_(0, 1)


def add_noise(x_NCHW: Tensor, std_N: Tensor, normal_NP: Tensor) -> Tensor:
    """Returns images plus noise of an own standard deviation each, clipped to [0, 1]."""
    return (x_NCHW + normal_NP.view_as(x_NCHW) * std_N.view(-1, 1, 1, 1)).clamp_(0, 1)


def shift_hue_(x_N3HW: Tensor, shift_N: Tensor) -> None:
    """Turns the hue by a share of the color circle, in HSV: the hexagon's formula without its six cases.

    With v the largest channel, c the chroma and h in [0, 6) the hue, each channel of HSV -> RGB is a trapezoid of h:
    red = v - c + c t(3), green = v - c t(2), blue = v - c t(4) with t(k) = clamp(|h - k| - 1, 0, 1).
    """
    red, green, blue = x_N3HW.unbind(1)
    value = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(value, blue, out=value)
    torch.minimum(low, blue, out=low)
    chroma = value - low
    hue = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    hue.div_(chroma.clamp(min=1e-8)).add_(shift_N.view(-1, 1, 1), alpha=6)  # gray pixels: 0 / 1e-8, any hue will do
    hue.sub_((hue * (1 / 6)).floor_(), alpha=6)
    for plane, center, base, sign in ((red, 3, low, 1), (green, 2, value, -1), (blue, 4, value, -1)):
        torch.sub(hue, center, out=plane).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(base, plane, chroma, value=sign, out=plane)


def solarize_(x_N3HW: Tensor, threshold_N: Tensor) -> None:
    """Inverts every value of at least the image's threshold; a threshold above 1 changes nothing."""
    torch.where(x_N3HW >= threshold_N.view(-1, 1, 1, 1), 1 - x_N3HW, x_N3HW, out=x_N3HW)
