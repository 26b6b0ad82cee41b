"""Evaluates an encoder by any number of protocols."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.collapse import collapse_report
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.evaluation.protocols import Protocol, get_protocol, resolve_protocols
from hf_ssl_or.evaluation.protocols.base import NEEDS_LABELS, OnImages, labeled
from hf_ssl_or.randomness import keyed_permutation
from hf_ssl_or.settings import settings
from hf_ssl_or.structures import ViewSpec


@settings
class EvaluationArguments:
    """How the finished encoder is evaluated.

    Attributes:
        protocols: Names of protocols.
        seeds: Each seeded protocol is run once with every seed.
        batch_size: Images per forward pass of a process.
        train_limit: Takes at most so many training images, a fixed random sample; None takes all.
        baselines: Also evaluates raw pixels and the untrained encoder, by the protocols that train nothing.
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
    evaluators: Sequence[Protocol | str] | None = None,
    device: torch.device | str = "cpu",
    mixed_precision: Literal["no", "bf16", "fp16"] = "no",
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a frozen encoder by every protocol; protocols share the features they can share.

    On several processes all encode, and every process returns the same result.

    Args:
        encoder: Its output has `pooler_output` (B, F); on `device` already.
        train: Labeled images that probes are fit on.
        test: Labeled images to evaluate on.
        arguments: Protocols, seeds and sizes.
        evaluators: Protocols, of your own too, and names of protocols, in place of those of the arguments.
        device: Where to encode and to train probes.
        mixed_precision: Autocast of the encoder.
        progress: Shows bars on the first process.

    Returns:
        `evaluations`, a list of {protocol, protocol_hash, settings, seeds, headline,
        metrics, data}, with each metric
        {mean, std, values} over the seeds (std is None for one), and `collapse`, the `collapse_report` of the training
        images' clean views.

    Raises:
        InputError: A protocol lacks labels, a kNN has too few images, or the encoder gives NaN.
    """
    protocols = resolve_protocols(arguments.protocols if evaluators is None else evaluators)
    evaluator = Evaluator(
        encoder,
        train,
        test,
        arguments,
        device=device,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    evaluations = [evaluator.evaluate(protocol) for protocol in protocols]
    return {"evaluations": evaluations, "collapse": collapse_report(evaluator.features("train"))}


class Evaluator:
    """One encoder and one data set: encodes images once, and evaluates them by any number of protocols.

    Args:
        encoder: As for `evaluate_encoder`, like what follows.
        train: Labeled images that probes are fit on.
        test: Labeled images to evaluate on.
        arguments: Protocols, seeds and sizes.
        remember: Returns a tensor by a JSON key from where an earlier process left it, or computes it; None computes.
        **encoding: Settings of `extract_features`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        train: ImageSet,
        test: ImageSet,
        arguments: EvaluationArguments,
        *,
        remember: Callable[[dict[str, Any], Callable[[], Tensor]], Tensor] | None = None,
        **encoding: Any,
    ) -> None:
        limit = arguments.train_limit
        bank = train if limit is None or limit >= len(train) else train.subset(_sample(len(train), limit))
        self.encoder, self.arguments, self.encoding, self.remember = encoder, arguments, encoding, remember
        self.images = {"train": bank, "test": test}
        self.data = {"train": _describe(train, len(bank)), "test": _describe(test, len(test))}
        self._features: dict[tuple[Any, ...], Tensor] = {}

    def evaluate(self, protocol: Protocol) -> dict[str, Any]:
        """Returns one entry of `evaluations`, see `evaluate_encoder`.

        Raises:
            InputError: There are no labels, or what the protocol refuses.
        """
        for images in self.images.values():
            if images.labels is None:
                raise InputError(f"{images.name}: {NEEDS_LABELS}")
        if isinstance(protocol, OnImages):
            run = functools.partial(protocol.run_on_images, self.encoder, **self.images, **self.encoding)
            seeds = self.arguments.seeds
            return _entry(protocol, [run(seed=key) for key in protocol.keys(seeds)], seeds) | {"data": self.data}
        train_NF, test_MF = (self.features(split, protocol.num_views, protocol.views) for split in ("train", "test"))
        evaluated = evaluate_features(
            protocol,
            train_NF,
            self.images["train"].labels,
            test_MF,
            self.images["test"].labels,
            seeds=self.arguments.seeds,
            device=self.encoding["device"],
        )
        return evaluated | {"data": self.data}

    def features(self, split: str, num_views: int = 1, views: tuple[ViewSpec, ...] = ()) -> Tensor:
        """Returns the features (n, F) of a split, averaged over views."""
        place = (split, num_views, views)
        if place not in self._features:
            key = {"data": self.data[split], "num_views": num_views, "views": [asdict(view) for view in views]}
            compute = functools.partial(self._encode, *place)
            self._features[place] = compute() if self.remember is None else self.remember(key, compute)
        return self._features[place]

    def _encode(self, split: str, num_views: int, views: tuple[ViewSpec, ...]) -> Tensor:
        return extract_features(
            self.encoder,
            self.images[split],
            batch_size=self.arguments.batch_size,
            views=views,
            num_views=num_views,
            **self.encoding,
        )


def evaluate_features(
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
        protocol: From `get_protocol`, or of your own.
        train_features: (N, F).
        train_labels: (N,) int64.
        test_features: (M, F).
        test_labels: (M,) int64.
        seeds: Ignored, and recorded as none, by a protocol that has no randomness.
        device: Where to compute.

    Returns:
        One entry of `evaluations`, see `evaluate_encoder`, without `data`.
    """
    train = labeled(train_features, train_labels, what=protocol.name)
    test = labeled(test_features, test_labels, what=protocol.name)
    runs = [protocol.run(train, test, seed=key, device=device) for key in protocol.keys(seeds)]
    return _entry(protocol, runs, seeds)


def _entry(protocol: Protocol, runs: list[dict[str, float]], seeds: Sequence[int]) -> dict[str, Any]:
    if protocol.primary_metric not in runs[0]:
        missing = f"its primary metric {protocol.primary_metric!r}; it returns {sorted(runs[0])}"
        raise InputError(f"{protocol.name}: run does not return {missing}")
    metrics = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        std = statistics.stdev(values) if len(values) > 1 else None
        metrics[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    entry = {
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "settings": protocol.settings(),
        "seeds": list(seeds) if protocol.seeded else [],
        "headline": protocol.primary_metric,
        "metrics": metrics,
    }
    return entry if protocol.greater_is_better else entry | {"greater_is_better": False}


def _sample(n: int, limit: int) -> np.ndarray:
    """The same random images for every run and encoder, in the order of the set."""
    return np.sort(keyed_permutation(n, "evaluation sample")[:limit])


def _describe(images: ImageSet, used: int) -> dict[str, Any]:
    return {"name": images.name, "fingerprint": images.fingerprint, "size": used}
