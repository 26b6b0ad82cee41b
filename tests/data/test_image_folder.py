"""Folders and globs: splits as the `datasets` library sees them, and what is left out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.sources import list_splits, load_source
from hf_ssl_or.errors import InputError
from hf_ssl_or.models import image_conversion
from tests.data.image_writing import load, picture, png, save, values, write_shard


def splits_of(dataset: object, **more: object) -> list[str]:
    return list_splits(DataArguments(dataset=str(dataset), **more))


def names(source) -> list[str]:
    return sorted(Path(source.describe(i)).name for i in range(len(source)))


# Splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("training", "testing"),
        ("train", "dev"),
        ("train", "val"),
        ("train", "valid"),
        ("training", "evaluation"),
        ("train", "eval"),
        ("train2017", "val2017"),
        ("train-images", "test-images"),
        ("plates_train", "plates_test"),
        ("plates.train.v2", "plates.dev.v2"),
        ("data/train", "data/test"),
        ("deep/data/training_set", "deep/data/validation_set"),
    ],
)
@pytest.mark.parametrize("classes", [("",), ("cat", "dog")])
def test_split_folders_are_those_of_the_library(tmp_path, monkeypatch, train, test, classes):
    files = [f"{split}/{name}/{i}.png" for split in (train, test) for name in classes for i in range(2)]
    save(tmp_path / "set", *(file.replace("//", "/") for file in files))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"))
    ours = splits_of(tmp_path / "set")
    assert set(ours) == set(map(str, theirs))
    for split in theirs:
        source = load(tmp_path / "set", str(split))
        expected = [image.getpixel((0, 0))[0] for image in theirs[split]["image"]]
        assert values(source) == sorted(expected)
        assert source.class_names == (None if classes == ("",) else ["cat", "dog"])


def test_a_split_has_the_name_of_its_folder_and_of_the_library(tmp_path):
    save(tmp_path, "training/1.png", "dev/2.png", "val/3.png", "unlabeled/4.png")
    assert splits_of(tmp_path) == ["train", "validation", "unlabeled"]
    assert splits_of(tmp_path, test_split="dev") == ["train", "validation", "unlabeled", "dev"]
    assert values(load(tmp_path, "train")) == values(load(tmp_path, "training")) == [0]
    assert values(load(tmp_path, "validation")) == [1, 2] and values(load(tmp_path, "val")) == [2]
    assert values(load(tmp_path, "unlabeled")) == [3]
    with pytest.raises(
        InputError, match="no split 'test'; available: train, validation, unlabeled, dev, training, val"
    ):
        load(tmp_path, "test")


def test_capitals_do_not_matter(tmp_path):
    save(tmp_path, "Training/a/1.png", "Training/b/2.png", "TESTING/a/3.png")
    assert splits_of(tmp_path) == ["train", "test"] and values(load(tmp_path, "Testing")) == [2]
    assert load(tmp_path).class_names == ["a", "b"]


def test_split_folders_below_those_of_classes(tmp_path):
    save(tmp_path, *(f"{kind}/{split}/{split}.png" for kind in ("cat", "dog") for split in ("train", "test")))
    assert names(load(tmp_path)) == ["train.png", "train.png"] and load(tmp_path).class_names == ["cat", "dog"]


def test_a_class_below_a_split_may_have_the_name_of_another(tmp_path):
    save(tmp_path, "train/test_tube/1.png", "train/cup/2.png", "test/test_tube/3.png", "test/cup/4.png")
    assert load(tmp_path).class_names == ["cup", "test_tube"] and sorted(values(load(tmp_path))) == [0, 1]


def test_images_in_no_split_are_left_out_and_named(tmp_path, caplog):
    save(tmp_path, "train/1.png", "test/2.png", "extra/3.png", "extra/4.png", "sample.png")
    assert values(load(tmp_path)) == [0]
    assert "left out 3 images that are in no split: extra (2), no folder (1)" in caplog.text


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("cat", "dog", "test"), "test beside cat, dog"),
        (("train", "holdout"), "train beside holdout"),
        (("trainval", "test"), "test beside trainval"),
        (("train/a", "train/b", "gallery/a", "query/a"), "train beside gallery, query"),
        (("train-val", "images"), "train-val beside images"),
        (("train-test",), "train-test may be a split"),
        (("cat", "dog/val"), "dog/val beside cat"),
    ],
)
def test_folders_that_may_be_a_split_are_refused(tmp_path, folders, named):
    save(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
    with pytest.raises(InputError, match=named) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and "rename it" in str(error.value)


def test_a_glob_says_that_each_folder_is_a_class(tmp_path, caplog):
    save(tmp_path, "cat/1.png", "dog/1.png", "test/1.png")
    assert load(f"{tmp_path}/**/*").class_names == ["cat", "dog", "test"]
    assert "read as a folder like the others: test" in caplog.text


def test_names_of_files_say_the_split_where_all_do(tmp_path, caplog):
    save(tmp_path / "all", "cat/train_1.png", "dog/train_2.png", "cat/test_1.png", "dog/test_2.png")
    assert splits_of(tmp_path / "all") == ["train", "test"]
    assert names(load(tmp_path / "all", "test")) == ["test_1.png", "test_2.png"]
    assert load(tmp_path / "all").class_names == ["cat", "dog"]
    save(tmp_path / "most", "train_1.png", "train_2.png", "test_1.png", "3.png")
    with pytest.raises(InputError, match=r"3 of 4 files are named like splits, such as test_1.png, train_1.png"):
        load(tmp_path / "most")
    save(tmp_path / "few", "Val d'Isere.png", "1.png", "2.png")
    assert len(load(tmp_path / "few")) == 3 and "1 of 3 files are named like splits" in caplog.text


# Globs


def test_globs(tmp_path):
    save(tmp_path, "b/2.png", "a/1.png", "a/deep/3.png", "c/4.jpg", "c/.hidden.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert values(load(f"{tmp_path}/**/*.png")) == [1, 2, 0]
    assert load(f"{tmp_path}/**/*.png").class_names == ["a", "b"]
    assert load(f"{tmp_path}/**/*.png").labels.tolist() == [0, 0, 1]
    assert load(f"{tmp_path}/a/*.png").labels is None and values(load(f"{tmp_path}/a/*.png")) == [1]
    assert values(load(f"{tmp_path}/{{b,a}}/*.png")) == [1, 0]
    assert values(load(f"{tmp_path}/[ab]/?.png")) == [1, 0]
    assert len(load(f"{tmp_path}/**/*.{{png,jpg}}")) == 4
    assert load(f"{tmp_path}/{{b,c}}").class_names == ["b", "c"]


def test_globs_of_splits(tmp_path):
    save(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    assert values(load(f"{tmp_path}/**/*.png")) == [0, 1] and values(load(f"{tmp_path}/**/*.png", "test")) == [2]
    for pattern in ("{split}", "{split}/*/*.png"):
        assert splits_of(f"{tmp_path}/{pattern}") == ["train", "test"]
        assert load(f"{tmp_path}/{pattern}").class_names == ["a", "b"]
        assert values(load(f"{tmp_path}/{pattern}", "test")) == [2]
    assert splits_of(f"{tmp_path}/{{split}}/b/*.png") == ["train"]


def test_globs_without_images_are_refused(tmp_path):
    save(tmp_path, "a/1.png", "b/2.png")
    with pytest.raises(InputError, match=r"matches folders only; write .*/\*/\*\* for their files"):
        load(f"{tmp_path}/*")
    with pytest.raises(InputError, match=r"there is no image in .*\*.jpg"):
        load(f"{tmp_path}/*.jpg")


# What is left out


def test_other_files_are_counted_by_extension(tmp_path, monkeypatch, caplog):
    for name in (".heic", ".heif", ".HEIC"):
        monkeypatch.delitem(Image.EXTENSION, name, raising=False)
    save(tmp_path, "1.png", *(f"{i}.HEIC" for i in range(101)))
    with caplog.at_level(logging.INFO):
        assert len(load(tmp_path)) == 1
    assert "left out 101 files: .HEIC (101); pip install pillow-heif reads them" in caplog.text
    caplog.clear()
    monkeypatch.setattr(image_conversion, "pydicom", None)
    for name in ("a.dcm", "b.dcm", "c.mov", "d", "LICENSE", "e.txt", "Thumbs.db", ".DS_Store", "f.CSV"):
        (tmp_path / name).write_bytes(b"?")
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    warning, note = [record for record in caplog.records if "left out" in record.message]
    assert "left out 105 files: .HEIC (101), .dcm (2), no extension (1), .mov (1);" in warning.message.replace(
        ".mov (1), no extension (1)", "no extension (1), .mov (1)"
    )
    assert "pip install pillow-heif reads .HEIC; pip install 'hf-ssl-or[medical]' reads .dcm" in warning.message
    assert note.levelno == logging.INFO and "left out 5 files: " in note.message and "hidden (1)" in note.message
    caplog.clear()
    load(f"{tmp_path}/*.[mp]*")
    assert "left out 1 file: .mov (1)" in caplog.text


@pytest.mark.parametrize("name", ["a.eps", "a.pdf", "a.ps", "a.wmf", "a.emf", "a.mpg", "a.h5", "a.svg"])
def test_what_is_no_raster_image_is_left_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(InputError, match="there is no image in"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a.JPG", "a.jfif", "a.Tiff", "a.npy", "a.NPZ", "a.dcm", "a.heic", "a.qoi", "a.pfm"])
def test_what_can_be_opened_is_an_image_in_any_case(tmp_path, name):
    (tmp_path / name).write_bytes(b"?")
    source = load(tmp_path)
    assert len(source) == 1
    with pytest.raises((ValueError, OSError)):
        source.read(0)


def test_left_out_files_are_those_of_the_split(tmp_path, caplog):
    save(tmp_path, "train/1.png", "test/1.png")
    (tmp_path / "test" / "2.mov").write_bytes(b"?")
    load(tmp_path, "train")
    assert "left out" not in caplog.text
    load(tmp_path, "test")
    assert "left out 1 file: .mov (1)" in caplog.text


def test_dangling_links_are_unreadable_images(tmp_path):
    save(tmp_path, "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    for dataset in (tmp_path, f"{tmp_path}/*.png"):
        source = load(dataset)
        assert len(source) == 2 and source.describe(1) == str(tmp_path / "2.png")
        with pytest.raises(OSError, match="No such file"):
            source.read(1)


def test_pipes_are_refused(tmp_path):
    os.mkfifo(save(tmp_path, "1.png") / "2.png")
    with pytest.raises(InputError, match="2.png is no file .*remove it"):
        load(tmp_path)


def test_tar_files_in_a_folder_are_a_pattern(tmp_path, caplog):
    write_shard(tmp_path / "a.tar", {"1.png": png(1)})
    with pytest.raises(InputError, match=rf"tar files \(1\); .* data.dataset='{tmp_path}/\*.tar'"):
        load(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "train-0.tar")
    write_shard(tmp_path / "test-0.tar", {"1.png": png(1)})
    with pytest.raises(InputError, match=r"/\{split\}\*.tar'"):
        load(tmp_path)
    assert values(load_source(DataArguments(dataset=f"{tmp_path}/{{split}}*.tar"), "test")) == [1]
    picture(3).save(tmp_path / "3.png")
    assert values(load(tmp_path)) == [3] and ".tar (2)" in caplog.text
