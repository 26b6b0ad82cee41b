"""Where in an encoder dimensions are lost: covariances of every stage's output, streamed through the encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.distributed import rank, world_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse.spectra import CovarianceAccumulator, normalized_eigenvalues
from hf_ssl_or.evaluation.collapse.view_scatter import ViewScatter
from hf_ssl_or.evaluation.features import evaluating
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.structures import ViewSpec

_WIDEST = 8192  # dimensions whose covariance is held, 512 MiB
_INPUT_SIDE = 32  # pixels: an input of 3072 dimensions
_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def hidden_covariances(
    encoder: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 512,
    device: torch.device | str,
    flatten: bool = False,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
) -> dict[str, CovarianceAccumulator]:
    """Encodes every image once and gathers the covariance of each stage's output and of the representation.

    Maps (B, C, H, W) and tokens (B, T, C) are averaged over space, or over all tokens: a flattened map of a ResNet-18
    has 65,536 dimensions. He, Du & Ma (NeurIPS 2024) do not say which they drew. Of a plain ResNet the last stage's
    average is the representation. Each process encodes its share, and every process gets the covariances of all
    images.

    Args:
        encoder: On `device` already. Where its configuration has `stage_names` it takes `output_hidden_states`.
        images: The images, say a sample.
        batch_size: Images per forward pass of a process.
        device: Where to encode.
        flatten: Flattens each output instead, to at most 8192 dimensions.
        mixed_precision: Autocast of the encoder.

    Returns:
        "hidden/<stage>" for every stage in order, where the encoder has stages, and "representation".

    Raises:
        InputError: There are fewer images than processes, or a flattened output is too wide.
    """
    device = torch.device(device)
    names = [f"hidden/{stage}" for stage in getattr(encoder.config, "stage_names", None) or ()]
    moments: dict[str, CovarianceAccumulator] = {}
    with _inference(encoder, device, mixed_precision):
        for x_BCHW in images.clean(_own_batches(images, batch_size), device):
            output = encoder(x_BCHW, output_hidden_states=True) if names else encoder(x_BCHW)
            states = output.hidden_states if names else ()
            for name, x in zip([*names, "representation"], [*states, output.pooler_output], strict=True):
                x_BD = _flattened(x, name) if flatten else _pooled(x)
                moments.setdefault(name, CovarianceAccumulator(x_BD.shape[1], device, name)).update(x_BD)
    return {name: accumulator.over_ranks() for name, accumulator in moments.items()}


def input_spectrum(images: ImageSet) -> np.ndarray:
    """Normalized eigenvalues of the images' pixels; images above 32 x 32 pixels are averaged down to that.

    Returns:
        float64 array (C * S * S,), S at most 32.
    """
    side = min(images.image_size, _INPUT_SIDE)
    batches = (np.arange(start, min(start + 512, len(images))) for start in range(0, len(images), 512))
    parts = [F.adaptive_avg_pool2d(images.unit_squares(index_B), side).flatten(1) for index_B in batches]
    return normalized_eigenvalues(torch.cat(parts), "input")


def scatter_views(
    encoder: nn.Module,
    images: ImageSet,
    views: Sequence[ViewSpec],
    *,
    num_views: int,
    batch_size: int = 512,
    device: torch.device | str,
    seed: int = 0,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
) -> ViewScatter:
    """Encodes augmented views of every image and gathers what `lidar` and `alignment` need, without a bank.

    Each process encodes its share, and every process gets the scatter of all images. An image's views depend on the
    seed and its place in the set alone.

    Args:
        encoder: Its output has `pooler_output` (B, D); on `device` already.
        images: The images; LiDAR's paper takes 1000.
        views: How views are sampled, taken in turn.
        num_views: Views of each image; LiDAR's paper takes 50.
        batch_size: Views per forward pass of a process.
        device: Where to encode.
        seed: Key of the augmentations.
        mixed_precision: Autocast of the encoder.

    Raises:
        InputError: There are fewer images than processes, fewer than 2 views, or none is described.
    """
    if not views:
        raise InputError(f"num_views={num_views}: needs views that say how they are sampled")
    device = torch.device(device)
    group = ViewGroup(
        specs=images.suited([views[i % len(views)] for i in range(num_views)]),
        size=images.image_size,
        seed=hashed_seed("evaluation", seed),
        epoch=0,
    )
    plans = (ViewPlan(index_B, (group,)) for index_B in _own_batches(images, max(1, batch_size // num_views)))
    scatter: ViewScatter | None = None
    with _inference(encoder, device, mixed_precision):
        for (views_VBCHW,), index_B in images.views(plans, device):
            z_MD = encoder(views_VBCHW.flatten(0, 1)).pooler_output.float()
            scatter = scatter or ViewScatter(z_MD.shape[1], num_views, device)
            scatter.update(z_MD.unflatten(0, (num_views, len(index_B))).transpose(0, 1))
    assert scatter is not None
    return scatter.over_ranks()


@contextlib.contextmanager
def _inference(encoder: nn.Module, device: torch.device, mixed_precision: str) -> Iterator[None]:
    dtype = _AUTOCAST.get(mixed_precision)
    with evaluating(encoder), torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


def _own_batches(images: ImageSet, batch_size: int) -> list[np.ndarray]:
    """Returns the indices of this process's share of the images in batches; shares may differ by one image."""
    if len(images) < world_size():
        raise InputError(f"{images.name}: {len(images)} images for {world_size()} processes; each needs one")
    own = np.arange(rank(), len(images), world_size())
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _pooled(x: Tensor) -> Tensor:
    """Averages a map (B, C, H, W) over space, or tokens (B, T, C) over tokens; a vector stays: (B, C) float32."""
    x = x.float()
    return x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x


def _flattened(x: Tensor, name: str) -> Tensor:
    x_BD = x.flatten(1)
    if x_BD.shape[1] > _WIDEST:
        raise InputError(
            f"{name}: flattened it has {x_BD.shape[1]} dimensions, more than {_WIDEST}; use flatten=False"
        )
    return x_BD
