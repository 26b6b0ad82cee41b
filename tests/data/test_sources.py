from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.sources import list_splits, load_source
from hf_ssl_or.data.webdataset import expand_shards
from hf_ssl_or.errors import InputError
from tests.data.image_writing import load, picture, png, save, values, write_shard

# Folders


def test_flat_folder_is_unlabeled_and_sorted(tmp_path):
    source = load(save(tmp_path, "b.png", "a.JPG", "c.webp"))
    assert source.labels is None and len(source) == 3
    assert [Path(source.describe(i)).name for i in range(3)] == ["a.JPG", "b.png", "c.webp"]


def test_class_subfolders_are_labels(tmp_path):
    source = load(save(tmp_path, "dog/1.png", "cat/1.png", "cat/deep/2.png", "dog/notes.txt.png", ".hidden/x.png"))
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("names", [("only/1.png", "only/2.png"), ("a/1.png", "b/1.png", "stray.png")])
def test_one_subfolder_or_stray_images_are_no_labels(tmp_path, names):
    assert load(save(tmp_path, *names)).labels is None


def test_split_subfolders(tmp_path):
    folder = save(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "test/b/2.png")
    assert list_splits(DataArguments(dataset=str(folder))) == ["train", "test"]
    assert len(load(folder)) == 2 and load(folder, "test").labels.tolist() == [0, 1, 1]
    with pytest.raises(InputError, match="no split 'dev'; available: train, test"):
        load(folder, "dev")


def test_a_class_may_be_called_train(tmp_path):
    folder = save(tmp_path, "train/1.png", "bus/1.png", "car/1.png")
    assert load(folder).class_names == ["bus", "car", "train"]


def test_folder_without_splits_has_only_the_training_split(tmp_path):
    folder = save(tmp_path, "1.png")
    assert list_splits(DataArguments(dataset=str(folder))) == ["train"]
    with pytest.raises(InputError, match="no split 'test'; available: train"):
        load(folder, "test")


def test_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(InputError, match="there is no image in"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "no/such/deep/folder"])
def test_missing_folder_is_an_error(name):
    with pytest.raises(InputError, match="there is no folder"):
        load(name)


def test_fingerprint_follows_the_files(tmp_path):
    before = load(save(tmp_path, "1.png", "2.png")).fingerprint
    assert load(tmp_path).fingerprint == before
    picture(99, side=9).save(tmp_path / "2.png")
    assert load(tmp_path).fingerprint != before


# Shards


def test_shards_with_labels(tmp_path):
    for k in range(2):
        members = {
            f"x/{k}0.png": png(10 * k),
            f"x/{k}0.cls": b"1",
            f"x/{k}1.seg.png": png(10 * k + 1),
            f"x/{k}1.cls": b"0",
        }
        write_shard(tmp_path / f"train-00{k}.tar", {**members, f"x/{k}1.json": b"{}"})
    source = load(tmp_path / "train-{000..001}.tar")
    assert values(source) == [0, 1, 10, 11] and source.labels.tolist() == [1, 0, 1, 0]
    assert "x/01.seg.png in" in source.describe(1) and source.describe(1).endswith("train-000.tar")


def test_shards_without_labels_for_all_are_unlabeled(tmp_path):
    write_shard(tmp_path / "a.tar", {"1.png": png(1), "1.cls": b"0", "2.png": png(2)})
    assert load(tmp_path / "a.tar").labels is None


def test_shards_of_splits(tmp_path):
    write_shard(tmp_path / "train-0.tar", {"1.png": png(1)})
    arguments = DataArguments(dataset=str(tmp_path / "{split}-*.tar"))
    assert list_splits(arguments) == ["train"]
    write_shard(tmp_path / "test-0.tar", {"1.png": png(2)})
    assert list_splits(arguments) == ["train", "test"] and values(load_source(arguments, "test")) == [2]


