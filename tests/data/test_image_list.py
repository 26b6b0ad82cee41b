"""Lists of images: CSV, JSON Lines and text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.sources import list_splits
from hf_ssl_or.errors import InputError
from tests.data.image_writing import load, picture, save, values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "set", "a/0.png", "a/1.png", "b/2.png", "b/with space 3.png")


def write(folder: Path, name: str, *lines: object) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return folder / name


def test_csv(folder):
    source = load(
        write(folder, "l.csv", "id,path,label", "7,b/2.png,dog", "8,a/0.png,cat", '9,"b/with space 3.png",dog')
    )
    assert values(source) == [2, 0, 3] and source.class_names == ["cat", "dog"] and source.labels.tolist() == [1, 0, 1]
    assert source.describe(1) == f"{folder}/a/0.png (row 3 of {folder}/l.csv)"


@pytest.mark.parametrize("column", ["path", "image", "file", "file_name", "filename", "Path", "img"])
def test_columns_of_paths(folder, column):
    assert values(load(write(folder, "l.csv", f"x,{column}", "1,a/1.png"))) == [1]
    assert values(load(write(folder, "l.jsonl", {"x": 1, column: "a/1.png"}))) == [1]


def test_named_columns(folder):
    for path in (
        write(folder, "l.csv", "left,right,kind,label", "a/0.png,a/1.png,10,x", "b/2.png,a/0.png,9,x"),
        write(
            folder,
            "l.jsonl",
            {"left": "a/0.png", "right": "a/1.png", "kind": 10, "label": "x"},
            {"left": "b/2.png", "right": "a/0.png", "kind": 9, "label": "x"},
        ),
    ):
        source = load(path, image_column="right", label_column="kind")
        assert values(source) == [1, 0] and source.class_names == ["9", "10"] and source.labels.tolist() == [1, 0]
        with pytest.raises(InputError, match="unknown data.label_column 'kin': did you mean 'kind'"):
            load(path, image_column="right", label_column="kin")
        with pytest.raises(InputError, match="unknown data.image_column 'rigth': did you mean 'right'"):
            load(path, image_column="rigth")
        with pytest.raises(
            InputError, match=r"name the column of the paths; none of left, right, kind, label in .*l\."
        ):
            load(path)


def test_several_columns_of_paths_are_refused(folder):
    with pytest.raises(InputError, match="data.image_column: name the column of the paths; path, image of .*l.csv"):
        load(write(folder, "l.csv", "path,image", "a/0.png,a/1.png"))


def test_other_signs_between_cells_and_a_mark_at_the_beginning(folder):
    (folder / "l.csv").write_bytes("\ufeffpath;label\r\na/0.png;x\r\n\r\na/1.png;y\r\n".encode())
    assert load(folder / "l.csv").class_names == ["x", "y"] and values(load(folder / "l.csv")) == [0, 1]
    assert values(load(write(folder, "l.tsv", "path\tlabel", "a/1.png\t3"))) == [1]


def test_labels_are_numbers_where_all_are_and_none_where_one_is_missing(folder):
    source = load(write(folder, "l.csv", "path,label", "a/0.png,10", "a/1.png,9", "b/2.png,10"))
    assert source.class_names == ["9", "10"] and source.labels.tolist() == [1, 0, 1]
    assert load(write(folder, "l.csv", "path,label", "a/0.png,10", "a/1.png,")).labels is None
    assert load(write(folder, "l.jsonl", {"path": "a/0.png", "label": 1}, {"path": "a/1.png"})).labels is None


@pytest.mark.parametrize(
    ("lines", "numbers", "classes"),
    [
        (["a/0.png", "b/with space 3.png", "", "b/2.png"], [0, 3, 2], None),
        (["a/0.png\tblack cat", "b/with space 3.png\tdog"], [0, 3], ["black cat", "dog"]),
        (["a/0.png 10", "b/with space 3.png  9"], [0, 3], ["9", "10"]),
        (["a/0.png cat", "a/1.png"], [0, 1], None),
    ],
)
def test_text(folder, lines, numbers, classes):
    source = load(write(folder, "l.txt", *lines))
    assert values(source) == numbers and source.class_names == classes


def test_spaces_that_are_part_of_a_path(folder):
    picture(9).save(folder / "a.png 2", "PNG")
    source = load(write(folder, "l.txt", "a.png 2", "some words.png other words"))
    assert values_of_first(source) == 9 and source.labels is None
    assert source.describe(1).startswith(f"{folder}/some words.png other words (row 2 of ")


def values_of_first(source) -> int:
    return source.read(0).convert("RGB").getpixel((0, 0))[0]


def test_missing_files_are_unreadable_images(folder):
    (folder / "dangling.png").symlink_to("nowhere")
    for path in (
        write(folder, "l.csv", "path", "a/0.png", "gone.png", "dangling.png", "a"),
        write(folder, "l.txt", "a/0.png", "gone.png", "dangling.png", "a"),
    ):
        source = load(path)
        assert len(source) == 4 and f"gone.png (row {3 if path.suffix == '.csv' else 2} of {path})" in source.describe(
            1
        )
        for i in (1, 2, 3):
            with pytest.raises(OSError, match="No such file|Is a directory"):
                source.read(i)


def test_pipes_are_refused(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(InputError, match="pipe.png is no file"):
        load(write(folder, "l.csv", "path", "pipe.png"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../out.png", r"row 3: \.\./out.png is outside of .*set; move"),
        ("a/../../out.png", "row 3: .* is outside of"),
        ("/etc/hostname.png", "row 3: /etc/hostname.png is outside of"),
        ("https://host/a.png", "row 3: https://host/a.png is a URL; copy the images here"),
        ("file:///etc/a.png", "row 3: file:///etc/a.png is a URL"),
        ("s3://bucket/a.png", "is a URL"),
        ("../\u2028out.png", r"\.\./\?out.png is outside of"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused(folder, path, message):
    picture(1).save(folder.parent / "out.png")
    for file in (
        write(folder, "l.csv", "path", "a/0.png", path),
        write(folder, "l.jsonl", "", {"path": "a/0.png"}, {"path": path}),
        write(folder, "l.txt", "", "a/0.png", path),
    ):
        with pytest.raises(InputError, match=message) as error:
            load(file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_absolute_paths_inside_are_taken(folder):
    (folder.parent / "link").symlink_to(folder)
    write(folder, "l.csv", "path", f"{folder}/a/1.png", "a/../b/2.png")
    assert values(load(folder / "l.csv")) == values(load(folder.parent / "link" / "l.csv")) == [1, 2]


def test_splits_of_files_and_columns(folder):
    write(folder, "train.csv", "path", "a/0.png")
    write(folder, "test.csv", "path", "b/2.png")
    dataset = f"{folder}/{{split}}.csv"
    assert list_splits(DataArguments(dataset=dataset)) == ["train", "test"]
    assert values(load(dataset, "test")) == [2]
    with pytest.raises(InputError, match="no split 'dev'"):
        load(dataset, "dev")
    for path in (
        write(folder, "l.csv", "path,split", "a/0.png,train", "b/2.png,val", "a/1.png,train"),
        write(
            folder,
            "l.jsonl",
            *({"path": p, "split": s} for p, s in (("a/0.png", "train"), ("b/2.png", "val"), ("a/1.png", "train"))),
        ),
    ):
        assert list_splits(DataArguments(dataset=str(path))) == ["train", "val"]
        assert list_splits(DataArguments(dataset=str(path), test_split="validation")) == ["train", "val", "validation"]
        assert values(load(path)) == [0, 1] and values(load(path, "val")) == values(load(path, "validation")) == [2]
        with pytest.raises(InputError, match="no split 'test'; available: train, val"):
            load(path, "test")
    with pytest.raises(InputError, match="row 3: no split"):
        load(write(folder, "l.csv", "path,split", "a/0.png,train", "b/2.png,"))


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("l.csv", ["path,label", "a/0.png,1", "a/1.png"], "row 3: 1 cells, where the header has 2"),
        ("l.csv", ["path,label", ",1"], "row 2: no path in 'path'"),
        ("l.csv", ["path,path", "a/0.png,1"], "row 1: two columns of one name"),
        ("l.csv", ["path", 'a"', '"a/0.png"x'], "row 3: "),
        ("l.csv", ["a/0.png", "a/1.png"], r"data.image_column: .* none of a/0.png in .*l.csv"),
        ("l.jsonl", [{"path": "a/0.png"}, '{"path": '], "row 2: not JSON"),
        ("l.jsonl", [{"path": "a/0.png"}, "[" * 100_000], "row 2: not JSON"),
        ("l.jsonl", [["a/0.png"]], "row 1: list instead of an object"),
        ("l.jsonl", [{"path": "a/0.png"}, {"pth": "x"}], "row 2: no path in 'path'"),
        ("l.jsonl", [{"path": 3}], "row 1: no path in 'path'"),
        ("l.jsonl", [{"path": "a\0.png"}], "row 1: no path in 'path'"),
        ("l.jsonl", [{"path": "a/0.png", "label": [1]}], "row 1: 'label' holds list, not one label"),
        ("l.csv", [], "there is no image in"),
        ("l.txt", [], "there is no image in"),
    ],
)
def test_wrong_rows_are_one_line(folder, name, lines, message):
    with pytest.raises(InputError, match=message) as error:
        load(write(folder, name, *lines))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_missing_and_foreign_lists_are_one_line(folder):
    with pytest.raises(InputError, match="there is no list .*none.csv"):
        load(folder / "none.csv")
    (folder / "l.csv").write_bytes(b"path\n\xff\xfe.png\n")
    with pytest.raises(InputError, match=r"cannot read the list .*l.csv \(not UTF-8\)"):
        load(folder / "l.csv")
    with pytest.raises(InputError, match="no split 'train'; available: none"):
        load(f"{folder}/none/{{split}}.csv")


def test_the_key_follows_the_list_and_the_files(folder):
    path = write(folder, "l.csv", "path,label", "a/0.png,1", "a/1.png,2")
    keys = [load(path).fingerprint, load(path).fingerprint]
    write(folder, "l.csv", "path,label", "a/0.png,2", "a/1.png,1")
    keys.append(load(path).fingerprint)
    picture(9, side=9).save(folder / "a" / "1.png")
    keys.append(load(path).fingerprint)
    assert keys[0] == keys[1] and len(set(keys)) == 3
