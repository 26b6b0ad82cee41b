"""The named protocols, and the driver that judges an encoder by them."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssl_or.data.images import ImageSet
from hf_ssl_or.errors import InputError, unknown
from hf_ssl_or.evaluation.base import NEEDS_LABELS, Protocol
from hf_ssl_or.evaluation.collapse import collapse_report
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.evaluation.knn import KNN_PROTOCOLS
from hf_ssl_or.evaluation.linear_probe import LINEAR_PROTOCOLS
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import ViewSpec

_PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (*KNN_PROTOCOLS, *LINEAR_PROTOCOLS)}


def available_protocols() -> list[str]:
    """Names of all protocols, sorted."""
    return sorted(_PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """Finds a protocol by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in _PROTOCOLS:
        raise unknown("evaluation protocol", name, _PROTOCOLS)
    return _PROTOCOLS[name]


@settings
class EvaluationArguments:
    """How the finished encoder is judged.

    Attributes:
        protocols: Names of protocols.
        seeds: Each seeded protocol is run once with every seed.
        batch_size: Images per forward pass of a process.
        train_limit: Takes at most so many training images, a fixed random sample; None takes all.
        baselines: Also judges raw pixels and the untrained encoder, by the protocols that train nothing.
    """

    protocols: list[str] = field(default_factory=lambda: ["knn", "linear-sgd"])
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int = 512
    train_limit: int | None = None
    baselines: bool = False

    def __post_init__(self) -> None:
        for name in self.protocols:
            get_protocol(name)
        for name in ("batch_size", "train_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"evaluation.{name}: at least 1, not {value}")
        for name in ("protocols", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"evaluation.{name}: names one twice: {values}")
        if not self.seeds:
            raise InputError("evaluation.seeds: needs one seed or more")


def evaluate_encoder(
    encoder: nn.Module,
    train: ImageSet,
    test: ImageSet,
    arguments: EvaluationArguments,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    image_size: int | None = None,
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    progress: bool = True,
) -> dict[str, Any]:
    """Judges a frozen encoder by every protocol of the arguments; protocols share the features they can share.

    On several processes all encode, and every process returns the same result.

    Args:
        encoder: Its output has `pooler_output` (B, F); on `device` already.
        train: Labelled images that judges learn from.
        test: Labelled images that are judged.
        arguments: Protocols, seeds and sizes.
        mean: Mean of each channel that the encoder was trained with, of values in [0, 1].
        std: Standard deviation of each channel, likewise.
        device: Where to encode and to train probes.
        image_size: Side in pixels that the encoder gets; None takes that of the images.
        mixed_precision: Autocast of the encoder.
        progress: Shows bars on the first process.

    Returns:
        `evaluations`, a list of {protocol, protocol_hash, settings, seeds, metrics, headline, data}, with each metric
        {mean, std, values} over the seeds (std is None for one), and `collapse`, the `collapse_report` of the training
        images' clean views.

    Raises:
        InputError: A protocol lacks labels, a kNN has too few images, or the encoder gives NaN.
    """
    if arguments.protocols and (train.labels is None or test.labels is None):
        bare = train if train.labels is None else test
        raise InputError(f"{bare.name}: {NEEDS_LABELS}")
    limit = arguments.train_limit
    bank = train if limit is None or limit >= len(train) else train.subset(_sample(len(train), limit))

    @functools.cache
    def features(split: str, num_views: int, views: tuple[ViewSpec, ...]) -> Tensor:
        return extract_features(
            encoder,
            {"train": bank, "test": test}[split],
            mean=mean,
            std=std,
            image_size=image_size,
            batch_size=arguments.batch_size,
            device=device,
            views=views,
            num_views=num_views,
            mixed_precision=mixed_precision,
            progress=progress,
        )

    data = {"train": _describe(train, len(bank)), "test": _describe(test, len(test))}
    evaluations = []
    for protocol in map(get_protocol, arguments.protocols):
        train_NF, test_MF = (features(split, protocol.num_views, protocol.views) for split in ("train", "test"))
        judged = judge_features(
            protocol, train_NF, bank.labels, test_MF, test.labels, seeds=arguments.seeds, device=device
        )
        evaluations.append(judged | {"data": data})
    return {"evaluations": evaluations, "collapse": collapse_report(features("train", 1, ()))}


def judge_features(
    protocol: Protocol,
    train_features: Tensor,
    train_labels: Tensor | None,
    test_features: Tensor,
    test_labels: Tensor | None,
    *,
    seeds: Sequence[int] = (0,),
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Runs one protocol on features of any origin, say those of `pixel_features`, once with every seed.

    Args:
        protocol: From `get_protocol`.
        train_features: (N, F).
        train_labels: (N,) int64.
        test_features: (M, F).
        test_labels: (M,) int64.
        seeds: Ignored, and recorded as none, by a protocol that has no randomness.
        device: Where to compute.

    Returns:
        One entry of `evaluations`, see `evaluate_encoder`, without `data`.
    """
    arrays = (train_features, train_labels, test_features, test_labels)
    runs = [protocol.run(*arrays, seed=seed, device=device) for seed in (seeds if protocol.seeded else (0,))]
    metrics = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        std = statistics.stdev(values) if len(values) > 1 else None
        metrics[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return {
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "settings": protocol.settings(),
        "seeds": list(seeds) if protocol.seeded else [],
        "headline": protocol.headline,
        "metrics": metrics,
    }


def _sample(n: int, limit: int) -> np.ndarray:
    """The same random images for every run and encoder, in the order of the set."""
    return np.sort(keyed_permutation(n, "evaluation sample")[:limit])


def _describe(images: ImageSet, used: int) -> dict[str, Any]:
    return {"name": images.name, "fingerprint": images.fingerprint, "size": used}
