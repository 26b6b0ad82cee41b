"""The labelled images that judge an encoder: a train and a test split whose labels mean the same."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.cache import load_images
from hf_ssl_or.data.decode import Statistics
from hf_ssl_or.data.images import ImageSet
from hf_ssl_or.data.sources import list_splits, load_source
from hf_ssl_or.errors import InputError

_TEST_SPLITS = ("test", "validation", "valid", "val")


def load_labelled(
    data: DataArguments, *, statistics: Statistics | None = None, required: bool = True
) -> tuple[ImageSet, ImageSet] | None:
    """Loads the labelled training and test images, or gives None where there are none.

    Args:
        data: Names the data set and its splits; all training images are used, whatever its `fraction`.
        statistics: Mean and standard deviation to take over, see `load_images`.
        required: Missing labels or a missing test split are an error.

    Raises:
        InputError: There is no such data set, or it is required and lacks a split or labels.
    """
    data = replace(data, fraction=1.0)
    if not required and data.test_split not in list_splits(data):
        return None
    train = load_images(data, data.train_split, statistics=statistics)
    if train.labels is None and not required:
        return None
    test = load_images(data, data.test_split, statistics=statistics)
    if train.labels is None or test.labels is None:
        split = data.train_split if train.labels is None else data.test_split
        raise InputError(
            f"{data.dataset}: split {split!r} has no labels, or not for every image, which kNN and probes need; "
            "set data.label_column, or judge on another set"
        )
    return train, same_labels(train, test)


def same_labels(train: ImageSet, test: ImageSet) -> ImageSet:
    """Numbers the classes of the test images as those of the training images, by their names.

    Words are numbered split by split, so a class that one split lacks would shift the others. Classes that only the
    test images have come after all others.
    """
    ours, theirs = train.class_names, test.class_names
    if test.labels is None or ours is None or theirs is None or ours == theirs:
        return test
    names = [*ours, *(name for name in theirs if name not in set(ours))]
    place = {name: i for i, name in enumerate(names)}
    number_K = torch.tensor([place[name] for name in theirs], dtype=torch.int64)
    return replace(test, labels=number_K[test.labels], class_names=names)


def find_dataset(name: str) -> str:
    """Finds a data set by its name in the folder `$HF_SSL_OR_DATA`; any other name stays as it is."""
    folder = os.environ.get("HF_SSL_OR_DATA")
    if folder and not Path(name).expanduser().exists() and (Path(folder) / name).is_dir():
        return str(Path(folder) / name)
    return name


def find_test_split(data: DataArguments) -> DataArguments:
    """Takes the validation split for the test split where a data set has only that."""
    splits = list_splits(data)
    known = [name for name in _TEST_SPLITS if name in splits]
    return data if data.test_split in splits or not known else replace(data, test_split=known[0])


def natural_side(data: DataArguments) -> int:
    """Gives the short side of the training images in pixels, the median of a sample."""
    source, sides = load_source(data, data.train_split), []
    for row in np.linspace(0, len(source) - 1, num=min(16, len(source)), dtype=np.int64):
        try:
            image = source.read(int(row))
        except (OSError, ValueError):  # an unreadable image is counted, and named, when all are decoded
            continue
        sides.append(min(image.shape[:2]) if isinstance(image, np.ndarray) else min(image.size))
    return int(np.median(sides)) if sides else data.image_size
