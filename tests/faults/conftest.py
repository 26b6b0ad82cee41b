from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kills import Reference, uninterrupted
from tiny_runs import write_recipe


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


@pytest.fixture(scope="session")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return uninterrupted(recipe, tmp_path_factory.mktemp("whole") / "one")


@pytest.fixture(scope="session")
def whole_of_two(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return uninterrupted(recipe, tmp_path_factory.mktemp("whole") / "two", processes=2)


class Disk:
    """A file system of its own in memory, 10 MiB; what the file `ballast` takes is not free."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=10m", "tmpfs")

    def forbid_writing(self) -> None:
        self._mount("-o", "remount,ro")

    def allow_writing(self) -> None:
        self._mount("-o", "remount,rw")

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True, capture_output=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, self.folder], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Where mounting is not permitted, such tests are skipped; a limit on the size of files is tested anyway."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    try:
        disk = Disk(tmp_path / "disk")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"a file system in memory cannot be mounted here: {error}")
    yield disk
    disk.unmount()
