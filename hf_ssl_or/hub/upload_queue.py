"""Pushes that wait: complete copies of their files beside the run, so that no failure and no kill can lose one.

    runs/try                                  the run
    runs/try.outbox/<destination>.<n>/        one push: push.json says where to, files/ holds all that it sends

An entry appears by one rename, when all of it is on the disk. A newer push to the same destination takes the place of
an older one that still waits: it is a later state of the same run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ssl_or.errors import InputError

_NOTE, _FILES, _PART = "push.json", "files", ".part"


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a push goes, and under which words.

    Attributes:
        repo_id: The repository, "org/name".
        private: A repository that is made for this push is private; one that is there must be.
        revision: Branch that gets the commit, made if absent; None for `main`.
        create_pr: Opens a pull request instead of committing.
        message: First line of the commit.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = ""

    @property
    def key(self) -> str:
        """Name for the file system; equal for pushes of which the later replaces the earlier."""
        branch = f"@{self.revision or 'main'}{'+pr' if self.create_pr else ''}"
        return re.sub(r"[^\w@+-]", "-", self.repo_id.replace("/", "--") + branch)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One push that waits.

    Attributes:
        folder: Its folder in the outbox.
        destination: Where it goes.
        sha256: Hash of each file, by its path in the repository.
    """

    folder: Path
    destination: Destination
    sha256: dict[str, str]

    @property
    def files(self) -> dict[str, Path]:
        """The files to send, by their paths in the repository."""
        return {path: self.folder / _FILES / path for path in self.sha256}

    @property
    def digest(self) -> str:
        """Hash of everything that is sent."""
        return hashlib.sha256(json.dumps(self.sha256, sort_keys=True).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


class Outbox:
    """The waiting pushes of one run.

    Args:
        run_folder: The run; its outbox is the folder of the same name with `.outbox` appended.
    """

    def __init__(self, run_folder: Path) -> None:
        run_folder = run_folder.resolve()
        self.folder = run_folder.with_name(f"{run_folder.name}.outbox")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from pushing this run; an outbox that is empty at the end is removed.

        Raises:
            InputError: Another process is at it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}); make room there") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.folder}: another push of this run is under way; wait for its end") from None
            self._clean()
            try:
                yield
            finally:
                self._clean()
                if not any(path.name != ".lock" for path in self.folder.iterdir()):
                    shutil.rmtree(self.folder)

    def add(self, destination: Destination, fill: Callable[[Path], None]) -> Entry:
        """Stores a push; call it while `locked`.

        Args:
            destination: Where it goes.
            fill: Writes all files into a folder, by their paths in the repository.

        Raises:
            InputError: The disk is full, or `fill` refuses; no trace is left then.
        """
        waiting = self.waiting()
        number = 1 + max((int(entry.folder.suffix[1:]) for entry in waiting), default=0)
        folder = self.folder / f"{destination.key}.{number}"
        part = self.folder / f"{folder.name}{_PART}"
        try:
            (part / _FILES).mkdir(parents=True)
            fill(part / _FILES)
            sha256 = {path: file_sha256(file) for path, file in _walk(part / _FILES)}
            _write(part / _NOTE, {"destination": asdict(destination), "sha256": sha256})
            _sync(part)
            os.rename(part, folder)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot hold what is to be pushed ({error.strerror or error}); make room there"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for entry in waiting:
            if entry.destination.key == destination.key:
                self.discard(entry)
        return Entry(folder=folder, destination=destination, sha256=sha256)

    def waiting(self) -> list[Entry]:
        """Lists the waiting pushes, oldest first.

        Raises:
            InputError: One of them is damaged; the message names it.
        """
        folders = [path for path in self.folder.glob("*.*") if path.suffix[1:].isdecimal()]
        return [_read(folder) for folder in sorted(folders, key=lambda path: int(path.suffix[1:]))]

    def discard(self, entry: Entry) -> None:
        """Removes a push that was sent, or that a newer one replaces; half of it never shows."""
        part = entry.folder.with_name(f"{entry.folder.name}{_PART}")
        os.rename(entry.folder, part)
        shutil.rmtree(part)

    def _clean(self) -> None:
        """Removes what a killed process left."""
        for part in self.folder.glob(f"*{_PART}"):
            shutil.rmtree(part, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hashes a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> Entry:
    try:
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        entry = Entry(folder=folder, destination=Destination(**note["destination"]), sha256=note["sha256"])
        for path, file in entry.files.items():
            if not file.resolve().is_relative_to(folder.resolve()) or file_sha256(file) != entry.sha256[path]:
                raise ValueError(f"{path} is not what was put there")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: is damaged ({error}); remove it and push the run again") from error
    return entry


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Brings a folder with all that is in it to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
