"""Bad images, from the command line: one clear line each, and exit status 2 where nothing sensible is left."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_ssl_or.cli import main
from tests.test_cli import refusal

RNG = np.random.default_rng(0)
RECIPE = {
    "data": {"dataset": "", "image_size": 16, "cache": "none", "num_workers": 1},
    "encoder": {"name": "resnet18", "stem": "small", "channels": [8, 8, 8, 8]},
    "method": {"name": "barlow_twins", "projector_hidden": 16, "projector_dim": 8},
    "orthogonality": {"penalty": "none"},
    "training": {"batch_size": 8, "max_steps": 1, "monitor_every": 0, "device": "cpu"},
    "evaluation": {"protocols": []},
}


def gray(high: int = 4096) -> Image.Image:
    return Image.fromarray(RNG.integers(0, high, (20, 24), dtype=np.uint16))


def write_set(folder: Path, count: int = 20, channels: int = 1) -> Path:
    """Writes 16-bit grayscale PNGs, or arrays of several channels."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        if channels == 1:
            gray().save(folder / f"{i:02d}.png")
        else:
            np.save(folder / f"{i:02d}.npy", RNG.integers(0, 4096, (20, 24, channels), dtype=np.uint16))
    return folder


def command(tmp_path: Path, dataset: object, *settings: str, channels: int = 1) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    more = [f"data.dataset={dataset}", f"encoder.num_channels={channels}", *settings]
    return ["train", str(recipe), *more, "--output", str(tmp_path / "run")]


def lose(folder: Path) -> None:
    (folder / "07.png").write_bytes(b"")


def with_nan(folder: Path) -> None:
    (folder / "07.png").unlink()
    np.save(folder / "07.npy", np.full((20, 24), np.nan, np.float32))


def very_long(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 60_000), np.uint16)).save(folder / "07.png")


def bomb(folder: Path) -> None:
    Image.new("L", (20_000, 20_000)).save(folder / "07.png")


def truncated(folder: Path) -> None:
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:300])


def dangling(folder: Path) -> None:
    (folder / "07.png").unlink()
    (folder / "07.png").symlink_to(folder / "gone.png")


def broken_dicom(folder: Path) -> None:
    (folder / "07.png").unlink()
    (folder / "07.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0\0\0\0\0")


DAMAGE: dict[Callable[[Path], None], str] = {
    lose: "empty file of 0 bytes",
    with_nan: "NaN or infinite pixels",
    very_long: "60,000 x 4 pixels: one side is more than 100 times the other",
    bomb: "decompression bomb",
    truncated: "07.png: ",
    dangling: "07.png: ",
    broken_dicom: "07.dcm: ",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_bad_image_is_named_and_either_too_many_or_left_out(damage, tmp_path, capsys, caplog):
    folder = write_set(tmp_path / "set")
    damage(folder)
    error = refusal(capsys, *command(tmp_path, folder))
    assert "1 or more of 20 images cannot be read, and data.max_corrupt=0.01 allows 0; the first is" in error
    assert DAMAGE[damage] in error and str(folder / "07") in error
    with caplog.at_level(logging.WARNING):
        assert main([*command(tmp_path, folder, "data.max_corrupt=0.1"), "--resume"]) == 0
    assert "left out 1 unreadable images" in caplog.text and DAMAGE[damage] in caplog.text
    assert "19 images, 1 channel of uint16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        (
            "two depths",
            1,
            "has two ranges of values: .* is of uint8, .* of uint16; convert one kind, or set data.value",
        ),
        ("two channel counts", 6, r"20.npy: an array of shape \(20, 24, 5\), not of 6 channels"),
        ("channels of another number", 3, r"00.npy: an array of shape \(20, 24, 6\), not of 3 channels"),
        ("all alike", 1, "all pixels of set have the value 7: there is nothing to learn"),
        ("nothing readable", 1, "4 or more of 4 images cannot be read"),
        ("nothing at all", 1, "there is no image in"),
    ],
)
def test_a_bad_set_is_one_line(name, channels, message, tmp_path, capsys):
    folder = write_set(tmp_path / "set", channels=6 if "channel" in name else 1)
    if name == "two depths":
        Image.new("L", (20, 24), 9).save(folder / "99.png")
    elif name == "two channel counts":
        np.save(folder / "20.npy", np.zeros((20, 24, 5), np.uint16))
    elif name != "channels of another number":
        for path in folder.iterdir():
            path.unlink()
        for i in range({"all alike": 20, "nothing readable": 4}.get(name, 0)):
            if name == "all alike":
                Image.fromarray(np.full((20, 24), 7, np.uint16)).save(folder / f"{i:02d}.png")
            else:
                (folder / f"{i}.png").write_bytes(b"words")
    error = refusal(capsys, *command(tmp_path, folder, channels=channels))
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "encoder").exists()


def test_a_constant_image_among_others_is_no_harm(tmp_path):
    folder = write_set(tmp_path / "set")
    Image.fromarray(np.full((20, 24), 9, np.uint16)).save(folder / "99.png")
    assert main(command(tmp_path, folder)) == 0


def test_two_depths_train_where_each_type_has_its_own_range(tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    Image.new("L", (20, 24), 9).save(folder / "99.png")
    assert main(command(tmp_path, folder, "data.value_range=dtype")) == 0
    assert "each type's own range" in capsys.readouterr().err


def test_two_brightnesses_are_warned_of(tmp_path, caplog):
    folder = write_set(tmp_path / "set")
    for i in range(20, 30):
        gray(60).save(folder / f"{i}.png")
    with caplog.at_level(logging.WARNING):
        assert main(command(tmp_path, folder)) == 0
    assert "seems to have two ranges of values, up to 59" in caplog.text and caplog.text.count("\n") == 1


def test_a_range_that_clips_is_warned_of_with_the_share(tmp_path, caplog):
    folder = write_set(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        assert main(command(tmp_path, folder, "data.value_range=[0, 3072]")) == 0
    assert "data.value_range: [0, 3072] clips 24." in caplog.text or "clips 25." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main([*command(tmp_path, folder, "data.value_range=[0, 4095]"), "--output", str(tmp_path / "b")]) == 0
    assert "clips" not in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("missing.png", "missing.png"),
        ("/etc/passwd", "outside"),
        ("../other/00.png", "outside"),
        ("https://host/a.png", "https://host/a.png"),
    ],
)
def test_bad_rows_of_a_list_are_one_line(row, message, tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    (folder / "list.txt").write_text("\n".join([*(f"{i:02d}.png" for i in range(20)), row]) + "\n")
    error = refusal(capsys, *command(tmp_path, folder / "list.txt"))
    assert message in error


@pytest.mark.parametrize("setting", ["views.specs=[{hue: 0.1, saturation: 0, grayscale: 0}]", "views.specs=[{}]"])
def test_views_that_need_colors_are_refused_by_name(setting, tmp_path, capsys):
    error = refusal(capsys, *command(tmp_path, write_set(tmp_path / "set"), setting))
    assert "views.specs: " in error and "hue" in error and "need RGB images, not 1 channel; set them to 0" in error
