"""Which image of a tar file is whose, read at once and while training."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.shards import index_shards
from hf_ssl_or.data.webdataset import sample_and_field
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import to_pixels
from tests.data.image_writing import load, png, values, write_shard


def streamed(path: Path, **more: object) -> list[int]:
    arguments = DataArguments(dataset=str(path), streaming=True, cache_dir=str(path.parent / "cache"), **more)
    shards = index_shards([str(path)], arguments, "set")
    blocks = [(shards.open(k), int(rows)) for k, rows in enumerate(shards.rows_K)]
    return [int(to_pixels(block.read(i))[0, 0, 0]) for block, rows in blocks for i in range(rows)]


def array(value: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.full((8, 8, 3), value, np.uint8))
    return file.getvalue()


@pytest.mark.parametrize(
    "form",
    [
        "img{:02d}",
        "2024.05.{:02d}-plate",
        "d/2024.05.{:02d}-plate",
        "v1.2.img{:02d}",
        "a.b.c{:02d}",
        "x.{}",
        "{}.5.x.y",
    ],
)
def test_names_with_dots(tmp_path, form):
    members = {}
    for i in range(12):
        members |= {f"{form.format(i)}.png": png(i), f"{form.format(i)}.cls": str(i % 3).encode()}
    write_shard(tmp_path / "a.tar", members)
    source = load(tmp_path / "a.tar")
    assert values(source) == streamed(tmp_path / "a.tar") == list(range(12))
    assert source.labels.tolist() == [i % 3 for i in range(12)]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.jpg", "a.seg.png"], 0),
        (["a.seg.png", "a.png"], 0),
        (["a.png", "a.left.png", "a.right.png"], 0),
        (["a.png", "a.seg-mask.png"], 0),
        (["a.depth.npy", "a.rgb.png"], 1),
        (["a.npy"], 0),
        (["a.seg.png"], 0),
    ],
)
def test_one_image_of_a_sample(tmp_path, names, chosen):
    members = {name: array(k) if name.endswith(".npy") else png(k) for k, name in enumerate(names)}
    write_shard(tmp_path / "a.tar", {**members, "a.cls": b"0", "b.png": png(9), "b.cls": b"1"})
    source = load(tmp_path / "a.tar")
    assert values(source) == streamed(tmp_path / "a.tar") == [chosen, 9]
    assert source.labels.tolist() == [0, 1]


@pytest.mark.parametrize("names", [("img.cat.png", "img.dog.png"), ("a.PNG", "a.png"), ("v1.x00.png", "v1.x01.png")])
def test_names_that_collide_are_refused(tmp_path, names):
    write_shard(tmp_path / "a.tar", {"0.png": png(0), names[0]: png(1), names[1]: png(2)})
    for read in (load, streamed):
        with pytest.raises(InputError, match=rf"{names[0]} and {names[1]} in .*a.tar count as one sample") as error:
            read(tmp_path / "a.tar")
        assert "\n" not in str(error.value) and "data.image_column=" in str(error.value)


@pytest.mark.parametrize("field", ["right", "right.png", "RIGHT.png"])
def test_a_field_can_be_named(tmp_path, field):
    members = {"a.left.png": png(0), "a.right.png": png(1), "a.cls": b"3", "b.left.png": png(2), "c.right.png": png(3)}
    write_shard(tmp_path / "a.tar", {**members, "c.cls": b"5"})
    source = load(tmp_path / "a.tar", image_column=field)
    assert values(source) == streamed(tmp_path / "a.tar", image_column=field) == [1, 3]
    assert source.class_names == ["3", "5"]
    with pytest.raises(InputError, match="unknown data.image_column 'rigth.png': did you mean 'right.png'"):
        load(tmp_path / "a.tar", image_column="rigth.png")


def test_images_of_a_sample_that_are_apart_are_refused_while_streaming(tmp_path):
    write_shard(tmp_path / "a.tar", {"a.jpg": png(0), "b.jpg": png(1), "a.seg.png": png(2)})
    assert values(load(tmp_path / "a.tar")) == [0, 1]
    with pytest.raises(InputError, match=r"in .*a.tar, images of the sample 'a' are apart"):
        streamed(tmp_path / "a.tar")


def test_other_files_of_a_shard_are_counted(tmp_path, caplog):
    write_shard(tmp_path / "a.tar", {"a.png": png(0), "a.json": b"{}", "b.mov": b"?", "c.mov": b"?"})
    load(tmp_path / "a.tar")
    assert "left out 2 files: .mov (2)" in caplog.text


def test_samples_and_fields():
    names = ["a.jpg", "d.e/a.seg.png", "2024.05-x.png", "a.b.c.PNG", "a", "x.cls"]
    assert [sample_and_field(name) for name in names] == [
        ("a", "jpg"),
        ("d.e/a", "seg.png"),
        ("2024.05-x", "png"),
        ("a.b.c", "png"),
        ("a", ""),
        ("x", "cls"),
    ]
