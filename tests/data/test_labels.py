from __future__ import annotations

import numpy as np
import pytest

from hf_ssl_or.data.labels import choose_rows, encode_labels


def test_words_and_odd_numbers_are_counted_in_order():
    labels, names = encode_labels(["dog", "cat", "dog"])
    assert labels.tolist() == [1, 0, 1] and names == ["cat", "dog"] and labels.dtype == np.int64
    labels, names = encode_labels([10, 3, 7, 3])
    assert labels.tolist() == [2, 0, 1, 0] and names == ["3", "7", "10"]


def test_class_labels_stay():
    labels, names = encode_labels([2, 0], ["a", "b", "c"])
    assert labels.tolist() == [2, 0] and names == ["a", "b", "c"]


@pytest.mark.parametrize("values", [[], [1, None], [-1, -1], [0, -1]])
def test_missing_labels_count_as_none(values):
    assert encode_labels(values) == (None, None)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.333, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_class_gives_its_share_to_within_one_image(fraction, seed):
    labels = np.repeat(np.arange(7), [1, 5, 40, 100, 101, 333, 1000])
    labels = np.random.default_rng(0).permutation(labels)
    rows = choose_rows(labels, len(labels), fraction, seed)
    assert len(rows) == round(fraction * len(labels)) and (np.diff(rows) > 0).all()
    counts = np.bincount(labels[rows], minlength=7)
    assert (abs(counts - fraction * np.bincount(labels)) <= 1).all()


def test_subset_depends_on_the_seed_and_is_spread_without_labels():
    first, second = (choose_rows(None, 1000, 0.2, seed) for seed in (0, 1))
    assert len(first) == 200 and not np.array_equal(first, second)
    np.testing.assert_array_equal(first, choose_rows(None, 1000, 0.2, 0))
    assert 400 < first.mean() < 600


def test_the_whole_is_the_whole():
    np.testing.assert_array_equal(choose_rows(np.zeros(5, int), 5, 1, 3), np.arange(5))
