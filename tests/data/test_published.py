from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.class_subset import IMAGENET100
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.published import PUBLISHED, find_published, resolve_dataset
from hf_ssl_or.data.sources import list_shards, list_splits, load_source
from hf_ssl_or.errors import InputError
from hf_ssl_or.listing import names_and_notes


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_SSL_OR_DATA", str(tmp_path))
    return tmp_path


def write_copy(
    folder: Path, *, splits: tuple[str, ...] = ("train", "test"), image: str = "img", **columns: list
) -> Path:
    """Writes parquet files of four images per split, with columns of ClassLabels: (names, labels)."""
    features = datasets.Features(
        {image: datasets.Image(), **{name: datasets.ClassLabel(names=names) for name, (names, _) in columns.items()}}
    )
    images = [np.full((8, 8, 3), shade, np.uint8) for shade in range(4)]
    folder.mkdir(parents=True)
    for split in splits:
        rows = {image: images, **{name: labels for name, (_, labels) in columns.items()}}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


FINE, COARSE = [["ant", "bee", "cat"], [2, 0, 1, 2]], [["insect", "pet"], [1, 0, 0, 1]]


def where(name: str, **settings) -> tuple[str, str | None, object]:
    found = resolve_dataset(DataArguments(dataset=name, **settings))
    return found.dataset, found.dataset_config, found.classes


def test_names_without_a_copy_are_those_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_SSL_OR_DATA", raising=False)
    assert where("cifar10") == where("uoft-cs/cifar10") == ("uoft-cs/cifar10", None, None)
    assert where("voc07") == ("fuliucansheng/pascal_voc", "voc2007_main", None)
    assert where("voc07", dataset_config="mine")[1] == "mine"
    assert where("imagenet100") == ("ILSVRC/imagenet-1k", None, "imagenet100")
    assert where("imagenet100", classes=["n02869837"])[2] == ["n02869837"]
    assert where("org/flowers") == ("org/flowers", None, None)
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert where("cifar10")[0] == "cifar10" and find_published("cifar10") is None  # a folder here is that folder


