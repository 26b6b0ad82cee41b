"""The files of a run's sample."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.evaluation.neighbors import pack_features, write_samples
from hf_ssl_or.models.image_conversion import Preprocessing


class Pixels(nn.Module):
    """Returns the first 24 pixels as features."""

    def forward(self, images_BCHW: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=images_BCHW.flatten(1)[:, :24])


def noise(n: int, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def image_set(n: int, *, labeled: bool = True, size: int = 8) -> ImageSet:
    labels = torch.arange(n) % 3 if labeled else None
    names = ["a", "b<i>", "c"] if labeled else None
    how = Preprocessing(image_size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    pixels = noise(n, size).permute(0, 2, 3, 1).numpy()
    return ImageSet.from_arrays(pixels, labels, class_names=names, name="noise", preprocessing=how)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_packed_features_keep_their_geometry_at_any_scale(scale: float) -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 2
    packed = pack_features(features * scale)
    centered = (features - features.mean(0)).double().numpy()
    assert packed.dtype == np.float16
    np.testing.assert_allclose(packed, centered / np.sqrt((centered**2).mean()), atol=5e-3)


def test_packed_features_that_do_not_vary_are_zero() -> None:
    assert not pack_features(torch.full((5, 3), 1e4 / 3)).any()


def test_files_of_a_labeled_set(tmp_path: Path) -> None:
    images = image_set(40)
    arguments = {"device": "cpu", "limit": 30, "queries": 4, "k": 5}
    write_samples(Pixels(), images, tmp_path, **arguments)
    features, neighbors = np.load(tmp_path / "features.npz"), np.load(tmp_path / "neighbors.npz")
    assert features["features"].shape == (30, 24) and features["class_names"].tolist() == ["a", "b<i>", "c"]
    assert neighbors["images"].shape == (4, 6, 3, 8, 8) and neighbors["distances"].shape == (4, 5)
    assert (np.diff(neighbors["distances"]) >= 0).all() and (neighbors["distances"] >= 0).all()
    for shown, labels in zip(neighbors["images"], neighbors["labels"], strict=True):
        for picture, label in zip(shown, labels, strict=True):
            (source,) = np.flatnonzero((noise(40).numpy() == picture).all((1, 2, 3)))
            assert label == source % 3
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_samples(Pixels(), images, tmp_path, **arguments)
    again = np.load(tmp_path / "features.npz")["labels"]
    assert before.keys() == {"features.npz", "neighbors.npz"} and (again == features["labels"]).all()


def test_files_of_a_small_unlabeled_set(tmp_path: Path) -> None:
    images = image_set(3, labeled=False, size=100)
    write_samples(Pixels(), images, tmp_path, device="cpu")
    neighbors = np.load(tmp_path / "neighbors.npz")
    assert neighbors["images"].shape == (3, 3, 3, 64, 64) and "labels" not in neighbors
    assert np.load(tmp_path / "features.npz").files == ["features"]
