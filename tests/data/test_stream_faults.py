"""What goes wrong on the way to a shard: passing failures are outlasted, final ones end in one line."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_ssl_or.data import remote, shards
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.stream import StreamingImageSet
from hf_ssl_or.errors import InputError
from tests.data.range_server import RangeServer
from tests.data.stream_shards import SIDE, rows_of, write_tables, write_tars


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(shards, "_TAR_BLOCK", 20_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    write_tables(tmp_path / "served", [40, 40, 40], 20)
    write_tars(tmp_path / "served", [40])
    with RangeServer(tmp_path / "served") as running:
        yield running


def open_set(dataset: str | Path, folder: Path, **more: object) -> StreamingImageSet:
    settings = {"image_size": SIDE, "cache_size": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3}  # nothing is measured
    settings |= {"num_workers": 2, "cache_dir": str(folder / "cache"), **more}
    images = load_images(DataArguments(dataset=str(dataset), streaming=True, **settings), "train")
    assert isinstance(images, StreamingImageSet)
    return images


def tables(server: RangeServer, folder: Path, **more: object) -> StreamingImageSet:
    return open_set(f"{server.url}/train-{{00000..00002}}.parquet", folder, **more)


def read_all(images: StreamingImageSet) -> list[int]:
    return [row for batch in images.square_batches(np.arange(len(images)).reshape(-1, 8)) for row in rows_of(batch)]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("what", ["cut", 503, 429, 500])
def test_a_failure_that_passes_is_outlasted(server: RangeServer, tmp_path: Path, what: int | str, caplog):
    images = tables(server, tmp_path)
    server.fail("train", what, times=9)
    with caplog.at_level(logging.WARNING):
        assert read_all(images) == list(range(120))
    assert "trying again in" in caplog.text and not server.faults[0][2]


def test_a_server_that_fails_for_long_is_one_line(server: RangeServer, tmp_path: Path):
    images = tables(server, tmp_path)
    server.fail("00001", 503)
    with pytest.raises(InputError, match=r"train-00001.parquet cannot be read after 6 attempts \(.*503") as error:
        read_all(images)
    assert "train with --resume" in one_line(error)


def test_a_server_that_is_gone_is_one_line(server: RangeServer, tmp_path: Path):
    images = tables(server, tmp_path)
    server.__exit__()
    with pytest.raises(InputError, match=r"cannot be read after 6 attempts \(ConnectionRefusedError") as error:
        read_all(images)
    one_line(error)


def test_a_missing_shard_is_one_line_at_once(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 1000.0)
    images = tables(server, tmp_path)
    with pytest.raises(InputError, match=r"train-00003.parquet is not there$"):
        open_set(f"{server.url}/train-{{00000..00003}}.parquet", tmp_path)
    (server.folder / "train-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"train-00001.parquet is not there$"):
        read_all(images)


@pytest.mark.parametrize(("status", "said"), [(403, "answered 403; run hf auth login"), (410, "answered 410")])
def test_a_refusal_is_one_line_at_once(server: RangeServer, tmp_path: Path, status: int, said: str, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 1000.0)
    server.fail("00002", status)
    with pytest.raises(InputError, match=f"train-00002.parquet cannot be read: the server {said}"):
        tables(server, tmp_path)


def test_a_server_without_ranges_is_one_line(server: RangeServer, tmp_path: Path):
    server.ranges = False
    with pytest.raises(InputError, match="does not serve ranges of bytes; copy the files"):
        read_all(tables(server, tmp_path))


@pytest.mark.parametrize("how", ["size", "content"])
@pytest.mark.parametrize("remotely", [True, False])
def test_a_shard_that_changes_is_one_line(server: RangeServer, tmp_path: Path, how: str, remotely: bool):
    images = tables(server, tmp_path) if remotely else open_set(server.folder / "train-*.parquet", tmp_path)
    path = server.folder / "train-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content + b"more" if how == "size" else content[:300] + b"x" + content[301:])
    with pytest.raises(InputError, match=r"train-00001.parquet has changed since it was indexed") as error:
        read_all(images)
    assert ("bytes, has" if how == "size" else "its content is not the same") in one_line(error)
    path.write_bytes(content)
    assert read_all(tables(server, tmp_path)) == list(range(120)), "a new run looks anew"


def damage(path: Path, row: int) -> None:
    """Overwrites the beginning of a row's picture."""
    content = bytearray(path.read_bytes())
    start = -1
    for _ in range(row + 1):
        start = content.index(b"\x89PNG", start + 1)
    content[start : start + 8] = b"nonsense"
    path.write_bytes(content)


