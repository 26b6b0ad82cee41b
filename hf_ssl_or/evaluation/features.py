"""Features of a whole image set from a frozen encoder, on one process or many."""

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

from hf_ssl_or.data.images import ImageSet
from hf_ssl_or.data.views import clean_views, draw_parameters, render_views
from hf_ssl_or.distributed import gather_batch, rank, world_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.structures import ViewSpec

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def extract_features(
    encoder: nn.Module,
    images: ImageSet,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | None = None,
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
        mean: Mean of each channel that the encoder was trained with, of values in [0, 1].
        std: Standard deviation of each channel, likewise.
        image_size: Side in pixels; None takes the images' own.
        batch_size: Images per forward pass of a process.
        device: Where to encode.
        views: How augmented views are drawn, taken in turn; needed when `num_views` is above 1.
        num_views: Views per image.
        seed: Key of the augmentations.
        mixed_precision: Autocast of the encoder.
        progress: Shows a bar on the first process, where there is a terminal.

    Returns:
        (n, F) float32 on the CPU.

    Raises:
        InputError: The set is empty, augmented views are not described, or features are NaN or infinite.
    """
    if not len(images):
        raise InputError(f"{images.name}: no images to encode")
    if num_views > 1 and not views:
        raise InputError(f"num_views={num_views}: needs views that say how the augmented ones are drawn")
    device, size = torch.device(device), image_size or images.image_size
    dtype = _AUTOCAST.get(mixed_precision)
    shares = _shares(len(images), batch_size)
    hidden = not progress or rank() > 0 or not sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), transient=True, disable=hidden)
    parts: list[Tensor] = []
    with bar, evaluating(encoder), torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        batches = zip(shares, images.stream(shares, device), strict=True)
        for index_B, images_BCHW in bar.track(batches, total=len(shares), description=f"encoding {images.name}"):
            total_BF = encoder(clean_views(images_BCHW, size, mean, std)).pooler_output.float()
            for view in range(num_views - 1):  # one view at a time bounds the memory
                drawn = draw_parameters(
                    [views[view % len(views)]],
                    seed=hashed_seed("evaluation", seed),
                    epoch=0,
                    index_B=index_B,
                    source_size=images.source_size,
                    image_size=size,
                    first_view=view,
                )
                total_BF = total_BF + encoder(render_views(images_BCHW, drawn, mean, std)[0]).pooler_output.float()
            parts.append(gather_batch(total_BF / num_views).cpu())
    features_NF = torch.cat(parts)[: len(images)]  # without what fills up the last share
    bad = int((~features_NF.isfinite()).any(1).sum())
    if bad:
        raise InputError(
            f"{images.name}: the encoder's features are NaN or infinite for {bad} of {len(images)} images"
        )
    return features_NF


def pixel_features(images: ImageSet) -> Tensor:
    """Gives raw pixels as features: what an encoder must beat.

    Returns:
        (n, 3 * S * S) float32 in [0, 1] on the CPU.
    """
    return images.batch(torch.arange(len(images)), torch.device("cpu")).flatten(1).float() / 255


@contextlib.contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Holds a module in evaluation mode, then gives each of its parts the mode it had."""
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _shares(n: int, batch_size: int) -> list[np.ndarray]:
    """Gives the indices of this process's share of each batch of all processes, equally many on each.

    Shares in the order of ranks make up the batch; the last one is filled up with the last image.
    """
    shares = []
    for start in range(0, n, batch_size * world_size()):
        size = -(-min(batch_size * world_size(), n - start) // world_size())
        shares.append((start + rank() * size + np.arange(size)).clip(max=n - 1))
    return shares