def test_a_copy_wins_over_the_hub(copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cifar10", "imagenet-1k", "flowers"):
        (copies / name).mkdir()
    with caplog.at_level(logging.INFO, logger="hf_ssl_or"):
        assert where("cifar10")[0] == where("uoft-cs/cifar10")[0] == str(copies / "cifar10")
        where("cifar10")
    assert [record.message for record in caplog.records] == [
        f"{name}: read from the copy in {copies / 'cifar10'}" for name in ("cifar10", "uoft-cs/cifar10")
    ]
    assert where("flowers")[0] == where("org/flowers")[0] == str(copies / "flowers")
    assert where("imagenet100") == (str(copies / "imagenet-1k"), None, "imagenet100")
    (copies / "org" / "flowers").mkdir(parents=True)
    (copies / "imagenet100").mkdir()
    (copies / "jxie" / "stl10").mkdir(parents=True)
    assert where("org/flowers")[0] == str(copies / "org" / "flowers")
    assert where("imagenet100") == (str(copies / "imagenet100"), None, None)  # which has these classes alone
    assert where("stl10")[0] == str(copies / "jxie" / "stl10")
    for path in ("shapes", "/nowhere/cifar10", "./cifar10", "a/b/cifar10"):
        assert where(path)[0] == path


def test_columns_of_the_table_are_read_where_the_copy_has_them(copies: Path) -> None:
    write_copy(copies / "cifar100", label=COARSE, fine_label=FINE)
    for name in ("cifar100", "uoft-cs/cifar100"):
        data = DataArguments(dataset=name, image_size=8)
        source = load_source(data, "train")
        assert source.class_names == FINE[0] and source.labels is not None and source.labels.tolist() == FINE[1]
        assert load_source(replace(data, label_column="label"), "train").class_names == COARSE[0]
        assert data.dataset == name  # what a recipe keeps does not say where the copy is
        assert load_images(data, "test").name == name
    write_copy(copies / "cifar10", image="image", label=COARSE)
    assert load_source(DataArguments(dataset="cifar10"), "train").class_names == COARSE[0]


def test_the_own_name_of_a_split_stands_behind_the_default(copies: Path) -> None:
    write_copy(copies / "food101", splits=("train", "validation"), image="image", label=FINE)
    write_copy(copies / "imagenet-1k", splits=("train", "validation", "test"), image="image", label=FINE)
    food, imagenet = DataArguments(dataset="ethz/food101"), DataArguments(dataset="imagenet-1k")
    assert list_splits(food) == ["train", "validation", "test"]
    assert len(load_source(food, "test")) == len(load_source(food, "validation")) == 4
    shard = replace(imagenet, streaming=True)
    assert [Path(url).name for url in list_shards(shard, "test")] == ["validation-00000-of-00001.parquet"]
    write_copy(copies / "dtd", image="image", label=FINE)
    with pytest.raises(InputError, match="dtd has no split 'validation'; available: train, test"):
        load_source(DataArguments(dataset="dtd"), "validation")


# ---------------------------------------------------------------------------------------------------------------------
# data.classes


def kept(source) -> tuple[list[str], list[int], list[int]]:
    return (
        source.class_names,
        source.labels.tolist(),
        [int(np.asarray(source.read(i))[0, 0, 0]) for i in range(len(source))],
    )


def test_classes_of_a_table_are_numbered_in_the_order_of_the_list(tmp_path: Path) -> None:
    folder = write_copy(tmp_path / "animals", label=FINE)
    data = DataArguments(dataset=str(folder), classes=["cat", "ant"], image_size=8)
    source = load_source(data, "train")
    assert kept(source) == (["cat", "ant"], [0, 1, 0], [0, 1, 3])
    assert source.describe(2).startswith("row 3")
    others = load_source(replace(data, classes=["ant", "cat"]), "train")
    assert others.fingerprint != source.fingerprint
    assert len(load_images(data, "train")) == 3 and load_images(data, "test").class_names == ["cat", "ant"]
    part = load_images(replace(data, fraction=0.67), "train")
    assert part.labels is not None and sorted(part.labels.tolist()) == [0, 1]  # of each kept class
    with pytest.raises(InputError, match="unknown class of .* in data.classes 'cot': did you mean 'cat'"):
        load_source(replace(data, classes=["cot"]), "train")


def test_classes_of_folders(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for shade, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / split / name / "a.png")
    data = DataArguments(dataset=str(tmp_path), classes=["cat", "bee"])
    for split in ("train", "test"):
        assert kept(load_source(data, split)) == (["cat", "bee"], [1, 0], [1, 2])


def test_imagenet_100_is_found_by_wordnet_id_or_by_the_order_of_imagenets_classes(copies: Path) -> None:
    assert len(set(IMAGENET100)) == 100 and sorted(IMAGENET100) == IMAGENET100
    names = [f"name {i}, another" for i in range(1000)]  # the Hub's names are words
    write_copy(copies / "imagenet-1k", image="image", label=[names, [8, 0, 15, 8]], splits=("train", "validation"))
    source = load_source(DataArguments(dataset="imagenet100"), "test")
    assert source.class_names == IMAGENET100
    assert [source.class_names[label] for label in source.labels] == ["n01558993"]  # the robin, 15 of ImageNet
    ids = ["n01558993", "n01440764", "n01855672", "n02123045"]
    write_copy(copies / "ids", label=[ids, [0, 1, 2, 3]])
    with pytest.raises(InputError, match="unknown class of .*ids in data.classes 'n01"):
        load_source(DataArguments(dataset="ids", classes="imagenet100"), "train")


def test_classes_are_refused_where_there_are_none(tmp_path: Path) -> None:
    unlabeled = write_copy(tmp_path / "unlabeled")
    with pytest.raises(InputError, match=r"data\.classes: the images of .*unlabeled have no labels"):
        load_source(DataArguments(dataset=str(unlabeled), classes=["a"]), "train")
    for classes in ([], ["a", "a"]):
        with pytest.raises(InputError, match=r"data\.classes: one or more names"):
            DataArguments(dataset="cifar10", classes=classes)
    with pytest.raises(InputError, match=r"data\.classes: a streamed set is used whole"):
        list_shards(DataArguments(dataset="imagenet100", streaming=True), "train")


def test_the_table_is_listed() -> None:
    listed = dict(names_and_notes("datasets"))
    assert list(listed) == list(PUBLISHED)
    assert listed["cifar10"] == ("uoft-cs/cifar10; 10 classes; train 50,000, test 10,000; side 32; license unknown")
