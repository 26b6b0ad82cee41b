"""What every evaluation protocol shares: frozen, hashed settings, checked labeled features, top-k accuracy."""

from __future__ import annotations

import hashlib
import json
import typing
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.metrics import compute_metric
from hf_ssl_or.structures import ViewSpec

# Settings that views got later: where a view has none of them they are not recorded, and its protocol keeps its hash.
_LATER = (
    *("vertical_flip", "rotate", "channel_brightness", "channel_contrast"),
    *("noise", "noise_std", "channel_drop"),
)
_UNUSED = {field.name: field.default for field in fields(ViewSpec) if field.name in _LATER}
NEEDS_LABELS = "labels are needed: set data.label_column, or evaluation_data to a labeled set"


@dataclass(frozen=True)
class LabeledFeatures:
    """Features of a split and their labels.

    Attributes:
        features_NF: One row per image.
        labels_N: Classes from 0, int64.
    """

    features_NF: Tensor
    labels_N: Tensor

    def to(self, device: torch.device | str) -> LabeledFeatures:
        """Returns them on a device."""
        return LabeledFeatures(self.features_NF.to(device), self.labels_N.to(device))

    def __len__(self) -> int:
        return len(self.features_NF)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of evaluating features, with every setting that moves its number as a field.

    A subclass is a frozen dataclass too. It says in `run` what it measures, and which metric is the primary one.

    Attributes:
        name: What recipes and result files call it.
        num_views: Views over which an image's features are averaged: the clean one and `num_views - 1` augmented ones.
        views: How the augmented views are sampled, taken in turn.
    """

    seeded: ClassVar[bool] = True  # whether the result depends on a seed
    greater_is_better: ClassVar[bool] = True  # for the primary metric

    name: str
    num_views: int = 1
    views: tuple[ViewSpec, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Returns all settings as plain JSON values, with the class where it is not one of this package.

        Raises:
            InputError: A setting has no JSON form.
        """
        settings = asdict(self, dict_factory=_recorded)
        kind = type(self)
        if kind.__module__.partition(".")[0] != __name__.partition(".")[0]:
            settings["class"] = f"{kind.__module__}.{kind.__qualname__}"
        try:
            return json.loads(json.dumps(settings))
        except TypeError as error:
            raise InputError(f"{self.name}: settings must be plain values or tuples of them ({error})") from error

    @property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the settings' canonical JSON."""
        text = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def keys(self, seeds: Sequence[int]) -> list[int]:
        """Returns the seed of each run: the seeds themselves, or one for a protocol that has no randomness."""
        return list(seeds) if self.seeded else [0]

    @property
    def primary_metric(self) -> str:
        """The metric that stands for the protocol where there is room for one number."""
        return "top1"

    def run(
        self, train: LabeledFeatures, test: LabeledFeatures, *, seed: int, device: torch.device | str
    ) -> dict[str, float]:
        """Evaluates features.

        Args:
            train: What is fit on.
            test: What is evaluated.
            seed: Key of all randomness.
            device: Where to compute.

        Returns:
            Values by the names of metrics; accuracies are in percent.
        """
        raise NotImplementedError


def _recorded(settings: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in settings if name not in _UNUSED or value != _UNUSED[name]}


@typing.runtime_checkable
class OnImages(typing.Protocol):
    """A protocol that trains the encoder itself, and so evaluates images where others evaluate features."""

    def run_on_images(self, encoder: Any, train: ImageSet, test: ImageSet, **options: Any) -> dict[str, float]:
        """Evaluates a copy of the encoder; options are `seed` and the settings of `extract_features`."""
        ...


def labeled(features_NF: Tensor, labels_N: Tensor | None, *, what: str) -> LabeledFeatures:
    """Pairs features with labels.

    Raises:
        InputError: There are no labels; the message names `what` needs them.
    """
    if labels_N is None:
        raise InputError(f"{what}: {NEEDS_LABELS}")
    return LabeledFeatures(features_NF, labels_N)


def check_labeled(train: LabeledFeatures, test: LabeledFeatures, *, what: str) -> int:
    """Refuses features and labels that no accuracy can be computed from, and counts the classes.

    Args:
        train: Features that a probe is fit on.
        test: Features to evaluate on.
        what: Name of the protocol, for the messages.

    Returns:
        The number of classes K: the largest label of either set, plus one.

    Raises:
        InputError: Labels are negative, of one class only or not one per row; features hold NaN or infinity, or differ
            in width.
    """
    train_NF, test_MF = train.features_NF, test.features_NF
    if train_NF.ndim != 2 or test_MF.ndim != 2 or train_NF.shape[1] != test_MF.shape[1]:
        shapes = f"{tuple(train_NF.shape)} and {tuple(test_MF.shape)}"
        raise InputError(f"{what}: features must be two matrices (images, F) of one width, not {shapes}")
    for split, side in (("train", train), ("test", test)):
        features, labels = side.features_NF, side.labels_N
        if len(features) != len(labels) or not len(labels):
            raise InputError(f"{what}: {len(features)} {split} features have {len(labels)} labels")
        if not bool(features.isfinite().all()):
            raise InputError(f"{what}: the {split} features hold NaN or infinite values")
        if int(labels.min()) < 0:
            raise InputError(
                f"{what}: row {int(labels.argmin())} of the {split} set has the label {int(labels.min())}"
            )
    seen = set(train.labels_N.unique().tolist())
    if len(seen) < 2:
        raise InputError(f"{what}: the train set has one class only (label {seen.pop()}); an accuracy needs two")
    unseen = sorted(set(test.labels_N.unique().tolist()) - seen)
    if unseen:
        warnings.warn(f"{what}: no train image has the test labels {unseen[:10]}; they count as wrong", stacklevel=3)
    if bool((train_NF == train_NF[0]).all()):
        warnings.warn(f"{what}: all train images have the same features: the encoder has collapsed", stacklevel=3)
    return int(max(train.labels_N.max(), test.labels_N.max())) + 1


def best_classes(scores_NK: Tensor, top: int = 5) -> Tensor:
    """Returns the classes with the highest scores, from the best; of equal scores the lower class comes first.

    Returns:
        (N, min(top, K)) int64; -1 in place of a class whose score is minus infinity.
    """
    classes = scores_NK.shape[1]
    score_NT, class_NT = scores_NK.topk(min(top + 1, classes), dim=1)
    # `topk` leaves open which of equal scores it takes: rows that have some are sorted.
    tied = ((score_NT[:, 1:] == score_NT[:, :-1]) & ~score_NT[:, 1:].isneginf()).any(1).nonzero()[:, 0]
    if len(tied):
        ordered = scores_NK[tied].sort(dim=1, descending=True, stable=True)
        score_NT[tied], class_NT[tied] = (x[:, : score_NT.shape[1]] for x in ordered)
    return class_NT.masked_fill(score_NT.isneginf(), -1)[:, :top]


def accuracies(predicted_NT: Tensor, labels_N: Tensor, tops: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Returns the top-k accuracy in percent for every k of `tops`.

    Args:
        predicted_NT: Classes from the best, see `best_classes`.
        labels_N: The right classes.
        tops: The values of k.
    """
    inputs = {"predictions": predicted_NT.cpu().numpy(), "references": labels_N.cpu().numpy()}
    share = compute_metric("top_k_accuracy", **inputs, k=list(tops))
    return {top: 100 * share[f"top_{top}_accuracy"] for top in tops}
