"""What a report plots of an encoder: features of a sample of images, and the nearest neighbors of some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.distributed import rank
from hf_ssl_or.evaluation.curation import nearest_neighbors
from hf_ssl_or.evaluation.features import extract_features

FEATURES_FILE = "features.npz"
NEIGHBORS_FILE = "neighbors.npz"
_THUMBNAIL = 64  # pixels of a side, at most


def pack_features(features_NF: Tensor) -> np.ndarray:
    """Centers features and divides them by their standard deviation over all entries, so that float16 holds them.

    Returns:
        (N, F) float16; zeros for features that do not vary.
    """
    centered_NF = features_NF.double() - features_NF.double().mean(0)
    deviation = centered_NF.square().mean().sqrt()
    if float(deviation) <= torch.finfo(torch.float32).eps * float(features_NF.abs().max()):
        return np.zeros(features_NF.shape, np.float16)
    return (centered_NF / deviation).to(torch.float16).numpy()


def write_samples(
    encoder: nn.Module,
    images: ImageSet,
    folder: Path,
    *,
    device: torch.device | str,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    limit: int = 2000,
    queries: int = 8,
    k: int = 8,
) -> None:
    """Writes `features.npz` and `neighbors.npz`, what a report plots of an encoder, for the same images in every run.

    All processes encode, the first one writes. `features.npz`: `features` (N, F) float16, see `pack_features`, with
    `labels` (N,) and `class_names` where the images have them. `neighbors.npz`: `images` (queries, 1 + k, 3, S, S)
    uint8, each query before its neighbors, `distances` (queries, k), 1 - cosine, and `labels` (queries, 1 + k).

    Args:
        encoder: Its output has `pooler_output` (B, F); on `device` already.
        images: Images that the encoder was not trained on, where there are any.
        folder: Where to write.
        device: Where to encode.
        mixed_precision: Autocast of the encoder.
        limit: Images of the sample, at most.
        queries: Images whose neighbors are sought.
        k: Neighbors of each.
    """
    sample = images.sample(limit, "report sample")
    features_NF = extract_features(
        encoder,
        sample,
        device=device,
        mixed_precision=mixed_precision,
        progress=False,
    )
    if rank():
        return
    packed: dict[str, Any] = {"features": pack_features(features_NF)}
    if sample.labels is not None:
        packed["labels"] = sample.labels.cpu().numpy()
    if sample.class_names is not None:
        packed["class_names"] = np.array(sample.class_names, dtype=np.str_)
    np.savez_compressed(folder / FEATURES_FILE, **packed)
    np.savez_compressed(folder / NEIGHBORS_FILE, **_neighbor_rows(sample, features_NF, queries, k))


def as_rgb(x_BCHW: Tensor) -> Tensor:
    """Returns images that can be shown: gray ones of one channel, else of the first three: (B, 3, H, W)."""
    channels = x_BCHW.shape[1]
    return x_BCHW[:, :3] if channels >= 3 else x_BCHW[:, :1].expand(-1, 3, -1, -1)


def _neighbor_rows(sample: ImageSet, features_NF: Tensor, queries: int, k: int) -> dict[str, Any]:
    query_Q = torch.linspace(0, len(sample) - 1, min(queries, len(sample))).long()
    cosine_QK, shown_QP = torch.empty(len(query_Q), 0), query_Q[:, None]
    if len(sample) > 1:
        cosine_QK, index_QK = nearest_neighbors(features_NF, min(k, len(sample) - 1), query_Q)
        shown_QP = torch.cat([shown_QP, index_QK], 1)
    tiles = as_rgb(sample.unit_squares(shown_QP.flatten().numpy()))
    if sample.image_size > _THUMBNAIL:
        tiles = F.interpolate(tiles, (_THUMBNAIL, _THUMBNAIL), mode="bilinear", antialias=True)
    rows: dict[str, Any] = {
        "images": (tiles * 255).round().clamp(0, 255).to(torch.uint8).unflatten(0, shown_QP.shape).numpy(),
        "distances": (1 - cosine_QK).clamp(min=0).numpy(),
    }
    if sample.labels is not None:
        rows["labels"] = sample.labels.cpu()[shown_QP].numpy()
    return rows
