"""The labeled images that evaluate an encoder: a train and a test split whose labels mean the same."""

from __future__ import annotations

import logging
from dataclasses import replace

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet, same_labels
from hf_ssl_or.data.labels import hold_out
from hf_ssl_or.data.loading import load_images, public_name
from hf_ssl_or.data.sources import list_splits, load_source
from hf_ssl_or.data.splits import TEST_SPLITS
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing

_LEAST_BANK = 20  # images that kNN asks for at least
_logger = logging.getLogger(__name__)


def load_labeled(
    data: DataArguments,
    *,
    num_channels: int = 3,
    like: Preprocessing | None = None,
    train: ImageSet | None = None,
    required: bool = True,
) -> tuple[ImageSet, ImageSet] | None:
    """Loads the labeled training and test images, or returns None where there are none.

    A labeled set without a test split is parted: probes are tested on a share of its training images, chosen class by
    class by a seed, and fit on the others.

    Args:
        data: Names the data set and its splits; all training images are used, whatever its `fraction`.
        num_channels: Channels that the encoder takes.
        like: How pixels are treated, say those of the training images; None measures it on the training images.
        train: The training images, where they are loaded already.
        required: Missing labels or a missing test split are an error.

    Raises:
        InputError: There is no such data set, or it is required and lacks a split or labels.
    """
    data = replace(data, fraction=1.0)
    if data.test_split not in list_splits(data):
        return _held_out(data, num_channels, like, required)
    if train is None:
        train = load_images(data, data.train_split, num_channels=num_channels, like=like, squares=True)
    if train.labels is None and not required:
        return None
    train.load_squares()
    test = load_images(data, data.test_split, like=train.preprocessing, squares=True)
    for images, split in ((train, data.train_split), (test, data.test_split)):
        if images.labels is None:
            raise _unlabeled(data, split)
    return train, same_labels(train, test)


def _held_out(
    data: DataArguments, num_channels: int, like: Preprocessing | None, required: bool
) -> tuple[ImageSet, ImageSet] | None:
    """Parts the training images of a set without a test split."""
    if not required and (data.streaming or data.dataset == "shapes"):  # shapes without test images want no evaluation
        return None
    labels = load_source(data, data.train_split).labels
    if labels is None:
        if required:
            raise _unlabeled(data, data.train_split)
        return None
    parts = hold_out(labels, float(data.holdout))
    if parts is None or (not required and len(parts[0]) < _LEAST_BANK):
        if required:
            raise InputError(
                f"{data.dataset}: has no split {data.test_split!r}, and its {len(labels)} images are too few, or of "
                "too few classes, to hold some out for the test"
            )
        return None
    train_rows, test_rows = parts
    _logger.warning(
        "%s has no split %r: probes are tested on %d of its %d training images, held out from their fit by a seed "
        "(data.holdout=%g); pretraining sees them, without labels",
        *(public_name(data.dataset), data.test_split, len(test_rows), len(labels), data.holdout),
    )
    train = load_images(data, data.train_split, num_channels=num_channels, like=like, squares=True, rows=train_rows)
    return train, load_images(data, data.train_split, like=train.preprocessing, squares=True, rows=test_rows)


def _unlabeled(data: DataArguments, split: str) -> InputError:
    return InputError(
        f"{data.dataset}: split {split!r} has no labels, or not for every image, which kNN and probes need; "
        "set data.label_column, or evaluate on another set"
    )


def find_test_split(data: DataArguments) -> DataArguments:
    """Takes the validation split for the test split where a data set has only that."""
    splits = list_splits(data)
    known = [name for name in TEST_SPLITS if name in splits]
    return data if data.test_split in splits or not known else replace(data, test_split=known[0])
