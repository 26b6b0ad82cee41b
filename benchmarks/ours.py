"""This package's side of the benchmarks: a trainer of any method on images of noise."""

from __future__ import annotations

import atexit
import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import SLIM

from hf_ssl_or import SSLTrainer, SSLTrainingArguments, create_encoder
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.methods import get_method
from hf_ssl_or.models.configuration_ssl import OrthogonalityConfig
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.optim import OptimizerArguments

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
ENCODERS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18", "stem": "small"},
    "slim": {"name": "resnet18", "stem": "small", "channels": list(SLIM), "layers": [1, 1, 1, 1]},
    "vit_tiny": {"name": "vit_tiny", "patch_size": 4},
}


def noise_pixels(count: int, side: int) -> torch.Tensor:
    """Pixels of `count` images of noise, (count, side, side, 3)."""
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)


def noise_images(count: int, side: int, pixels: torch.Tensor | None = None) -> ImageSet:
    """A set of `count` images of noise."""
    pixels = noise_pixels(count, side) if pixels is None else pixels
    how = Preprocessing(image_size=side, mean=MEAN, std=STD)
    return ImageSet.from_arrays(pixels.numpy(), name="noise", preprocessing=how)


def build_trainer(
    method: str,
    encoder: str,
    images: ImageSet,
    batch: int,
    *,
    views: int = 2,
    penalty: str = "none",
    device: torch.device | None = None,
    settings: dict[str, Any] | None = None,
    spec: ViewSpec | None = None,
    **arguments: Any,
) -> SSLTrainer:
    """Builds a trainer as a recipe would.

    Args:
        method: Name of the method.
        encoder: A key of `ENCODERS`.
        images: What it trains on.
        batch: Images per step.
        views: Views of each image.
        penalty: Penalty on the weights, at the weight that the paper has for SO.
        device: The CPU unless it is a GPU.
        settings: Settings of the method; those it does not have are left out.
        spec: How views are sampled.
        arguments: More of `SSLTrainingArguments`.
    """
    kind = get_method(method)
    known = {field.name for field in dataclasses.fields(kind.config_class)}
    own = {key: value for key, value in (settings or {}).items() if key in known}
    run_dir = tempfile.mkdtemp(prefix="hf-ssl-or-bench-")
    atexit.register(shutil.rmtree, run_dir, ignore_errors=True)
    net = create_encoder(**ENCODERS[encoder], image_size=images.image_size)
    defaults: dict[str, Any] = {
        "optimizer": OptimizerArguments(name="sgd", lr=0.03, schedule="constant"),
        "max_steps": 1_000_000,
        "monitor_every": 0,
    }
    return SSLTrainer(
        kind(net, **own),
        SSLTrainingArguments(
            output_dir=run_dir,
            batch_size=batch,
            device="auto" if device is not None and device.type == "cuda" else "cpu",
            **{**defaults, **arguments},
        ),
        images,
        views=[spec or ViewSpec()] * views,
        orthogonality=OrthogonalityConfig(penalty=penalty, weight=1e-6) if penalty != "none" else None,
    )


def stepper(trainer: SSLTrainer) -> Callable[[], object]:
    """Returns a function that takes one step on views that are there already."""
    batch = next(trainer.loader.batches(0, 1))
    return lambda: trainer.training_step(batch)