def test_a_damaged_row_is_replaced_named_and_counted(server: RangeServer, tmp_path: Path, caplog):
    damage(server.folder / "train-00001.parquet", 7)
    damage(server.folder / "train-00001.parquet", 18)  # now the 19th of those that are left: row 19, the group's last
    images = tables(server, tmp_path, max_corrupt=0.02)
    with caplog.at_level(logging.WARNING):
        rows = read_all(images)
    wanted = list(range(120))
    wanted[47], wanted[59] = 48, 40
    assert rows == wanted
    assert caplog.text.count("row 7 of row group 0 of ") == 1 and "train-00001.parquet" in caplog.text
    damage(server.folder / "train-00002.parquet", 0)
    images = tables(server, tmp_path, max_corrupt=0.02)
    with pytest.raises(
        InputError, match=r"3 or more of 120 .*max_corrupt=0.02 allows 2; the first is row 7 of row"
    ) as e:
        read_all(images)
    one_line(e)


def damage_group(path: Path, number: int) -> None:
    """Overwrites the header of a column's page."""
    chunk = pq.ParquetFile(path).metadata.row_group(number).column(1)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)


def test_a_damaged_row_group_is_replaced_by_the_next_one(server: RangeServer, tmp_path: Path, caplog):
    damage_group(server.folder / "train-00001.parquet", 1)
    images = tables(server, tmp_path, max_corrupt=0.2)
    with caplog.at_level(logging.WARNING):
        rows = read_all(images)
    assert rows == [*range(60), *range(80, 100), *range(80, 120)]
    assert caplog.text.count("takes the place of row group 1 of ") == 1
    images = tables(server, tmp_path, max_corrupt=0.1)
    with pytest.raises(InputError, match=r"of 120 images cannot be read, .* allows 12; the first is row group 1 of "):
        read_all(images)


@pytest.mark.parametrize("kind", ["parquet", "cut tar", "damaged tar"])
def test_a_damaged_shard_is_left_out_named_and_counted(server: RangeServer, tmp_path: Path, kind: str, caplog):
    write_tars(server.folder, [20, 20, 20])
    path = server.folder / ("train-00001.parquet" if kind == "parquet" else "train-001.tar")
    content = bytearray(path.read_bytes())
    if kind == "parquet":
        content[-8:] = b"nonsense"
    elif kind == "cut tar":
        del content[-len(content) // 2 :]
    else:
        with tarfile.open(path) as archive:
            start = archive.getmembers()[30].offset
        content[start : start + 512] = b"\xff" * 512
    path.write_bytes(content)
    pattern = "train-{00000..00002}.parquet" if kind == "parquet" else "train-{000..002}.tar"
    with pytest.raises(InputError, match=rf"1 of 3 shards cannot be read, .* allows 0; the first is .*{path.name}: "):
        open_set(f"{server.url}/{pattern}", tmp_path)
    with caplog.at_level(logging.WARNING):
        images = open_set(f"{server.url}/{pattern}", tmp_path, max_corrupt=0.34)
    left_out = range(40, 80) if kind == "parquet" else range(20, 40)
    assert f"left out 1 unreadable shards: {server.url}/{path.name}" in caplog.text
    assert read_all(images) == [r for r in range(120 if kind == "parquet" else 60) if r not in left_out]


def test_a_cache_that_cannot_be_written_is_one_line(server: RangeServer, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="data.cache_dir: cannot write to .*; name another"):
        tables(server, tmp_path)