def test_missing_and_broken_shards_are_named(tmp_path):
    write_shard(tmp_path / "a-0.tar", {"1.png": png(1)})
    with pytest.raises(InputError, match=r"1 of 2 shards are missing, the first: .*a-1.tar"):
        load(tmp_path / "a-{0..1}.tar")
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match="cannot read .*b.tar"):
        load(tmp_path / "b.tar")
    with pytest.raises(InputError, match="there is no image in .*c.tar"):
        load(tmp_path / "c.tar")


def test_braces():
    assert [str(p) for p in expand_shards("s/{a,b}-{08..10}.tar", "train")] == [
        f"s/{letter}-{number}.tar" for letter in "ab" for number in ("08", "09", "10")
    ]


# Tables


@pytest.fixture(autouse=True)
def table_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write_parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_foreign_parquet_with_words_as_labels(tmp_path):
    cells = [{"bytes": png(k), "path": None} for k in range(3)]
    write_parquet(tmp_path / "train.parquet", id=[1, 2, 3], picture=cells, label=["b", "a", "b"])
    source = load(tmp_path)
    assert values(source) == [0, 1, 2] and source.labels.tolist() == [1, 0, 1] and source.class_names == ["a", "b"]
    assert source.describe(2) == "row 2 of split 'train', column 'picture'"


def test_parquet_with_plain_bytes(tmp_path):
    write_parquet(tmp_path / "train.parquet", img=[png(4), png(5)], note=["x", "y"])
    source = load(tmp_path)
    assert values(source) == [4, 5] and source.labels is None


def test_saved_dataset_with_named_columns(tmp_path):
    columns = {"left": [picture(1), picture(2)], "right": [picture(3), picture(4)], "kind": [5, 9]}
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("left", datasets.Image()).cast_column("right", datasets.Image())
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    source = load(tmp_path / "saved", image_column="right", label_column="kind")
    assert values(source) == [3, 4] and source.labels.tolist() == [0, 1] and source.class_names == ["5", "9"]
    with pytest.raises(InputError, match="unknown data.image_column 'rigth': did you mean 'right'"):
        load(tmp_path / "saved", image_column="rigth")
    with pytest.raises(InputError, match="unknown data.label_column 'kin'"):
        load(tmp_path / "saved", label_column="kin")
    with pytest.raises(InputError, match="no split 'test'; available: train"):
        load(tmp_path / "saved", "test")


def test_table_without_images_is_an_error(tmp_path):
    write_parquet(tmp_path / "train.parquet", text=["a"])
    with pytest.raises(InputError, match="no column of images among text"):
        load(tmp_path)


def test_fingerprint_follows_the_rows(tmp_path):
    keys = []
    for k, name in ((1, "a"), (2, "b")):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "train.parquet", img=[png(k)])
        keys.append(load(tmp_path / name).fingerprint)
    assert keys[0] != keys[1] and load(tmp_path / "a").fingerprint == keys[0]


def test_unreachable_hub_id_is_one_line():
    with pytest.raises(InputError, match=r"^data.dataset: cannot load 'nobody/nothing': [^\n]+$"):
        load("nobody/nothing")


def test_real_parquet(real_data):
    source = load(real_data / "cifar10", "test")
    assert len(source) == 10_000 and source.class_names[0] == "airplane" and source.read(0).size == (32, 32)
    assert np.bincount(source.labels).tolist() == [1000] * 10


def test_detection_set_is_unlabeled(real_data):
    source = load(real_data / "cellbody_detection")
    assert source.labels is None and len(source) == 280


def test_sources_can_be_sent_to_other_processes(tmp_path):
    folder = save(tmp_path / "folder", "a/1.png", "b/2.png")
    (folder / "list.csv").write_text("path\na/1.png\nb/2.png\n")
    write_shard(tmp_path / "a.tar", {"1.png": png(0), "2.png": png(1)})
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table" / "train.parquet", img=[png(0), png(1)])
    for dataset in (folder, folder / "list.csv", f"{folder}/**/*", tmp_path / "a.tar", tmp_path / "table"):
        source = load(dataset)
        sent = pickle.loads(pickle.dumps(source))
        assert values(sent) == [0, 1] and sent.describe(1) == source.describe(1)
