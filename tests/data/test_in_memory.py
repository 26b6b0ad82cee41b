from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_ssl_or.data.in_memory import ListSource
from hf_ssl_or.errors import InputError
from tests.data.image_writing import picture, save, values


def pixels(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def test_images_arrays_tensors_and_paths(tmp_path):
    folder = save(tmp_path, "0.png")
    images = [picture(5), pixels(6), torch.full((3, 8, 8), 7, dtype=torch.uint8), folder / "0.png", f"{folder}/0.png"]
    source = ListSource(images, ["b", "a", "b", "a", "c"], name="mine")
    assert values(source) == [5, 6, 7, 0, 0] and source.class_names == ["a", "b", "c"] and source.name == "mine"
    assert source.labels.tolist() == [1, 0, 1, 0, 2] and source.describe(3) == f"image 3 of mine ({folder}/0.png)"
    assert ListSource(np.stack([pixels(1), pixels(2)])).labels is None


@pytest.mark.parametrize("labels", [[1, 0], np.array([1, 0]), torch.tensor([1, 0])])
def test_named_classes(labels):
    source = ListSource([pixels(1), pixels(2)], labels, class_names=["a", "b", "c"])
    assert source.labels.tolist() == [1, 0] and source.class_names == ["a", "b", "c"]


def test_missing_files_are_unreadable_images(tmp_path):
    source = ListSource([tmp_path / "gone.png", pixels(1)])
    assert len(source) == 2 and "gone.png" in source.describe(0)
    with pytest.raises(FileNotFoundError):
        source.read(0)


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ([pixels(1), None], {}, "image 1 of images: NoneType is no PIL image, array or path"),
        (["https://host/a.png"], {}, "image 0 of images .*: https://host/a.png is a URL"),
        ([pixels(1)], {"labels": [1, 2]}, "2 labels for 1 images"),
        ([pixels(1)], {"labels": [2], "class_names": ["a", "b"]}, "2 is not one of 2 classes"),
        ([pixels(1)], {"labels": ["a"], "class_names": ["a", "b"]}, "a is not one of 2 classes"),
    ],
)
def test_wrong_input_is_one_line(images, more, message):
    with pytest.raises(InputError, match=message):
        ListSource(images, **more)


def test_the_key_is_the_content(tmp_path):
    def key(*images, **more) -> str:
        return ListSource(list(images), **more).fingerprint

    base = key(pixels(1), pixels(2))
    assert base == key(pixels(1), pixels(2), name="other")
    others = [
        key(pixels(2), pixels(1)),
        key(pixels(1), pixels(2), labels=[0, 1]),
        key(pixels(1), pixels(2), labels=[1, 0]),
        key(pixels(1).astype(np.uint16), pixels(2)),
        key(pixels(1).reshape(4, 16, 3), pixels(2)),
        key(picture(1), picture(2)),
        key(picture(2), picture(1)),
    ]
    assert len({base, *others}) == 8
    for value in (1, 2):
        picture(value).save(tmp_path / "a.bmp")
        others.append(key(tmp_path / "a.bmp"))
    assert len({base, *others}) == 10
    turned = picture(1)
    turned.getexif()[0x0112] = 6
    assert key(turned) != key(picture(1))
