"""Streamed sets: the same images in the same order whatever reads them from wherever, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_ssl_or.data import shards as shards_module
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.stream import StreamingImageSet
from hf_ssl_or.errors import InputError
from hf_ssl_or.structures import ViewSpec
from tests.data.range_server import RangeServer
from tests.data.stream_shards import SIDE, picture, rows_of, write_tables, write_tars

SIZES, N = [100, 37, 90], 227
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    folder = tmp_path_factory.mktemp("served")
    write_tables(folder / "tables", SIZES, 20)
    write_tars(folder / "tars", SIZES)
    with RangeServer(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_TAR_BLOCK", 30_000)  # so that a small tar file has several


def stream_set(dataset: str | Path, folder: Path, **more: object) -> StreamingImageSet:
    settings = {"image_size": SIDE, "stream_window_mib": 1, "stream_lanes": 4, "num_workers": 2, **more}
    images = load_images(
        DataArguments(dataset=str(dataset), streaming=True, cache_dir=str(folder), **settings), "train"
    )
    assert isinstance(images, StreamingImageSet)
    return images


def loader(images: StreamingImageSet, rank: int = 0, world_size: int = 1) -> ViewLoader:
    plain = ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grayscale=0.0)
    return ViewLoader(images, [plain, ViewSpec()], batch_size=16, seed=3, rank=rank, world_size=world_size)


def places(server: RangeServer) -> dict[str, str]:
    return {
        "folder": str(server.folder / "tables"),
        "files": str(server.folder / "tables" / "{split}-*.parquet"),
        "tars": str(server.folder / "tars" / "train-{000..002}.tar"),
        "http files": f"{server.url}/tables/train-{{00000..00002}}.parquet",
        "http tars": f"{server.url}/tars/{{split}}-{{000..002}}.tar",
    }


@pytest.mark.parametrize("place", ["folder", "files", "tars", "http files", "http tars"])
def test_every_image_comes_once_an_epoch_and_is_what_its_index_says(server: RangeServer, tmp_path: Path, place: str):
    images = stream_set(places(server)[place], tmp_path)
    assert len(images) == N and images.labels is None
    run = loader(images)
    steps = [run.indices(step) for step in range(2 * run.steps_per_epoch)]
    found = [rows_of(batch) for batch in images.square_batches(steps)]
    assert found == [step.tolist() for step in steps]
    for epoch in (found[: len(found) // 2], found[len(found) // 2 :]):
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows)) == N // 16 * 16


def test_names_tell_no_address(server: RangeServer, tmp_path: Path):
    assert stream_set(places(server)["http files"], tmp_path).name == "train-{00000..00002}.parquet"
    assert stream_set(places(server)["folder"], tmp_path).name == "tables"


@pytest.mark.parametrize("place", ["folder", "http tars"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_processes_batches_together_are_the_single_process_batch(server, tmp_path, place, world_size):
    """Bit by bit, across the border of an epoch, and from a step in the middle of one."""
    dataset = places(server)[place]
    whole = loader(stream_set(dataset, tmp_path)).batches(9, 20)
    parts = [loader(stream_set(dataset, tmp_path), r, world_size).batches(9, 20) for r in range(world_size)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share.index_B for share in shares]), batch.index_B)
        assert torch.equal(torch.cat([share.views_VBCHW for share in shares], dim=1), batch.views_VBCHW)


def test_any_step_can_be_the_first(server: RangeServer, tmp_path: Path):
    images = stream_set(places(server)["http files"], tmp_path)
    straight = list(loader(images).batches(0, 20))
    for start in (1, 13, 14, 19):
        for first, second in zip(straight[start:], loader(images).batches(start, 20), strict=True):
            assert torch.equal(first.index_B, second.index_B) and torch.equal(first.views_VBCHW, second.views_VBCHW)


def test_a_second_run_reads_no_index_and_measures_nothing(server: RangeServer, tmp_path: Path):
    first = stream_set(places(server)["http tars"], tmp_path)
    server.log.clear()
    second = stream_set(places(server)["http tars"], tmp_path)
    assert (first.mean, first.std, first.fingerprint) == (second.mean, second.std, second.fingerprint)
    assert {method for method, *_ in server.log} == {"HEAD"} and len(server.log) == len(SIZES)


def test_statistics_are_those_of_the_images(server: RangeServer, tmp_path: Path):
    images = stream_set(places(server)["folder"], tmp_path)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(picture(row)))) for row in range(N)]) / 255
    assert images.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=5e-5)
    assert images.std == pytest.approx(pixels.std((0, 1, 2)), abs=5e-5)
    given = stream_set(places(server)["folder"], tmp_path, mean=[0.1, 0.2, 0.3], std=[1, 1, 0.5])
    assert given.mean == (0.1, 0.2, 0.3)


def test_some_of_the_images(server: RangeServer, tmp_path: Path):
    images = stream_set(places(server)["tars"], tmp_path)
    chosen = np.array([200, 3, 3, 150, 0, 226])
    assert rows_of(*images.square_batches([chosen])) == chosen.tolist()
    part = images.subset(chosen)
    assert rows_of(part.squares.dense()) == chosen.tolist() and part.mean == images.mean and len(part) == 6
    sample = rows_of(images.sample(40, "a key").squares.dense())
    assert len(set(sample)) == 40 and sample == sorted(sample)
    assert (
        sample
        == rows_of(images.sample(40, "a key").squares.dense())
        != rows_of(images.sample(40, "another").squares.dense())
    )
    assert rows_of(images.sample(10_000, "all").squares.dense()) == list(range(N))


def test_plain_bytes_and_a_column_of_another_name(tmp_path: Path):
    write_tables(tmp_path / "set", [40], 10, struct=False, column="photo")
    assert rows_of(*stream_set(tmp_path / "set", tmp_path).square_batches([np.arange(40)])) == list(range(40))
    with pytest.raises(InputError, match="data.image_column 'foto': did you mean 'photo'"):
        stream_set(tmp_path / "set", tmp_path, image_column="foto")


# ---------------------------------------------------------------------------------------------------------------------
# Memory and traffic, on a set of many windows


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RangeServer, int]]:
    """2,000 images of noise in 20 MiB, in row groups of 0.2 MiB."""
    folder, noise = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for number in range(4):
        cells = []
        for _ in range(500):
            file = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file, "PNG", compress_level=0)
            cells.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(pa.table({"image": cells}), folder / f"{number}.parquet", row_group_size=20, compression="none")
    with RangeServer(folder) as running:
        yield running, sum(path.stat().st_size for path in folder.iterdir())


SETTINGS = {"image_size": 16, "cache_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.mark.parametrize("window_mib", [1, 3])
def test_at_most_two_windows_are_held(large: tuple[RangeServer, int], tmp_path: Path, window_mib: int):
    server, total = large
    assert total > 20 * MIB
    images = stream_set(f"{server.url}/{{0..3}}.parquet", tmp_path, stream_window_mib=window_mib, **SETTINGS)
    before, most = pa.total_allocated_bytes(), 0
    for batch in loader(images).batches(0, 125):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(batch.index_B) == 16
    assert window_mib * MIB < images.peak_bytes <= 2 * window_mib * MIB
    assert window_mib * MIB / 2 < most < (2 * window_mib + 2) * MIB, (
        "what arrow says it holds; 8 blocks are on the way"
    )


def test_a_block_is_read_once_an_epoch_and_a_process_reads_its_own(large: tuple[RangeServer, int], tmp_path: Path):
    server, total = large
    images = stream_set(f"{server.url}/{{0..3}}.parquet", tmp_path, **SETTINGS)

    def traffic(run: ViewLoader, start: int, stop: int) -> int:
        server.log.clear()
        for _ in run.batches(start, stop):
            pass
        return server.bytes_read()

    footers = 100 * 65_536  # with every block the end of its file is read
    steps = 125
    assert total <= traffic(loader(images), 0, steps) <= 1.04 * total + footers, (
        "blocks between two lanes are read twice"
    )
    for rank in range(4):
        assert traffic(loader(images, rank, 4), 0, steps) <= 0.3 * total + footers / 4
    assert traffic(loader(images), 110, 112) <= 3 * MIB + 15 * 65_536, "nothing of what was before is read"


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be streamed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "shapes"}, "data.streaming: shapes is not made of shards"),
        ({"dataset": "{tmp}/photos"}, r"reads .parquet and uncompressed .tar files, and .*photos has .*a.png"),
        ({"dataset": "{tmp}/nothing-*.tar"}, "nothing-.*has none"),
        ({"dataset": "{tmp}/absent"}, "there is no folder"),
        ({"dataset": "{tmp}/absent-{{0..3}}.tar"}, "absent-0.tar is not there"),
        ({"dataset": "http://h/a-*.parquet"}, r"cannot be looked up; write it as \{000..009\}"),
        ({"dataset": "http://me:secret@h/a.tar"}, "leave the password out"),
        ({"dataset": "http://h/a.tar.gz"}, "http://h/a.tar.gz; leave out data.streaming"),
        (
            {"dataset": "http://h/a.tar?key=secret", "streaming": False},
            "http://h/a.tar is elsewhere; set data.streaming",
        ),
        ({"dataset": "{tmp}", "fraction": 0.5}, "data.fraction: a streamed set is used whole"),
        ({"dataset": "{tmp}", "cache": "disk"}, "data.cache: a streamed set is not stored"),
        ({"dataset": "{tmp}", "stream_lanes": 0}, "data.stream_lanes: at least 1, not 0"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(tmp_path: Path, settings: dict, message: str):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "a.png")
    settings = {"streaming": True, **settings, "dataset": settings["dataset"].format(tmp=tmp_path)}
    with pytest.raises(InputError, match=message) as caught:
        load_images(DataArguments(**settings), "train")
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_the_test_split_is_not_streamed(server: RangeServer, tmp_path: Path):
    arguments = DataArguments(dataset=places(server)["folder"], streaming=True, cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="only 'train' is streamed, not 'test'.*evaluation_data.dataset"):
        load_images(arguments, "test")


def test_a_small_window_is_one_line(large: tuple[RangeServer, int], tmp_path: Path):
    images = stream_set(f"{large[0].url}/{{0..3}}.parquet", tmp_path, stream_lanes=16, **SETTINGS)
    with pytest.raises(InputError, match="1 MiB for 16 lanes do not hold a row group of 0.2 MiB each; set at least 4"):
        loader(images)
