"""Bytes of images that were changed anywhere: decoded, or left out and named, or refused in one line."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, fuzz, result_or_one_line
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.webdataset import TarSource


def encoded(form: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned
FORMS = {
    "png": encoded("PNG"),
    "jpg": encoded("JPEG", exif=EXIF.tobytes()),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF"),
    "tiff": encoded("TIFF", compression="tiff_lzw"),
}


def load(folder: Path) -> ImageSet | None:
    arguments = DataArguments(
        dataset=str(folder), image_size=16, max_corrupt=0.99, num_workers=1, cache="disk", cache_dir=f"{folder}-cache"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return result_or_one_line(lambda: load_images(arguments, "train"))


@pytest.mark.parametrize("form", FORMS)
@fuzz
@given(data=st.data())
def test_damaged_images(form: str, data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "0.png").write_bytes(FORMS["png"])
    for i in range(1, 6):
        (folder / f"{i}.{form}").write_bytes(data.draw(damaged(FORMS[form])))
    images = load(folder)
    assert images is not None and 1 <= len(images) <= 6
    assert images.unit_squares(np.arange(len(images))).shape[1:] == (3, 16, 16)
    assert images.full is not None and (images.full.sizes_N2.min(axis=1) <= images.job.bound).all()
    assert np.isfinite([*images.mean, *images.std]).all()


@fuzz
@given(data=st.data())
def test_a_damaged_note_beside_stored_images(data: st.DataObject, tmp_path: Path) -> None:
    """What it says is checked against the images; where it is wrong they are decoded anew."""
    folder = tmp_path / "pictures"
    if not folder.exists():
        folder.mkdir()
        for i in range(3):
            (folder / f"{i}.png").write_bytes(FORMS["png"])
    first = load(folder)
    (note,) = Path(f"{folder}-cache").glob("*.json")
    note.write_bytes(data.draw(damaged(note.read_bytes())))
    again = load(folder)
    assert again is not None and first is not None and again.preprocessing == first.preprocessing
    stores = [images.load_full() for images in (again, first)]
    for name in ("flat", "starts_N", "sizes_N2", "originals_N2"):
        np.testing.assert_array_equal(*(getattr(store, name) for store in stores))


@fuzz
@given(data=st.data())
def test_damaged_shards(data: st.DataObject, tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        for i in range(3):
            for name, content in ((f"{i}.png", FORMS["png"]), (f"{i}.cls", str(i).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    whole = shard.read_bytes()[: -8 * 512]
    header = 1536 * data.draw(st.integers(0, 3))
    shard.write_bytes(whole[:header] + data.draw(damaged(whole[header:])))
    source = result_or_one_line(lambda: TarSource("a.tar", [shard]))
    if source is not None:
        for i in range(len(source)):
            assert source.describe(i)


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "0.png").write_bytes(FORMS["png"])
    (folder / "a" / "back").symlink_to("..")
    (folder / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(FORMS["png"])
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    images = load(folder)
    assert images is not None and len(images) == 2


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    assert load(tmp_path) is None, "and not read for ever"
