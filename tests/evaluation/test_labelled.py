"""Labels mean the same in both splits; sizes, splits and names of data sets are found."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.labelled import find_dataset, find_test_split, load_labelled, natural_side


def image_folder(folder: Path, splits: dict[str, dict[str, int]], side: int = 12) -> DataArguments:
    """Writes images as folder/split/class/number.png, of mixed sizes and shapes."""
    rng = np.random.default_rng(0)
    for split, classes in splits.items():
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(side + i, side + 2 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return DataArguments(dataset=str(folder), image_size=16)


def test_words_are_numbered_alike_in_both_splits(tmp_path: Path) -> None:
    splits = {"train": {"ant": 2, "bee": 2, "cat": 2}, "test": {"bee": 1, "cat": 1, "dog": 2}}
    train, test = load_labelled(image_folder(tmp_path, splits))
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and train.class_names == ["ant", "bee", "cat"]
    assert test.labels.tolist() == [1, 2, 3, 3] and test.class_names == ["ant", "bee", "cat", "dog"]


def table(path: Path, labels: dict[str, list]) -> DataArguments:
    images = {split: [Image.new("RGB", (8, 8))] * len(values) for split, values in labels.items()}
    parts = {
        split: datasets.Dataset.from_dict({"image": images[split], "label": values}, features=None).cast_column(
            "image", datasets.Image()
        )
        for split, values in labels.items()
    }
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return DataArguments(dataset=str(path), image_size=8)


def test_words_in_a_column_are_numbered_alike(tmp_path: Path) -> None:
    data = table(tmp_path / "words", {"train": ["b", "a", "c", "c"], "test": ["c", "c"]})
    train, test = load_labelled(data)
    assert train.labels.tolist() == [1, 0, 2, 2] and test.labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("none", [0, 1, None], [0, 1]), ("nan", [0.0, 1.0, float("nan")], [0.0]), ("minus", [0, 1, -1], [1])],
)
def test_a_missing_label_is_said(tmp_path: Path, name: str, train: list, test: list) -> None:
    data = table(tmp_path / name, {"train": train, "test": test})
    with pytest.raises(InputError, match="split 'train' has no labels, or not for every image") as caught:
        load_labelled(data)
    assert "\n" not in str(caught.value)
    assert load_labelled(data, required=False) is None


def test_all_training_images_take_part(tmp_path: Path) -> None:
    data = image_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    data.fraction = 0.5
    assert len(load_labelled(data)[0]) == 6


def test_mixed_sizes_become_central_squares(tmp_path: Path) -> None:
    data = image_folder(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 1, "b": 1}})
    assert natural_side(data) == 14  # of 12, 13, 14, 15, 16
    assert load_labelled(data)[0].images.shape == (10, 3, 16, 16)


def test_the_validation_split_stands_in(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "v", {"train": {"a": 1, "b": 1}, "validation": {"a": 1, "b": 1}})
    assert find_test_split(data).test_split == "validation"
    data = image_folder(tmp_path / "t", {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    assert find_test_split(data).test_split == "test"
    assert load_labelled(DataArguments(dataset="shapes", shapes_train=9, shapes_test=0), required=False) is None


def test_names_in_the_folder_of_data_sets(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "flowers").mkdir()
    assert find_dataset("flowers") == "flowers"
    monkeypatch.setenv("HF_SSL_OR_DATA", str(tmp_path))
    assert find_dataset("flowers") == str(tmp_path / "flowers")
    assert [find_dataset(name) for name in ("shapes", "org/set", str(tmp_path))] == [
        "shapes",
        "org/set",
        str(tmp_path),
    ]
    assert torch.is_tensor(load_labelled(DataArguments(dataset="shapes", shapes_train=9, shapes_test=5))[1].labels)
