"""What the test Hub stores: files, commits, repositories, as git would have them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blob:
    """A file's content and what the Hub says of it."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash: of the content, or of the text that points to a large file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        data = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    files: dict[str, Blob]
    title: str
    description: str
    parent: str | None

    @property
    def sha(self) -> str:
        names = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(repr((names, self.title, self.description, self.parent)).encode()).hexdigest()


@dataclass
class Repository:
    kind: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches by name, pull requests as refs/pr/1

    def __post_init__(self) -> None:
        self.refs["main"] = self.add({".gitattributes": Blob(b"", False)}, "initial commit", "", None)

    def add(self, files: dict[str, Blob], title: str, description: str, parent: str | None) -> str:
        commit = Commit(files, title, description, parent)
        self.commits[commit.sha] = commit
        return commit.sha

    def at(self, revision: str) -> Commit:
        try:
            return self.commits[self.refs.get(revision, revision)]
        except KeyError:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    @property
    def files(self) -> dict[str, bytes]:
        """Content of each file of `main`."""
        return {path: blob.content for path, blob in self.at("main").files.items() if path != ".gitattributes"}

    def history(self, revision: str = "main") -> list[Commit]:
        found, commit = [], self.at(revision)
        while True:
            found.append(commit)
            if commit.parent is None:
                return found
            commit = self.commits[commit.parent]


class Refusal(Exception):
    """An answer other than success: status, message and the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code
