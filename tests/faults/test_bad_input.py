"""Numbers that are none and shards that are cut: the run stops with one line, and what was good stays."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from effects import nan_in_batch, nan_in_gradient
from kills import Reference
from PIL import Image
from safetensors.numpy import load_file
from tiny_runs import differences, run, write_recipe


@pytest.mark.parametrize(
    ("fault", "good"), [(partial(nan_in_batch, 7), "step-6"), (partial(nan_in_gradient, 5), "step-3")]
)
def test_nan_stops_the_run_and_the_last_good_checkpoint_is_good(
    fault: Callable[[], None], good: str, whole: Reference, tmp_path: Path
) -> None:
    """A gradient may be NaN where the loss is not; the weights that it makes are not saved as good ones."""
    folder = tmp_path / "run"
    ended = run(["train", whole.recipe, "--output", folder], tmp_path / "log", faults=[fault])
    assert ended.statuses == [3] and len(ended.lines) == 1, ended.errors[-2000:]
    assert "not finite at or before step" in ended.lines[0]
    assert ended.lines[0].endswith(f"last good checkpoint: {folder}/checkpoints/{good}")
    for path in (folder / "checkpoints").rglob("method.safetensors"):
        weights = load_file(path)
        assert all(np.isfinite(weight).all() for weight in weights.values() if weight.dtype.kind == "f"), path
    assert run(["train", folder, "--resume"], tmp_path / "log2").statuses == [0]
    assert differences(folder, whole.folder) == []


def write_shard(path: Path, images: int) -> list[int]:
    """Writes a WebDataset shard; gives the place of each header."""
    places = []
    with tarfile.open(path, "w") as archive:
        for i in range(images):
            content = io.BytesIO()
            Image.new("RGB", (16, 16), (i, 0, 255 - i)).save(content, "PNG")
            member = tarfile.TarInfo(f"{i:03d}.png")
            member.size = len(content.getvalue())
            places.append(archive.offset)
            archive.addfile(member, io.BytesIO(content.getvalue()))
    return places


def within(header: int) -> int:
    return header + 512 + 30


@pytest.mark.parametrize(
    "end", [within, lambda header: header + 100, lambda header: header], ids=["an image", "a header", "neither"]
)
def test_a_shard_cut_in_the_middle_is_named(end: Callable[[int], int], tmp_path: Path) -> None:
    """Also where it is cut between two images: half a data set does not pass as a complete one."""
    shard = tmp_path / "images.tar"
    header = write_shard(shard, 64)[32]
    shard.write_bytes(shard.read_bytes()[: end(header)])
    assert_refused(shard, tmp_path)


def test_a_shard_with_a_flipped_bit_in_a_header_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "images.tar"
    header = write_shard(shard, 64)[32]
    content = bytearray(shard.read_bytes())
    content[header + 2] ^= 1
    shard.write_bytes(content)
    assert_refused(shard, tmp_path)


def assert_refused(shard: Path, folder: Path) -> None:
    recipe = write_recipe(folder / "tiny.yaml", data={"dataset": str(shard)})
    ended = run(["train", recipe, "--output", folder / "run"], folder / "log")
    assert ended.statuses == [2] and len(ended.lines) == 1, ended.errors[-2000:]
    assert str(shard) in ended.lines[0]
