from __future__ import annotations

import errno
import io
import json
import logging
import shutil
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from hf_ssl_or.data import decode as decode_module
from hf_ssl_or.data import loading as loading_module
from hf_ssl_or.data import pixel_store as pixel_store_module
from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.pixel_kind import default_bound
from hf_ssl_or.errors import InputError
from hf_ssl_or.structures import ViewSpec

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
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))]))


def pixels_of(images: ImageSet, *index: int) -> torch.Tensor:
    """All squares, or some, as they are stored."""
    return torch.cat(list(images.square_batches([np.array(index or range(len(images)))])))


def break_images(folder: Path, count: int) -> list[Path]:
    paths = sorted(folder.rglob("*.png"))[5 : 5 + count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return paths


@pytest.mark.parametrize("cache", ["disk", "auto", "none"])
def test_images_labels_and_statistics(pictures, cache):
    images, wanted = load_images(arguments(pictures, cache=cache), "train"), expected(pictures)
    assert torch.equal(pixels_of(images), wanted) and images.full.dense().dtype == torch.uint8
    assert images.labels.tolist() == [0] * 50 + [1] * 50 + [2] * 50 and images.class_names == ["a", "b", "c"]
    pixels = wanted.double().flatten(0, 2).T / 255
    torch.testing.assert_close(torch.tensor(images.mean).double(), pixels.mean(1), atol=5e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(images.std).double(), pixels.std(1, correction=0), atol=5e-5, rtol=0)
    assert (pictures.parent / "cache").exists() == (cache == "disk")


def test_a_second_run_decodes_nothing(pictures, monkeypatch):
    first = load_images(arguments(pictures), "train")
    monkeypatch.setattr(decode_module, "decode", None)
    second = load_images(arguments(pictures), "train")
    assert torch.equal(pixels_of(first), pixels_of(second))
    assert (first.mean, first.std, first.fingerprint) == (second.mean, second.std, second.fingerprint)


def test_writing_to_the_images_spares_the_file(pictures):
    load_images(arguments(pictures), "train").full.dense().zero_()
    assert torch.equal(pixels_of(load_images(arguments(pictures), "train")), expected(pictures))


@pytest.mark.parametrize("damage", ["short", "long", "json", "keys", "sizes"])
def test_a_damaged_file_is_made_again(pictures, damage, caplog):
    load_images(arguments(pictures), "train")
    data, side_file = (
        next((pictures.parent / "cache").glob("*.uint8")),
        next((pictures.parent / "cache").glob("*.json")),
    )
    content = data.read_bytes()
    if damage == "json":
        side_file.write_text('{"count": 15')
    elif damage == "sizes":
        sizes = data.with_suffix(".sizes")
        sizes.write_bytes(sizes.read_bytes()[:-4])
    elif damage == "keys":
        side_file.write_text(json.dumps({"length": 3}))
    else:
        data.write_bytes(content[:-1] if damage == "short" else content + b"0")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(pixels_of(load_images(arguments(pictures), "train")), expected(pictures))
    assert "is damaged and is made again" in caplog.text


def test_two_writers_at_once_leave_a_sound_file(pictures):
    results, threads = [], []
    for _ in range(3):
        threads.append(threading.Thread(target=lambda: results.append(load_images(arguments(pictures), "train"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(torch.equal(pixels_of(one), expected(pictures)) for one in results)
    assert {path.suffix for path in (pictures.parent / "cache").iterdir()} == {".uint8", ".sizes", ".json"}


def test_a_full_disk_is_one_line_and_leaves_nothing(pictures, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixel_store_module.os, "fsync", full)
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
    assert torch.equal(pixels_of(images), expected_without(pictures, broken))


def expected_without(folder: Path, broken: list[Path]) -> torch.Tensor:
    paths = [path for path in sorted(folder.rglob("*.png")) if path not in broken]
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))


def test_too_many_unreadable_images_are_an_error(pictures):
    broken = break_images(pictures, 4)
    with pytest.raises(InputError, match=rf"4 or more of 150 .*allows 3; the first is {broken[0]}"):
        load_images(arguments(pictures, max_corrupt=0.02), "train")


def test_fraction_takes_a_share_of_each_class_of_the_training_split(pictures):
    images = load_images(arguments(pictures, fraction=0.2), "train")
    assert torch.bincount(images.labels).tolist() == [10, 10, 10]
    other = load_images(arguments(pictures, fraction=0.2, fraction_seed=1), "train")
    assert images.fingerprint != other.fingerprint and not torch.equal(pixels_of(images), pixels_of(other))


def test_given_statistics_are_taken_over(pictures):
    given = load_images(arguments(pictures, mean=[0.1, 0.2, 0.3], std=[1, 1, 0.5]), "train")
    assert given.mean == (0.1, 0.2, 0.3) and given.std == (1, 1, 0.5)
    assert load_images(arguments(pictures), "train", like=given.preprocessing).std == (1, 1, 0.5)


def test_stored_images_keep_their_aspect_and_what_is_small_stays_as_it_is(pictures):
    Image.new("RGB", (300, 200)).save(pictures / "a" / "000.png")
    Image.new("RGB", (61, 240)).save(pictures / "a" / "003.png")
    Image.new("RGB", (70, 50)).save(pictures / "a" / "006.png")
    images = load_images(arguments(pictures, image_size=48), "train")
    assert default_bound(48) == 62
    assert images.full.sizes_N2[:4].tolist() == [[62, 93], [240, 61], [50, 70], [SIDE, SIDE]]
    assert images.full.originals_N2[:3].tolist() == [[200, 300], [240, 61], [50, 70]]
    larger = load_images(arguments(pictures, image_size=48, cache_size=100), "train")
    assert larger.full.sizes_N2[:2].tolist() == [[100, 150], [240, 61]]


def test_the_default_size_keeps_the_median_crop_of_every_view():
    assert default_bound(224) == 290 and default_bound(224) * (0.6**0.5) >= 224
    local = ViewSpec(size=96, crop_scale=(0.05, 0.25))
    assert default_bound(224, [ViewSpec(crop_scale=(0.25, 1.0)), local]) == 284
    assert default_bound(64, [local]) == 248
    assert default_bound(32, [ViewSpec(crop_scale=(1.0, 1.0))]) == 32


def test_a_large_jpeg_is_stored_small_and_right(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 1024, dtype=np.uint8), (512, 1))
    (tmp_path / "ramps").mkdir()
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "ramps" / "a.jpg", quality=95)
    images = load_images(arguments(tmp_path / "ramps", image_size=16, cache_size=16), "train")
    assert images.full[0].shape == (16, 32, 3) and images.full.originals_N2.tolist() == [[512, 1024]]
    np.testing.assert_allclose(images.full[0][3, :, 0], (np.arange(32) + 0.5) * 32 * 255 / 1024, atol=3)


def test_subset_and_batches(pictures):
    images = load_images(arguments(pictures), "train")
    part = images.subset(np.array([7, 3, 140]))
    assert len(part) == 3 and torch.equal(pixels_of(part), pixels_of(images, 7, 3, 140))
    assert part.labels.tolist() == [0, 0, 2] and part.mean == images.mean
    assert torch.equal(pixels_of(part.subset(torch.tensor([2, 0]))), pixels_of(images, 140, 7))
    batches = list(images.square_batches(iter([np.array([1, 2]), np.array([0])])))
    assert [len(batch) for batch in batches] == [2, 1] and torch.equal(batches[1], pixels_of(images, 0))
    names = [Path(images.describe(i)).name for i in (0, 3, 149)]
    assert names == ["000.png", "009.png", "149.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Squares and views of images that are not square


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Photos of many shapes, gradients that tell where a pixel was."""
    rng, folder = np.random.default_rng(1), tmp_path / "mixed"
    for i in range(24):
        height, width = (int(rng.integers(20, 90)) for _ in range(2))
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([255 * y / height, 255 * x / width, np.full((height, width), 10.0 * i)], -1)
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def plan(index: list[int], size: int = 16, local: bool = False) -> ViewPlan:
    spec = ViewSpec(flip=0, jitter=0, grayscale=0)
    groups = [ViewGroup(specs=(spec, spec), size=size, seed=0, epoch=0)]
    if local:
        groups.append(ViewGroup(specs=(ViewSpec(size=8),), size=size, seed=0, epoch=0, first_view=2))
    return ViewPlan(np.array(index), tuple(groups))


@pytest.mark.parametrize("cache", ["auto", "disk", "none", "on the fly"])
def test_squares_are_torchvisions_resize_and_crop_whatever_is_stored(mixed, cache, monkeypatch):
    if cache == "on the fly":
        monkeypatch.setattr(loading_module, "_MEMORY_BYTES", 0)
    settings = {"image_size": 16, "crop_pct": 0.8, "cache": cache.split()[0] if cache != "on the fly" else "none"}
    images = load_images(arguments(mixed, **settings), "train")
    transform = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])
    wanted = [np.asarray(transform(Image.open(path))) for path in sorted(mixed.rglob("*.png"))]
    assert (images.full is None) == (cache == "on the fly")
    np.testing.assert_array_equal(pixels_of(images).numpy(), np.stack(wanted))
    few = images.subset(np.array([3, 20]))
    np.testing.assert_array_equal(pixels_of(few).numpy(), np.stack(wanted)[[3, 20]])
    squares = load_images(arguments(mixed, **settings), "train", squares=True, like=images.preprocessing)
    np.testing.assert_array_equal(pixels_of(squares).numpy(), np.stack(wanted))


def test_views_are_cut_from_the_whole_image_and_equal_on_the_fly(mixed, monkeypatch):
    """Every part of a wide image is seen; large enough files give the same crops stored and decoded each time."""
    stored = load_images(arguments(mixed, image_size=16, cache_size=1000), "train")
    monkeypatch.setattr(loading_module, "_MEMORY_BYTES", 0)
    fresh = load_images(arguments(mixed, image_size=16, cache="none"), "train")
    assert fresh.full is None
    like = stored.preprocessing
    plans = [plan([1, 5, 23], local=True), plan([0, 2], local=True)]
    for (a, index_a), (b, index_b) in zip(
        stored.views(plans), fresh.with_preprocessing(like).views(plans), strict=True
    ):
        assert np.array_equal(index_a, index_b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=0)
    assert [tuple(group.shape) for group in a] == [(2, 2, 3, 16, 16), (1, 2, 3, 8, 8)]


def test_the_edges_of_a_wide_image_are_seen(tmp_path):
    (tmp_path / "wide").mkdir()
    x = np.tile(np.linspace(0, 255, 90, dtype=np.uint8)[None, :, None], (30, 1, 3))
    Image.fromarray(x).save(tmp_path / "wide" / "a.png")
    images = load_images(arguments(tmp_path / "wide", image_size=16, mean=[0] * 3, std=[1] * 3), "train")
    spec = ViewSpec(flip=0, jitter=0, grayscale=0)
    seen = []
    for epoch in range(200):
        group = ViewGroup(specs=(spec,), size=16, seed=0, epoch=epoch)
        ((views,), _) = next(images.views([ViewPlan(np.array([0]), (group,))]))
        seen += [float(views.min()), float(views.max())]
    assert min(seen) < 0.02 and max(seen) > 0.98


# ---------------------------------------------------------------------------------------------------------------------
# Decoded in each step


@pytest.fixture
def on_the_fly(pictures, monkeypatch) -> ImageSet:
    monkeypatch.setattr(loading_module, "_MEMORY_BYTES", 0)
    return load_images(arguments(pictures, cache="none", max_corrupt=0.02), "train")


def test_images_decoded_in_each_step_are_the_same(on_the_fly, pictures):
    wanted, indices = expected(pictures), [np.array([3, 141, 9]), np.array([0, 1, 2])]
    assert on_the_fly.full is None and on_the_fly.load_squares() is None and len(on_the_fly) == N
    for index, batch in zip(indices, on_the_fly.square_batches(iter(indices)), strict=True):
        assert torch.equal(batch, wanted[index])
    assert torch.equal(pixels_of(on_the_fly.subset(torch.tensor([8, 4])), 1, 0), wanted[[4, 8]])
    stored = load_images(arguments(pictures), "train")
    assert (on_the_fly.mean, on_the_fly.std) == (stored.mean, stored.std)


@pytest.mark.parametrize("broken", [0, 3])
def test_what_cannot_be_read_is_found_before_it_is_wanted_and_labels_stay_right(pictures, monkeypatch, broken):
    paths = break_images(pictures, broken) if broken else []
    monkeypatch.setattr(loading_module, "_MEMORY_BYTES", 0)
    images = load_images(arguments(pictures, cache="none", max_corrupt=0.02), "train")
    assert images.labels.tolist() == [0] * (50 - broken) + [1] * 50 + [2] * 50
    assert torch.equal(pixels_of(images), expected_without(pictures, paths))
    ((views,), index) = next(images.views([plan(list(range(40, 52)), size=SIDE)]))
    assert len(index) == views.shape[1] == 12


def test_images_that_are_lost_later_are_replaced_in_views_with_their_own_place(on_the_fly, pictures, caplog):
    broken = break_images(pictures, 3)  # places 5, 6 and 7
    with caplog.at_level(logging.WARNING):
        (_, index) = next(on_the_fly.views([plan([4, 5, 7], size=SIDE)]))
    assert index.tolist() == [4, 8, 8]
    assert caplog.text.count(str(broken[0])) == 1
    with pytest.raises(InputError, match="it could be read before"):
        pixels_of(on_the_fly, 5)
    break_images(pictures, 4)
    with pytest.raises(InputError, match="4 or more of 150"):
        list(on_the_fly.views([plan([8], size=SIDE)]))


def test_an_interrupted_write_leaves_nothing(pictures, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pixel_store_module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_images(arguments(pictures), "train")
    assert list((pictures.parent / "cache").iterdir()) == []


def test_real_images_keep_their_bytes(real_data, tmp_path):
    images = load_images(arguments(real_data / "cifar10", image_size=32, cache_dir=str(tmp_path)), "test")
    assert images.full.dense().shape == (10_000, 32, 32, 3) and images.load_squares() is images.full
    assert images.mean == pytest.approx((0.4942, 0.4851, 0.4504), abs=5e-4)  # the published values of the test split


# ---------------------------------------------------------------------------------------------------------------------
# Labels stay with their images


def colored_rows(labels: list[int]) -> datasets.Dataset:
    """Red squares with label 0, blue ones with label 1."""
    cells = []
    for label in labels:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), ((250, 0, 0), (0, 0, 250))[label]).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def wrong_labels(images: ImageSet) -> int:
    """Images whose color is not their label's."""
    mean_N3 = pixels_of(images).float().mean((1, 2))
    return int(((mean_N3[:, 2] > mean_N3[:, 0]).long() != images.labels).sum())


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_a_set_that_is_saved_again_with_rows_exchanged_is_decoded_again(tmp_path, cache):
    labels = [i % 2 for i in range(40)]
    for _ in range(2):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        datasets.DatasetDict({"train": colored_rows(labels)}).save_to_disk(str(tmp_path / "set"))
        images = load_images(arguments(tmp_path / "set", image_size=16, cache=cache), "train")
        assert images.labels.tolist() == labels and wrong_labels(images) == 0
        labels[5], labels[6] = labels[6], labels[5]


@pytest.mark.parametrize("memory", [2**30, 0], ids=["in memory", "on the fly"])
def test_unreadable_cells_of_a_table_take_their_labels_with_them(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(loading_module, "_MEMORY_BYTES", memory)
    rows = colored_rows([i % 2 for i in range(40)]).cast_column("image", datasets.Image(decode=False))

    def cut(row: dict, i: int) -> dict:
        return {"image": {**row["image"], "bytes": row["image"]["bytes"][:40]}} if i in (3, 10, 20, 31) else row

    (tmp_path / "set").mkdir()
    rows.map(cut, with_indices=True).cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "set/t.parquet"))
    images = load_images(arguments(tmp_path / "set", image_size=16, cache="none", max_corrupt=0.2), "train")
    assert len(images) == 36 and wrong_labels(images) == 0
    (((views,), index),) = images.views([plan(list(range(36)))])
    blue = (views.mean((0, 3, 4))[:, 2] > views.mean((0, 3, 4))[:, 0]).long()
    assert torch.equal(blue, images.labels[torch.from_numpy(index)])
