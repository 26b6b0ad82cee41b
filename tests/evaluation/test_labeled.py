"""Labels mean the same in both splits; sizes, splits and names are found; a hold-out stands in for a split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.labeled import find_test_split, load_labeled


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
    train, test = load_labeled(image_folder(tmp_path, splits))
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
    train, test = load_labeled(data)
    assert train.labels.tolist() == [1, 0, 2, 2] and test.labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("none", [0, 1, None], [0, 1]), ("nan", [0.0, 1.0, float("nan")], [0.0]), ("minus", [0, 1, -1], [1])],
)
def test_a_missing_label_is_said(tmp_path: Path, name: str, train: list, test: list) -> None:
    data = table(tmp_path / name, {"train": train, "test": test})
    with pytest.raises(InputError, match="split 'train' has no labels, or not for every image") as caught:
        load_labeled(data)
    assert "\n" not in str(caught.value)
    assert load_labeled(data, required=False) is None


def test_all_training_images_take_part(tmp_path: Path) -> None:
    data = image_folder(tmp_path, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    data.fraction = 0.5
    assert len(load_labeled(data)[0]) == 6


def test_mixed_sizes_become_central_squares(tmp_path: Path) -> None:
    data = image_folder(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 1, "b": 1}})
    squares = load_labeled(data)[0].unit_squares(np.arange(10))
    as_torchvision_does = v2.Compose([v2.Resize(16), v2.CenterCrop(16), v2.PILToTensor()])
    files = sorted((tmp_path / "train").rglob("*.png"))  # of 12, 13, 14, 15 and 16 pixels, and longer on one side
    expected = torch.stack([as_torchvision_does(Image.open(file)) for file in files])
    assert (squares * 255).round().equal(expected.float())


def test_the_validation_split_stands_in(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "v", {"train": {"a": 1, "b": 1}, "validation": {"a": 1, "b": 1}})
    assert find_test_split(data).test_split == "validation"
    data = image_folder(tmp_path / "t", {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    assert find_test_split(data).test_split == "test"
    assert load_labeled(DataArguments(dataset="shapes", shapes_train=9, shapes_test=0), required=False) is None


# ---------------------------------------------------------------------------------------------------------------------
# Sets without a test split


def rows(images) -> list[int]:
    return images.job.rows.tolist()


def test_a_set_without_a_test_split_is_parted_class_by_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = image_folder(tmp_path / "pictures", {"": {"ant": 10, "bee": 20, "cat": 30}})
    train, test = load_labeled(data)
    (line,) = caplog.messages
    assert line == (
        "pictures has no split 'test': probes are tested on 6 of its 60 training images, held out from their fit by a "
        "seed (data.holdout=0.1); pretraining sees them, without labels"
    )
    assert sorted(rows(train) + rows(test)) == list(range(60))
    assert test.labels.bincount().tolist() == [1, 2, 3] and train.labels.bincount().tolist() == [9, 18, 27]
    assert train.class_names == test.class_names == ["ant", "bee", "cat"]
    assert test.preprocessing == train.preprocessing
    again = load_labeled(data, required=False)
    assert [rows(images) for images in again] == [rows(train), rows(test)]


def test_the_share_that_is_held_out(tmp_path: Path) -> None:
    data = image_folder(tmp_path, {"": {"a": 8, "b": 8}})
    few, many = (load_labeled(dataclasses.replace(data, holdout=share, fraction=0.5)) for share in (0.25, 0.5))
    assert [len(images) for images in (*few, *many)] == [12, 4, 8, 8]
    assert set(rows(few[1])) < set(rows(many[1]))
    for share in (0, 1.0):
        with pytest.raises(InputError, match="data.holdout: a share of more than 0 and less than 1"):
            dataclasses.replace(data, holdout=share)


def test_a_table_without_a_test_split_is_parted_too(tmp_path: Path) -> None:
    train, test = load_labeled(table(tmp_path / "words", {"train": ["b", "a"] * 20}))
    assert test.labels.bincount().tolist() == [2, 2] and not set(rows(train)) & set(rows(test))


def test_what_has_no_labels_is_not_parted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    flat = DataArguments(dataset=str(tmp_path), image_size=8)
    assert load_labeled(flat, required=False) is None
    with pytest.raises(InputError, match="split 'train' has no labels"):
        load_labeled(flat)
    shapes = DataArguments(dataset="shapes", shapes_train=50, shapes_test=0)
    assert load_labeled(shapes, required=False) is None and not caplog.messages
    train, test = load_labeled(shapes)
    assert len(train) + len(test) == 50 and len(test) > 0


@pytest.mark.parametrize(("name", "labels"), [("one image each", ["a", "b"]), ("one class", ["a"] * 20)])
def test_too_few_images_or_classes_are_not_parted(name: str, labels: list, tmp_path: Path) -> None:
    data = table(tmp_path / name, {"train": labels})
    assert load_labeled(data, required=False) is None
    with pytest.raises(InputError, match=f"has no split 'test', and its {len(labels)} images are too few, or of too"):
        load_labeled(data)
