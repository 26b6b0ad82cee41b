from __future__ import annotations

import errno
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl_or.data import cache as cache_module
from hf_ssl_or.data import decode as decode_module
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.cache import load_images
from hf_ssl_or.data.images import StreamedImageSet
from hf_ssl_or.errors import InputError

N, SIDE = 150, 12


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of PNGs in three classes."""
    rng = np.random.default_rng(0)
    for i in range(N):
        path = tmp_path / "pictures" / "abc"[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def arguments(folder: Path, **more: object) -> DataArguments:
    settings = {"cache_dir": str(folder.parent / "cache"), "image_size": SIDE, "num_workers": 2, "cache": "disk"}
    return DataArguments(dataset=str(folder), **{**settings, **more})


def expected(folder: Path) -> torch.Tensor:
    arrays = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(arrays))


def break_images(folder: Path, count: int) -> list[Path]:
    paths = sorted(folder.rglob("*.png"))[5 : 5 + count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return paths


@pytest.mark.parametrize("cache", ["disk", "auto", "none"])
def test_images_labels_and_statistics(pictures, cache):
    images, wanted = load_images(arguments(pictures, cache=cache), "train"), expected(pictures)
    assert torch.equal(images.images, wanted) and images.images.dtype == torch.uint8
    assert images.labels.tolist() == [0] * 50 + [1] * 50 + [2] * 50 and images.class_names == ["a", "b", "c"]
    pixels = wanted.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(torch.tensor(images.mean).double(), pixels.mean(1), atol=5e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(images.std).double(), pixels.std(1, correction=0), atol=5e-5, rtol=0)
    assert (pictures.parent / "cache").exists() == (cache == "disk")


def test_a_second_run_decodes_nothing(pictures, monkeypatch):
    first = load_images(arguments(pictures), "train")
    monkeypatch.setattr(decode_module, "decode", None)
    second = load_images(arguments(pictures), "train")
    assert torch.equal(first.images, second.images)
    assert (first.mean, first.std, first.fingerprint) == (second.mean, second.std, second.fingerprint)


def test_writing_to_the_images_spares_the_file(pictures):
    load_images(arguments(pictures), "train").images.zero_()
    assert torch.equal(load_images(arguments(pictures), "train").images, expected(pictures))


@pytest.mark.parametrize("damage", ["short", "long", "json", "keys"])
def test_a_damaged_file_is_made_again(pictures, damage, caplog):
    load_images(arguments(pictures), "train")
    data, side_file = (
        next((pictures.parent / "cache").glob("*.uint8")),
        next((pictures.parent / "cache").glob("*.json")),
    )
    content = data.read_bytes()
    if damage == "json":
        side_file.write_text('{"count": 15')
    elif damage == "keys":
        side_file.write_text(json.dumps({"length": 3}))
    else:
        data.write_bytes(content[:-1] if damage == "short" else content + b"0")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load_images(arguments(pictures), "train").images, expected(pictures))
    assert "is damaged and is made again" in caplog.text


def test_two_writers_at_once_leave_a_sound_file(pictures):
    results, threads = [], []
    for _ in range(3):
        threads.append(threading.Thread(target=lambda: results.append(load_images(arguments(pictures), "train"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(torch.equal(one.images, expected(pictures)) for one in results)
    assert {path.suffix for path in (pictures.parent / "cache").iterdir()} == {".uint8", ".json"}


def test_a_full_disk_is_one_line_and_leaves_nothing(pictures, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(InputError, match=r"data.cache_dir: cannot write .* to .*cache \(No space left on device\)"):
        load_images(arguments(pictures), "train")
    assert list((pictures.parent / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(pictures):
    (pictures.parent / "cache").write_text("a file")
    with pytest.raises(InputError, match="data.cache_dir: cannot write"):
        load_images(arguments(pictures), "train")


def test_unreadable_images_are_left_out_and_named(pictures, caplog):
    broken = break_images(pictures, 2)
    for _ in range(2):  # decoded, then from the file
        with caplog.at_level(logging.WARNING):
            images = load_images(arguments(pictures, max_corrupt=0.02), "train")
        assert len(images) == N - 2 == len(images.labels)
        assert images.labels.tolist() == [0] * 48 + [1] * 50 + [2] * 50
    assert caplog.text.count(str(broken[0])) == 1
    assert torch.equal(images.images[:5], expected_without(pictures, broken)[:5])


def expected_without(folder: Path, broken: list[Path]) -> torch.Tensor:
    paths = [path for path in sorted(folder.rglob("*.png")) if path not in broken]
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths]))


def test_too_many_unreadable_images_are_an_error(pictures):
    broken = break_images(pictures, 4)
    with pytest.raises(InputError, match=rf"4 or more of 150 .*allows 3; the first is {broken[0]}"):
        load_images(arguments(pictures, max_corrupt=0.02), "train")


def test_fraction_takes_a_share_of_each_class_of_the_training_split(pictures):
    images = load_images(arguments(pictures, fraction=0.2), "train")
    assert torch.bincount(images.labels).tolist() == [10, 10, 10]
    other = load_images(arguments(pictures, fraction=0.2, fraction_seed=1), "train")
    assert images.fingerprint != other.fingerprint and not torch.equal(images.images, other.images)


def test_given_statistics_are_taken_over(pictures):
    given = load_images(arguments(pictures, mean=[0.1, 0.2, 0.3], std=[1, 1, 0.5]), "train")
    assert given.mean == (0.1, 0.2, 0.3) and given.std == (1, 1, 0.5)
    assert load_images(arguments(pictures), "train", statistics=(given.mean, given.std)).std == (1, 1, 0.5)


def test_large_originals_are_stored_with_a_margin(pictures):
    Image.new("RGB", (300, 200)).save(pictures / "a" / "000.png")
    assert load_images(arguments(pictures, image_size=64), "train").source_size == 64
    for path in pictures.rglob("*.png"):
        Image.new("RGB", (130, 100)).save(path)
    assert load_images(arguments(pictures, image_size=64), "train").source_size == 72
    assert load_images(arguments(pictures, image_size=64, cache_size=90), "train").source_size == 90


def test_subset_and_batch(pictures):
    images = load_images(arguments(pictures), "train")
    part = images.subset(np.array([7, 3, 140]))
    assert len(part) == 3 and torch.equal(part.images, images.images[[7, 3, 140]])
    assert part.labels.tolist() == [0, 0, 2] and part.mean == images.mean
    assert torch.equal(part.batch(torch.tensor([2, 0])), images.images[[140, 7]])
    streamed = list(images.stream(iter([np.array([1, 2]), np.array([0])])))
    assert [len(batch) for batch in streamed] == [2, 1] and torch.equal(streamed[1][0], images.images[0])


@pytest.fixture
def stream(pictures, monkeypatch) -> StreamedImageSet:
    monkeypatch.setattr(cache_module, "_MEMORY_BYTES", 0)
    return load_images(arguments(pictures, cache="none", max_corrupt=0.02), "train")


def test_streamed_images_are_the_same(stream, pictures):
    wanted, indices = expected(pictures), [np.array([3, 141, 9]), np.array([0, 1, 2])]
    assert isinstance(stream, StreamedImageSet) and len(stream) == N and stream.nbytes == N * 3 * SIDE**2
    for index, batch in zip(indices, stream.stream(iter(indices)), strict=True):
        assert torch.equal(batch, wanted[index])
    assert torch.equal(stream.subset(torch.tensor([8, 4])).batch(np.array([1, 0])), wanted[[4, 8]])
    whole = load_images(arguments(pictures), "train")
    assert (stream.mean, stream.std) == (whole.mean, whole.std)


def test_streamed_unreadable_images_are_replaced_up_to_a_share(stream, pictures, caplog):
    wanted = expected(pictures)
    broken = break_images(pictures, 3)
    with caplog.at_level(logging.WARNING):
        batch = next(stream.stream(iter([np.array([4, 5, 7])])))
    assert torch.equal(batch, wanted[[4, 8, 8]])
    assert caplog.text.count(str(broken[0])) == 1
    break_images(pictures, 4)
    with pytest.raises(InputError, match="4 or more of 150"):
        stream.batch(np.array([8]))


def test_an_interrupted_write_leaves_nothing(pictures, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_images(arguments(pictures), "train")
    assert list((pictures.parent / "cache").iterdir()) == []


def test_real_images_keep_their_bytes(real_data, tmp_path):
    images = load_images(arguments(real_data / "cifar10", image_size=32, cache_dir=str(tmp_path)), "test")
    assert images.images.shape == (10_000, 3, 32, 32)
    assert images.mean == pytest.approx((0.4942, 0.4851, 0.4504), abs=5e-4)  # the published values of the test split
