"""Features of an image set from a frozen encoder, on one process or many."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.distributed import gather_batch, rank, world_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.structures import ViewSpec

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def extract_features(
    encoder: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 512,
    device: torch.device | str,
    views: Sequence[ViewSpec] = (),
    num_views: int = 1,
    seed: int = 0,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    progress: bool = True,
) -> Tensor:
    """Encodes every image, in evaluation mode, and leaves the encoder as it was.

    With `num_views` above 1 an image's features are the mean over its clean view and `num_views - 1` augmented ones
    (Ghosh et al., NeurIPS 2024, take 16). Each process encodes its share of each batch, and every process gets all
    features: the same as one process computes.

    Args:
        encoder: Its output has `pooler_output` (B, F); on `device` already.
        images: The image set.
        batch_size: Images per forward pass of a process.
        device: Where to encode.
        views: How augmented views are sampled, taken in turn; needed when `num_views` is above 1.
        num_views: Views per image.
        seed: Key of the augmentations.
        mixed_precision: Autocast of the encoder.
        progress: Shows a bar on the first process, where there is a terminal.

    Returns:
        (n, F) float32 on the CPU.

    Raises:
        InputError: The set is empty, augmented views are not described, the encoder's output has no features, or they
            are NaN or infinite.
    """
    if not len(images):
        raise InputError(f"{images.name}: no images to encode")
    if num_views > 1 and not views:
        raise InputError(f"num_views={num_views}: needs views that say how the augmented ones are sampled")
    device = torch.device(device)
    dtype = _AUTOCAST.get(mixed_precision)
    shares = _shares(len(images), batch_size)
    hidden = not progress or rank() > 0 or not sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), transient=True, disable=hidden)
    parts: list[Tensor] = []
    with bar, evaluating(encoder), torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        augmented = images.views(_plans(shares, images.suited(views), num_views - 1, seed, images.image_size), device)
        batches = images.clean(shares, device)
        for x_BCHW in bar.track(batches, total=len(shares), description=f"encoding {images.name}"):
            total_BF = encode(encoder, x_BCHW).float()
            for _ in range(num_views - 1):  # one view at a time bounds the memory
                (views_1BCHW,), _ = next(augmented)
                total_BF = total_BF + encode(encoder, views_1BCHW[0]).float()
            parts.append(gather_batch(total_BF / num_views).cpu())
    features_NF = torch.cat(parts)[: len(images)]  # without what fills up the last share
    bad = int((~features_NF.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"{images.name}: the encoder's features are NaN or infinite for {bad} of {len(images)} images"
        )
    return features_NF


def encode(encoder: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Returns the features (B, F) of a batch of normalized images.

    Raises:
        InputError: The encoder's output has none.
    """
    features_BF = getattr(encoder(x_BCHW), "pooler_output", None)
    if not isinstance(features_BF, Tensor) or features_BF.ndim != 2:
        raise InputError(
            f"a {type(encoder).__name__} returns no pooler_output (images, features); make an encoder of it: "
            "hf_ssl_or.models.adapters.adapt_encoder(module)"
        )
    return features_BF


def _plans(
    shares: Sequence[np.ndarray], views: Sequence[ViewSpec], count: int, seed: int, size: int
) -> Iterator[ViewPlan]:
    """Yields plans of one view each, share by share."""
    for index_B in shares:
        for view in range(count):
            key = hashed_seed("evaluation", seed)
            yield ViewPlan(
                index_B, (ViewGroup(specs=(views[view % len(views)],), size=size, seed=key, epoch=0, first_view=view),)
            )


def pixel_features(images: ImageSet) -> Tensor:
    """Returns raw pixels as features: what an encoder must beat.

    Returns:
        (n, C * S * S) float32 in [0, 1] on the CPU.
    """
    return images.unit_squares(np.arange(len(images))).flatten(1)


@contextlib.contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Holds a module in evaluation mode, then returns each of its parts to the mode it had."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _shares(n: int, batch_size: int) -> list[np.ndarray]:
    """Returns the indices of this process's share of each batch of all processes, equally many on each.

    Shares in the order of ranks make up the batch; the last one is filled up with the last image.
    """
    shares = []
    for start in range(0, n, batch_size * world_size()):
        size = -(-min(batch_size * world_size(), n - start) // world_size())
        shares.append((start + rank() * size + np.arange(size)).clip(max=n - 1))
    return shares
