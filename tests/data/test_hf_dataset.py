"""Columns of Hugging Face data sets, and keys that follow their content."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, List, Value

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.hf_dataset import open_table
from hf_ssl_or.data.shards import index_shards
from hf_ssl_or.data.sources import load_source
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import to_pixels
from tests.data.image_writing import load, picture, png, save, values


@pytest.fixture(autouse=True)
def table_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def cell(value: int | None) -> dict | None:
    return None if value is None else {"bytes": png(value), "path": None}


def write(folder: Path, **columns: list) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def saved(folder: Path, features: Features, **columns: list) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(folder)
    return folder


# Columns


@pytest.mark.parametrize("declared", [True, False])
def test_nested_columns(tmp_path, declared):
    rows = [{"img": cell(k), "deep": {"kind": kind}} for k, kind in ((1, "b"), (2, "a"))]
    if declared:
        meta = {"img": Image(), "deep": {"kind": Value("string")}}
        folder = saved(tmp_path / "set", Features({"meta": meta, "label": Value("int64")}), meta=rows, label=[7, 7])
    else:
        folder = write(tmp_path / "set", meta=rows, label=[7, 7])
    source = load(folder)
    assert values(source) == [1, 2] and source.class_names == ["7"]
    assert source.describe(1) == "row 1 of split 'train', column 'meta.img'"
    source = load(folder, image_column="meta.img", label_column="meta.deep.kind")
    assert source.class_names == ["a", "b"] and source.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="unknown data.image_column 'meta.igm': did you mean 'meta.img'"):
        load(folder, image_column="meta.igm")
    with pytest.raises(InputError, match="unknown data.label_column 'meta.kind'"):
        load(folder, label_column="meta.kind")
    with pytest.raises(InputError, match="data.image_column: 'label' holds .*, not images; name another"):
        load(folder, image_column="label")


def test_a_name_with_a_dot_is_a_column_too(tmp_path):
    assert values(load(write(tmp_path / "set", **{"meta.img": [png(3)]}))) == [3]


@pytest.mark.parametrize("feature", [List(Image()), datasets.LargeList(Image()), List(Image(decode=False))])
def test_lists_of_images(tmp_path, feature, caplog):
    features = Features({"frames": feature, "label": ClassLabel(names=["a", "b"])})
    rows = [[cell(1), cell(2)], [], None, [cell(3)], [cell(4), cell(5), cell(6)]]
    folder = saved(tmp_path / "set", features, frames=rows, label=[0, 0, 0, 1, 0])
    with caplog.at_level(logging.INFO):
        source = load(folder)
    assert values(source) == [1, 2, 3, 4, 5, 6] and source.labels.tolist() == [0, 0, 1, 0, 0, 0]
    assert source.describe(4) == "row 4 of split 'train', column 'frames', image 1"
    assert "each of the 6 images in the lists of 'frames' counts as one" in caplog.text


def test_lists_of_structs_and_of_bytes(tmp_path):
    frames = [[{"img": cell(1), "t": 0}, {"img": cell(2), "t": 1}], [{"img": cell(3), "t": 0}]]
    source = load(write(tmp_path / "structs", frames=frames))
    assert values(source) == [1, 2, 3] and source.describe(2) == "row 1 of split 'train', column 'frames.img', image 0"
    assert values(load(write(tmp_path / "bytes", frames=[[png(1)], [png(2), png(3)]]))) == [1, 2, 3]


@pytest.mark.parametrize("declared", [True, False])
def test_several_columns_of_images_are_refused(tmp_path, declared):
    columns = {"image": [cell(1)], "mask": [cell(2)]}
    if declared:
        folder = saved(tmp_path / "set", Features({"image": Image(), "mask": Image(decode=False)}), **columns)
    else:
        folder = write(tmp_path / "set", **columns)
    with pytest.raises(InputError, match="several columns may hold the images: image, mask; name the one to read"):
        load(folder)
    assert values(load(folder, image_column="mask")) == [2]


def test_bytes_that_are_no_images_are_told_apart(tmp_path):
    assert values(load(write(tmp_path / "one", code=[b"\x00\x01"], photo=[png(3)]))) == [3]
    with pytest.raises(InputError, match="several columns may hold the images: left, right"):
        load(write(tmp_path / "two", left=[png(1)], right=[png(2)]))


def test_empty_and_damaged_cells_are_unreadable_images(tmp_path):
    source = load(write(tmp_path / "set", img=[png(1), None, b"nonsense"]))
    assert len(source) == 3
    for i, reason in ((1, "the cell is empty"), (2, "no kind of image")):
        with pytest.raises(ValueError, match=reason):
            source.read(i)


# Paths


def test_columns_of_paths(tmp_path):
    folder = save(tmp_path / "set", "a/0.png", "a/1.png", "b/2.png")
    paths = ["b/2.png", None, "gone.png", f"{folder}/a/0.png"]
    source = load(write(folder, where=paths, label=["x", "y", "x", "y"]))
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.describe(2) == f"{folder}/gone.png (row 2 of split 'train', column 'where')"
    assert [to_pixels(source.read(i))[0, 0, 0] for i in (0, 3)] == [2, 0]
    with pytest.raises(ValueError, match="the cell is empty"):
        source.read(1)
    with pytest.raises(FileNotFoundError):
        source.read(2)
    before = source.fingerprint
    picture(9, side=9).save(folder / "b" / "2.png")
    assert load(folder).fingerprint != before


def test_lists_of_paths_and_saved_sets_of_paths(tmp_path):
    folder = tmp_path / "set"
    saved(folder, Features({"files": List(Value("string"))}), files=[["a/0.png", "a/1.png"], ["a/0.png"]])
    save(folder, "a/0.png", "a/1.png")
    source = load(folder)
    assert values(source) == [0, 1, 0] and source.describe(1).endswith(
        "(row 0 of split 'train', column 'files', image 1)"
    )


def test_cells_that_hold_a_path_only(tmp_path):
    folder = save(tmp_path / "set", "a/0.png", "a/1.png")
    cells = [{"bytes": None, "path": "a/1.png"}, {"bytes": None, "path": f"{folder}/a/0.png"}]
    assert values(load(write(folder, image=cells))) == [1, 0]
    assert values(load(write(folder, image=[*cells, cell(7)]))) == [1, 0, 7]


@pytest.mark.parametrize("path", ["../out.png", "/etc/hostname.png", "https://host/a.png"])
def test_paths_that_lead_elsewhere_are_refused(tmp_path, path):
    picture(1).save(tmp_path / "out.png")
    for column in ([path], [{"bytes": None, "path": path}]):
        with pytest.raises(InputError, match=rf"row 0 of split 'train', column 'image': {path} is (a URL|outside)"):
            load(write(tmp_path / "set", image=column))
    source = load(write(tmp_path / "set", image=[{"bytes": None, "path": path}, cell(1)]))
    with pytest.raises(ValueError, match="is (a URL|outside)"):
        source.read(0)


def test_paths_of_a_set_of_the_hub_are_refused():
    table = datasets.Dataset.from_dict({"image": ["a.png"]})
    with pytest.raises(InputError, match="'image' holds paths, of files that org/name on the Hub does not bring"):
        open_table(table, DataArguments(dataset="org/name"), "train")


# Keys


FEATURES = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})


def exchanged(numbers: list[int]) -> list[int]:
    return [*numbers[:5], numbers[6], numbers[5], *numbers[7:]]


def test_saved_sets_have_the_key_of_their_content(tmp_path):
    numbers = [k % 2 for k in range(400)]
    keys, sizes = [], []
    for order, label in (
        (numbers, numbers),
        (numbers, numbers),
        (exchanged(numbers), numbers),
        (numbers, exchanged(numbers)),
    ):
        folder = saved(tmp_path / "set", FEATURES, image=[cell(k) for k in order], label=label)
        for path in folder.rglob("*"):
            os.utime(path, ns=(0, 0))
        keys.append(load(folder).fingerprint)
        sizes.append([path.stat().st_size for path in sorted(folder.rglob("*.arrow"))])
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").fingerprint == keys[3]


def test_parquet_has_the_key_of_its_content(tmp_path):
    numbers = list(range(40))
    keys = [
        load(write(tmp_path / "set", img=[png(k) for k in order])).fingerprint
        for order in (numbers, exchanged(numbers), numbers)
    ]
    assert keys[0] == keys[2] != keys[1]


def test_views_of_a_table_have_keys_of_their_own():
    table = datasets.Dataset.from_dict({"image": [cell(k) for k in range(200)], "label": [0] * 200}, features=FEATURES)
    arguments = DataArguments(dataset="mine")
    sources = [
        open_table(view, arguments, "train") for view in (table, table.select([1, 0, 2]), table.select(range(3)))
    ]
    assert values(sources[1]) == [1, 0, 2] and values(sources[2]) == [0, 1, 2]
    assert len({source.fingerprint for source in sources}) == 3
    again = datasets.Dataset.from_dict({"image": [cell(0), cell(1), cell(2)], "label": [0] * 3}, features=FEATURES)
    assert open_table(again, arguments, "train").fingerprint == sources[2].fingerprint


def test_a_set_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"image": [cell(1)]}, features=Features({"image": Image()}))
    file = tmp_path / "org___name" / "default" / "0.0.0" / ("a1" * 20) / "name-train.arrow"
    file.parent.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(features=table.features, path=str(file)) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    cached = datasets.Dataset.from_file(str(file))
    cells = []
    monkeypatch.setattr("hf_ssl_or.data.hf_dataset._hash_images", lambda *_: cells.append(1) or "hashed")
    arguments = DataArguments(dataset="org/name")
    first = open_table(cached, arguments, "train").fingerprint
    assert not cells and open_table(cached, arguments, "train").fingerprint == first
    other = file.parent.parent / ("b2" * 20) / file.name
    shutil.copytree(file.parent, other.parent)
    assert open_table(datasets.Dataset.from_file(str(other)), arguments, "train").fingerprint != first


# Streamed columns


def streamed(folder: Path, **more: object) -> list[int]:
    arguments = DataArguments(dataset=str(folder), streaming=True, cache_dir=str(folder.parent / "cache"), **more)
    shards = index_shards([str(folder / "train.parquet")], arguments, "set")
    return [int(np.asarray(shards.open(0).read(i))[0, 0, 0]) for i in range(len(shards))]


def test_streamed_columns(tmp_path):
    assert streamed(write(tmp_path / "nested", meta=[{"img": cell(k), "n": k} for k in (1, 2)])) == [1, 2]
    assert streamed(write(tmp_path / "bytes", meta=[{"n": k, "img": png(k)} for k in (1, 2)])) == [1, 2]
    two = write(tmp_path / "two", image=[cell(1)], mask=[cell(2)])
    assert streamed(two, image_column="mask") == [2]
    with pytest.raises(InputError, match="several columns may hold the images: image, mask"):
        streamed(two)
    with pytest.raises(InputError, match="'frames' of .* holds no bytes of one image per row, which streaming reads"):
        streamed(write(tmp_path / "lists", frames=[[cell(1)]]))
    with pytest.raises(InputError, match="'path' of .* holds no bytes of one image per row"):
        streamed(write(tmp_path / "paths", path=["a.png"]), image_column="path")


def test_splits_by_other_words(tmp_path):
    table = datasets.Dataset.from_dict({"image": [cell(1)]}, features=Features({"image": Image()}))
    datasets.DatasetDict({"train": table, "val": table}).save_to_disk(tmp_path / "set")
    arguments = DataArguments(dataset=str(tmp_path / "set"))
    assert len(load_source(arguments, "validation")) == len(load_source(arguments, "dev")) == 1
