"""Byte ranges of files wherever they are: this machine, an HTTP server, the Hub, or what else fsspec knows."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import fsspec
from huggingface_hub.errors import HfHubHTTPError

from hf_ssl_or.errors import InputError

T = TypeVar("T")

ATTEMPTS, FIRST_WAIT = 6, 1.0
_PASSING = (408, 425, 429)  # and all from 500 on
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
_TAGS = ("ETag", "Content-MD5", "Digest", "Last-Modified", "blob_id", "mtime")
_logger = logging.getLogger(__name__)


class RemoteFile:
    """A file of known size that is read by byte ranges.

    What fails in passing (no connection, one that breaks or stalls, an answer of 408, 425, 429 or 5xx) is tried again
    after 1, 2, 4, 8 and 16 s and a random part of as much again.

    Args:
        url: A path on this machine, or a URL such as https://host/a.tar or hf://datasets/org/name/a.parquet.

    Attributes:
        size: Bytes.
        tag: What changes with the content: the server's ETag, the Hub's object id, or the time of change.

    Raises:
        InputError: The file is not there or may not be read, or its server does not say its size.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        http = {"client_kwargs": {"timeout": _TIMEOUT, "trust_env": True}} if url.startswith("http") else {}
        self._system, self._path = fsspec.url_to_fs(url, **http)
        self.is_local = isinstance(self._system, fsspec.implementations.local.LocalFileSystem)
        self.size, self.tag = self._state()

    @property
    def name(self) -> str:
        """What messages call it: the address without what follows a question mark, which may be secret."""
        return self.url.split("?")[0]

    def check(self) -> None:
        """Makes sure that the file is still what it was.

        Raises:
            InputError: It is not.
        """
        size, tag = self._state()
        if (size, tag) != (self.size, self.tag):
            what = f"it had {self.size} bytes, has {size}" if size != self.size else "its content is not the same"
            raise InputError(
                f"data.dataset: {self.name} has changed since it was indexed ({what}); restore it or start another run"
            )

    def read(self, start: int, stop: int) -> bytes:
        """Reads bytes start, ..., stop - 1; what is behind the end is left out."""
        stop = min(stop, self.size)
        return self._persist(lambda: self._read_once(start, stop)) if start < stop else b""

    def open(self) -> io.RawIOBase:
        """Opens the file for programs that seek and read; each of their reads is a request."""
        return _Seekable(self)

    def _read_once(self, start: int, stop: int) -> bytes:
        if isinstance(self._system, fsspec.asyn.AsyncFileSystem):
            content = self._system.cat_file(self._path, start=start, end=stop)
        else:
            with self._system.open(self._path, "rb", cache_type="none") as file:  # which would read ahead
                file.seek(start)
                content = file.read(stop - start)
        if len(content) > stop - start:
            raise InputError(f"data.dataset: the server of {self.name} does not serve ranges of bytes; copy the files")
        if len(content) < stop - start:
            raise ConnectionError(f"{stop - start} bytes were asked for, {len(content)} came")
        return content

    def _state(self) -> tuple[int, str]:
        info = self._persist(lambda: self._system.info(self._path))
        if info.get("size") is None:
            raise InputError(f"data.dataset: the server of {self.name} does not say how large it is; copy the files")
        return int(info["size"]), next((str(info[key]) for key in _TAGS if info.get(key)), "")

    def _persist(self, attempt: Callable[[], T]) -> T:
        for number in range(ATTEMPTS):
            try:
                return attempt()
            except (OSError, aiohttp.ClientError, TimeoutError, HfHubHTTPError) as error:
                cause = _root(error)
                if refusal := _refusal(cause):
                    raise InputError(f"data.dataset: {self.name} {refusal}") from error
                reason = f"{type(cause).__name__} {cause}".splitlines()[0].replace(self.url, "").strip()[:200]
                if number + 1 == ATTEMPTS:
                    raise InputError(
                        f"data.dataset: {self.name} cannot be read after {ATTEMPTS} attempts ({reason}); "
                        "when it can be, train with --resume"
                    ) from error
                wait = FIRST_WAIT * 2**number * (1 + random.random())
                _logger.warning("%s: %s; trying again in %.0f s", self.name, reason, wait)
                time.sleep(wait)
        raise AssertionError("unreachable")


def _root(error: BaseException) -> BaseException:
    """Finds the cause of a failed request: fsspec calls everything "not found"."""
    while error.__cause__ is not None and not isinstance(error, aiohttp.ClientResponseError | HfHubHTTPError):
        error = error.__cause__
    return error


def _refusal(error: BaseException) -> str | None:
    """Returns the words for a final failure; None for one that may pass."""
    if isinstance(error, aiohttp.ClientResponseError):
        status = error.status
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
    elif isinstance(error, PermissionError):
        return "may not be read"
    else:
        status = 404 if isinstance(error, FileNotFoundError) else 500
    if status >= 500 or status in _PASSING:
        return None
    if status == 404:
        return "is not there"
    if status == 416:
        return "is shorter than when it was indexed; restore it, or start another run"
    hint = "; run hf auth login, or ask for access" if status in (401, 403) else ""
    return f"cannot be read: the server answered {status}{hint}"


class _Seekable(io.RawIOBase):
    """A `RemoteFile` as Python's io knows files."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(self._place, self._file.size if size < 0 else self._place + size)
        self._place += len(content)
        return content

    def readinto(self, target: Any) -> int:
        content = self.read(len(target))
        target[: len(content)] = content
        return len(content)
