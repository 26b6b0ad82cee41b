"""An HTTP server of files with ranges and ETags that can be told to fail, in a thread."""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class RangeServer:
    """Serves a folder: `with RangeServer(folder) as server`, at `server.url`.

    Attributes:
        faults: (part of the path, what, how often): a status, or "cut": half of the bytes, then the end.
        log: (method, path, first byte, bytes) of each request that was answered.
        ranges: Whether ranges are served.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.ranges = folder, True
        self.faults: list[list[Any]] = []
        self.log: list[tuple[str, str, int, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, path: str, what: int | str, times: int = 1_000_000) -> None:
        self.faults.append([path, what, times])

    def fault(self, path: str, head: bool) -> int | str | None:
        for fault in self.faults:
            if fault[0] in path and fault[2] > 0 and not (head and fault[1] == "cut"):
                fault[2] -= 1
                return fault[1]
        return None

    def bytes_read(self) -> int:
        return sum(size for method, _, _, size in self.log if method == "GET")

    def __enter__(self) -> RangeServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@functools.lru_cache(maxsize=16)
def contents(path: Path, size: int, changed: int) -> tuple[bytes, str]:
    """Returns a file's bytes and their ETag."""
    content = path.read_bytes()
    return content, hashlib.md5(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    owner: RangeServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        fault, path = self.owner.fault(self.path, head), self.owner.folder / self.path.lstrip("/")
        if isinstance(fault, int) or not path.is_file():
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        stat = path.stat()
        content, tag = contents(path, stat.st_size, stat.st_mtime_ns)
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.owner.ranges:
            first, last = int(asked[1]), min(int(asked[2]), last)
        body = content[first : last + 1]
        self.send_response(206 if asked and self.owner.ranges else 200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.owner.log.append(("HEAD" if head else "GET", self.path, first, len(body)))
        if head:
            return
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"

    def log_message(self, *_: object) -> None:
        pass
