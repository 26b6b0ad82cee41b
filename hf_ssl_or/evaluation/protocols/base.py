"""What every evaluation protocol shares: frozen, hashed settings, checks of labeled features, top-k accuracy."""

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
from hf_ssl_or.structures import ViewSpec

# Settings that views got later: where a view has none of them they are not recorded, and its protocol keeps its hash.
_LATER = (
    *("vertical_flip", "rotate", "channel_brightness", "channel_contrast"),
    *("noise", "noise_std", "channel_drop"),
)
_UNUSED = {field.name: field.default for field in fields(ViewSpec) if field.name in _LATER}
NEEDS_LABELS = "labels are needed: set data.label_column, or evaluation_data to a labeled set"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of evaluating features, with every setting that moves its number.

    Attributes:
        name: What recipes and result files call it.
        num_views: Views over which an image's features are averaged: the clean one and `num_views - 1` augmented ones.
        views: How the augmented views are sampled, taken in turn.
    """

    seeded: ClassVar[bool]  # whether the result depends on a seed

    name: str
    num_views: int = 1
    views: tuple[ViewSpec, ...] = ()

    def settings(self) -> dict[str, Any]:
        """Returns all settings as plain JSON values."""
        return json.loads(json.dumps(asdict(self, dict_factory=_recorded)))

    @property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the settings' canonical JSON."""
        text = json.dumps(self.settings(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def keys(self, seeds: Sequence[int]) -> list[int]:
        """Returns the seed of each run: the seeds themselves, or one for a protocol that has no randomness."""
        return list(seeds) if self.seeded else [0]

    @property
    def headline(self) -> str:
        """The metric that stands for the protocol where there is room for one number."""
        return "top1"

    def run(
        self,
        train_NF: Tensor,
        train_labels_N: Tensor | None,
        test_MF: Tensor,
        test_labels_M: Tensor | None,
        *,
        seed: int,
        device: torch.device | str,
    ) -> dict[str, float]:
        """Evaluates features; accuracies are in percent."""
        raise NotImplementedError


def _recorded(settings: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in settings if name not in _UNUSED or value != _UNUSED[name]}


@typing.runtime_checkable
class OnImages(typing.Protocol):
    """A protocol that trains the encoder itself, and so evaluates images where others evaluate features."""

    def run_on_images(self, encoder: Any, train: ImageSet, test: ImageSet, **options: Any) -> dict[str, float]:
        """Evaluates a copy of the encoder; options are `seed` and the settings of `extract_features`."""
        ...


def check_labeled(
    train_NF: Tensor, train_labels_N: Tensor | None, test_MF: Tensor, test_labels_M: Tensor | None, *, what: str
) -> tuple[Tensor, Tensor, int]:
    """Refuses features and labels that no accuracy can be computed from, and counts the classes.

    Args:
        train_NF: Features that the probe is fit on.
        train_labels_N: Their labels.
        test_MF: Features to evaluate on.
        test_labels_M: Their labels.
        what: Name of the protocol, for the messages.

    Returns:
        Both label tensors and the number of classes K: the largest label of either set, plus one.

    Raises:
        InputError: Labels are missing, negative, of one class only or not one per row; features hold NaN or infinity,
            or differ in width.
    """
    if train_labels_N is None or test_labels_M is None:
        raise InputError(f"{what}: {NEEDS_LABELS}")
    if train_NF.ndim != 2 or test_MF.ndim != 2 or train_NF.shape[1] != test_MF.shape[1]:
        shapes = f"{tuple(train_NF.shape)} and {tuple(test_MF.shape)}"
        raise InputError(f"{what}: features must be two matrices (images, F) of one width, not {shapes}")
    for split, features, labels in (("train", train_NF, train_labels_N), ("test", test_MF, test_labels_M)):
        if len(features) != len(labels) or not len(labels):
            raise InputError(f"{what}: {len(features)} {split} features have {len(labels)} labels")
        if not bool(features.isfinite().all()):
            raise InputError(f"{what}: the {split} features hold NaN or infinite values")
        if int(labels.min()) < 0:
            raise InputError(
                f"{what}: row {int(labels.argmin())} of the {split} set has the label {int(labels.min())}"
            )
    seen = set(train_labels_N.unique().tolist())
    if len(seen) < 2:
        raise InputError(f"{what}: the train set has one class only (label {seen.pop()}); an accuracy needs two")
    unseen = sorted(set(test_labels_M.unique().tolist()) - seen)
    if unseen:
        warnings.warn(f"{what}: no train image has the test labels {unseen[:10]}; they count as wrong", stacklevel=3)
    if bool((train_NF == train_NF[0]).all()):
        warnings.warn(f"{what}: all train images have the same features: the encoder has collapsed", stacklevel=3)
    return train_labels_N, test_labels_M, int(max(train_labels_N.max(), test_labels_M.max())) + 1


def in_top(scores_NK: Tensor, labels_N: Tensor, top: int) -> Tensor:
    """Says of each row whether its label has one of the `top` highest scores; of equal scores the lower class wins."""
    own_N1 = scores_NK.gather(1, labels_N[:, None])
    classes_K = torch.arange(scores_NK.shape[1], device=scores_NK.device)
    before_NK = (scores_NK > own_N1) | ((scores_NK == own_N1) & (classes_K < labels_N[:, None]))
    return before_NK.sum(1) < top
