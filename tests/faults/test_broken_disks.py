"""Full and read-only disks, and files that were cut or changed: one line that names the file, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from effects import fill_disk_at, limit_file_size, signal_at_operation
from kills import Reference
from processes import Ended
from tiny_runs import differences, run


def assert_one_line(ended: Ended, *parts: str) -> None:
    assert ended.statuses == [2] and len(ended.lines) == 1 and "Traceback" not in ended.errors, ended.errors[-3000:]
    for part in parts:
        assert part in ended.lines[0], ended.lines[0]


@pytest.fixture(scope="module")
def stopped(whole: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped between its steps 9 and 10; tests take copies."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    fault = partial(signal_at_operation, "os.rename", ".tmp-step-9", signal.SIGTERM)
    ended = run(["train", whole.recipe, "--output", folder], folder.with_suffix(".log"), faults=[fault])
    assert ended.statuses == [75]
    return folder


@pytest.mark.parametrize(
    "part", ["recipe.tmp", "metrics.jsonl", "spectra/step-12", "step-18/state.json", "results.json"]
)
def test_a_full_disk_stops_with_one_line_and_room_lets_the_run_go_on(
    part: str, whole: Reference, disk: Any, tmp_path: Path
) -> None:
    folder = disk.folder / "run"
    fault = partial(fill_disk_at, part, disk.ballast)
    full = run(["train", whole.recipe, "--output", folder], tmp_path / "log", faults=[fault])
    assert_one_line(full, str(folder), "No space left on device")
    disk.ballast.unlink()
    line = ["train", whole.recipe, "--output", folder, "--resume"]
    resumed = run(line, tmp_path / "log2")
    assert resumed.statuses == [0], resumed.errors[-2000:]
    assert differences(folder, whole.folder) == []


def test_a_limit_on_the_size_of_files_stops_with_one_line(whole: Reference, tmp_path: Path) -> None:
    """Where no file system can be mounted, the kernel refuses a write in this way as well."""
    folder = tmp_path / "run"
    limited = run(
        ["train", whole.recipe, "--output", folder], tmp_path / "log", faults=[partial(limit_file_size, 20_000)]
    )
    assert_one_line(limited, str(folder), "File too large", "last good checkpoint: none")
    assert run(["train", folder, "--resume"], tmp_path / "log2").statuses == [0]
    assert differences(folder, whole.folder) == []


def test_a_read_only_folder_is_named(whole: Reference, disk: Any, stopped: Path, tmp_path: Path) -> None:
    folder = disk.folder / "run"
    shutil.copytree(stopped, folder)
    disk.forbid_writing()
    for line in (["train", folder, "--resume"], ["train", whole.recipe, "--output", disk.folder / "new"]):
        assert_one_line(run(line, tmp_path / f"log{len(line)}"), str(disk.folder), "ead-only file system")
    disk.allow_writing()
    assert run(["train", folder, "--resume"], tmp_path / "log5").statuses == [0]
    assert differences(folder, whole.folder) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "problem"), [(cut, "incomplete"), (flip_a_bit, "SHA-256 differs")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage: Any, problem: str, stopped: Path, whole: Reference, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    newest, before = sorted((folder / "checkpoints").glob("step-*"), key=lambda path: -int(path.name[5:]))[:2]
    damage(newest / "method.safetensors")
    resumed = run(["train", folder, "--resume"], tmp_path / "log")
    assert resumed.statuses == [0], resumed.errors[-2000:]
    assert f"{newest}/method.safetensors: " in resumed.errors and problem in resumed.errors
    assert f"using {before} instead" in resumed.errors
    assert differences(folder, whole.folder) == []
