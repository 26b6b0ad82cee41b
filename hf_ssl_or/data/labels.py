"""Labels as numbers, and subsets that keep each class's share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import keyed_permutation

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")


def encode_labels(values: Sequence[Any], names: list[str] | None = None) -> tuple[np.ndarray | None, list[str] | None]:
    """Turns labels into 0, ..., K - 1 and the names of the classes.

    A split of which a label is missing (or negative or NaN, as some sets mark it) counts as unlabeled.

    Args:
        values: Numbers or words, one per image.
        names: Names of the classes if the numbers are theirs already; else words and numbers are counted in sorted
            order.

    Raises:
        InputError: A label is no number of a named class.
    """
    if not len(values) or any(value is None for value in values):
        return None, None
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind in "iu" and array.min() < 0):
        return None, None
    if array.dtype.kind == "f" and np.isnan(array).any():
        return None, None
    if names is not None:
        are_numbers = array.dtype.kind in "iu"
        if not are_numbers or array.max() >= len(names):
            wrong = array.max() if are_numbers else array[0]
            raise InputError(f"data.label_column: {wrong} is not one of {len(names)} classes, 0 to {len(names) - 1}")
        return array.astype(np.int64), names
    kinds, labels = np.unique(array, return_inverse=True)
    return labels.astype(np.int64), [str(kind) for kind in kinds]


def content_key(images: str, *arrays: np.ndarray | None) -> str:
    """Hashes the key of images with what belongs to them, such as their labels."""
    digest = hashlib.blake2b(images.encode(errors="surrogateescape"), digest_size=12)
    for array in arrays:
        digest.update(b"\0" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def choose_rows(labels: np.ndarray | None, n: int, fraction: float, seed: int) -> np.ndarray:
    """Chooses a share of range(n), ascending; with labels, each class gives its share to within one image."""
    if fraction == 1:
        return np.arange(n)
    order = keyed_permutation(n, seed, "fraction")
    if labels is not None:
        # The k-th of a class's m images stands at (k + 1/2) / m of the way, so a prefix takes the same share of each.
        order = order[np.argsort(labels[order], kind="stable")]
        _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
        place = (np.arange(n) - np.repeat(start, count) + 0.5) / np.repeat(count, count)
        order = order[np.argsort(place, kind="stable")]
    return np.sort(order[: max(1, round(fraction * n))])


def hold_out(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Parts labeled images into those of a fit and those of its test, class by class, the same in every run.

    Args:
        labels: int64, (n,).
        share: Share of the images that is tested on.

    Returns:
        Rows of both; None if those of the fit would be of one class: there is nothing to tell apart.
    """
    test_rows = choose_rows(labels, len(labels), share, seed=0)
    train_rows = np.setdiff1d(np.arange(len(labels)), test_rows)
    return None if len(np.unique(labels[train_rows])) < 2 else (train_rows, test_rows)
