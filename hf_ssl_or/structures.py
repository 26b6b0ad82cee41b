"""The three things that travel between the modules: what a view is, a batch of views, and what a method gives back.

Shape letters, used in names throughout the package: V views, B images of this process, N images of all processes,
C channels, H height, W width, F features of the encoder, D dimensions of the projector, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

_PROBABILITIES = (
    *("flip", "jitter", "grayscale", "blur", "solarize"),
    *("vertical_flip", "rotate", "noise", "channel_drop"),
)


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How one view of an image is sampled. Every probability at 0 and `crop_scale=(1, 1)` give the clean image.

    Attributes:
        size: Side of the square view in pixels; None takes the size of the run's images.
        crop_scale: Smallest and largest share of the image's area that a random crop takes.
        crop_ratio: Smallest and largest aspect ratio (width / height) of a crop.
        flip: Probability of a horizontal flip.
        jitter: Probability of color jitter.
        brightness: Largest relative change of brightness, as in `torchvision.transforms.v2.ColorJitter`.
        contrast: Largest relative change of contrast.
        saturation: Largest relative change of saturation.
        hue: Largest shift of hue, as a share of the color circle (at most 0.5).
        grayscale: Probability of grayscale.
        blur: Probability of Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels of the view.
        solarize: Probability of inverting all values of at least `solarize_threshold`.
        solarize_threshold: Threshold of solarization, for values in [0, 1].
        vertical_flip: Probability of a vertical flip, for images without an up and down (microscopy, satellites).
        rotate: Probability of a rotation by 90, 180 or 270 degrees.
        channel_brightness: Largest relative change of brightness of each channel on its own, part of the jitter.
        channel_contrast: Largest relative change of contrast of each channel on its own, about the channel's mean.
        noise: Probability of Gaussian noise.
        noise_std: Smallest and largest standard deviation of the noise, for values in [0, 1].
        channel_drop: Probability that one channel, at random, becomes the mean of the set.
    """

    size: int | None = None
    crop_scale: tuple[float | int, float | int] = (0.2, 1.0)
    crop_ratio: tuple[float | int, float | int] = (3 / 4, 4 / 3)
    flip: float | int = 0.5
    jitter: float | int = 0.8
    brightness: float | int = 0.4
    contrast: float | int = 0.4
    saturation: float | int = 0.2
    hue: float | int = 0.1
    grayscale: float | int = 0.2
    blur: float | int = 0.0
    blur_sigma: tuple[float | int, float | int] = (0.1, 2.0)
    solarize: float | int = 0.0
    solarize_threshold: float | int = 0.5
    vertical_flip: float | int = 0.0
    rotate: float | int = 0.0
    channel_brightness: float | int = 0.0
    channel_contrast: float | int = 0.0
    noise: float | int = 0.0
    noise_std: tuple[float | int, float | int] = (0.01, 0.1)
    channel_drop: float | int = 0.0

    def __post_init__(self) -> None:
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: a probability lies in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue: lies in [0, 0.5], not {self.hue}")
        for name in ("brightness", "contrast", "saturation", "channel_brightness", "channel_contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: lies in [0, 1], not {getattr(self, name)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: at least 1 pixel, not {self.size}")
        tops = {"crop_scale": 1.0, "crop_ratio": float("inf"), "blur_sigma": float("inf"), "noise_std": 1.0}
        for name, top in tops.items():
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(
                    f"{name}: wants 0 < low <= high{f' <= {top:g}' if top == 1 else ''}, not {low}, {high}"
                )


@dataclass(kw_only=True)
class MultiViewBatch:
    """One step's images of this process, on the device, augmented and normalized.

    Attributes:
        views_VBCHW: V views of B images.
        index_B: Index of each image in the data set (int64).
        labels_B: Labels, or None for unlabeled data (the normal case).
        local_views_VBCHW: Smaller views for methods with multi-crop, or None.
        seed: Seed of the run: a method keys its own randomness by (seed, step, purpose), see `randomness`.
        step: Step of the run, from 0.
    """

    views_VBCHW: Tensor
    index_B: Tensor
    labels_B: Tensor | None = None
    local_views_VBCHW: Tensor | None = None
    seed: int = 0
    step: int = 0


@dataclass(kw_only=True)
class SSLOutput:
    """What a method returns.

    Attributes:
        loss: Scalar with gradient; the loss of the global batch, the same on every process.
        terms: Named parts of the loss, detached scalars, for the log.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
