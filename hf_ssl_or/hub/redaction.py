"""What must not leave the machine, nor show in a message: tokens, and names of this machine's people and folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_ssl_or.errors import InputError

_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}\b")
_PATH = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[A-Za-z][\w+.-]*://")
_MASK = "hf_***"
_TEXT = (".json", ".yaml", ".md", ".py", ".svg")


def mask(text: str) -> str:
    """Hides tokens in a text: the one in use, and all that look like one."""
    token = get_token()
    return _TOKEN.sub(_MASK, text.replace(token, _MASK) if token else text)


def scrubbed_text(text: str, run_folder: Path) -> str:
    """Shortens this machine's paths in the middle of a text to their last part, and hides tokens."""
    for folder in _private_folders(run_folder):
        text = re.sub(rf"{re.escape(folder)}(/[^\s'\"`:,;]*)?", lambda match: Path(match[0]).name, text)
    return mask(text)


def without_paths(value: Any) -> Any:
    """Shortens every path and address in plain data to its last part, which names no user and no host."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "folder"
    return value


def refuse_secrets(files: dict[str, Path], run_folder: Path) -> None:
    """Reads what is about to be pushed, of tensors their names alone.

    Raises:
        InputError: A file holds a token or a path of this machine; the message names it, not the token.
    """
    token, folders = get_token(), _private_folders(run_folder)
    for path, file in files.items():
        text = _readable(file).decode("latin-1")
        if (token and token in text) or (file.suffix in _TEXT and _TOKEN.search(text)):
            raise InputError(
                f"{path}: holds an access token; remove it from the run, and revoke it; nothing was pushed"
            )
        for folder in folders:
            if folder in text:
                raise InputError(f"{path}: holds the path {folder} of this machine; nothing was pushed")


def _readable(file: Path) -> bytes:
    """Returns a file's content; of safetensors the header, since numbers can look like anything."""
    with open(file, "rb") as content:
        if file.suffix == ".safetensors":
            return content.read(int.from_bytes(content.read(8), "little"))
        return content.read()


def _private_folders(run_folder: Path) -> list[str]:
    """Lists this machine's folders that a file could name, longest first; /tmp and its like tell nothing."""
    home = Path(os.path.expanduser("~"))
    folders = {
        folder for folder in (run_folder.resolve(), run_folder.resolve().parent, Path.cwd()) if len(folder.parts) > 2
    }
    return sorted(map(str, folders | ({home} if len(home.parts) > 1 else set())), key=len, reverse=True)
