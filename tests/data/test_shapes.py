from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from hf_ssl_or.data.shapes import SHAPES, ShapesSource, _render_outlines


def neighbor_accuracy(train: ShapesSource, test: ShapesSource, k: int = 20) -> float:
    """Accuracy of cosine nearest neighbors on raw pixels, votes weighted by exp(similarity / 0.07)."""
    bank, query = (
        F.normalize(torch.stack([torch.from_numpy(s.read(i)) for i in range(len(s))]).flatten(1) / 127.5 - 1)
        for s in (train, test)
    )
    similarity, index = (query @ bank.T).topk(k)
    votes = torch.zeros(len(test), len(SHAPES)).scatter_add_(
        1, torch.from_numpy(train.labels)[index], (similarity / 0.07).exp()
    )
    return (votes.argmax(1) == torch.from_numpy(test.labels)).float().mean().item()


def test_pixels_hardly_tell_the_class():
    assert 0.15 < neighbor_accuracy(ShapesSource(5000, 0), ShapesSource(1000, 1)) < 0.45


def test_an_image_depends_on_seed_and_index_alone():
    few, many, other = ShapesSource(7, 0), ShapesSource(620, 0), ShapesSource(7, 1)
    for i in range(7):
        np.testing.assert_array_equal(few.read(i), many.read(i))
        assert not np.array_equal(few.read(i), other.read(i))
    assert few.labels.tolist() == many.labels[:7].tolist() and len(many) == 620


def test_classes_are_balanced_and_images_use_the_range():
    source = ShapesSource(1000, 0)
    assert np.bincount(source.labels).tolist() == [100] * 10 and source.labels.dtype == np.int64
    images = np.stack([source.read(i) for i in range(200)])
    assert images.dtype == np.uint8 and images.shape == (200, 32, 32, 3)
    assert 0.35 < images.mean() / 255 < 0.65 and images.std() / 255 > 0.15
    assert np.isin(images, (0, 255)).mean() < 0.1


def test_any_size_shows_the_same_scene():
    small, large = ShapesSource(500, 0, size=16), ShapesSource(500, 0, size=64)
    assert large.read(0).shape == (64, 64, 3)
    assert small.fingerprint != large.fingerprint and small.labels.tolist() == large.labels.tolist()


def test_every_shape_has_its_area():
    """Each outline covers a fair part of the image, so that no class is told by its area alone, or is not there."""
    labels = np.arange(500) % len(SHAPES)
    inside = _render_outlines(np.random.default_rng(0), labels, 48)
    areas = [inside[labels == k].mean() for k in range(len(SHAPES))]
    assert all(0.06 < area < 0.25 for area in areas), areas
    assert ((inside > 0) & (inside < 1)).mean() < 0.15  # edges are soft over one pixel only
