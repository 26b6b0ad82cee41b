"""What an interrupted evaluation leaves for the next one: features and results, by a hash of what they depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hf_ssl_or.errors import InputError


class Store:
    """A folder of `features/<hash>.safetensors` and `cells/<hash>.json`; both hold their key as well.

    Files are written under another name and renamed, so a kill leaves no half of one, and processes may share the
    folder. Results of another version of this package are not taken over.

    Args:
        folder: Made if absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def features(self, key: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """Reads features, or computes and writes them."""
        path = self._path("features", key, "safetensors")
        try:
            return safetensors.torch.load_file(path)["features"]
        except (FileNotFoundError, SafetensorError, KeyError):
            features_NF = compute()
            data = safetensors.torch.save({"features": features_NF.contiguous()}, {"key": json.dumps(key)})
            self._write(path, data)
            return features_NF

    def find_result(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Returns a result, or None where there is none."""
        try:
            return json.loads(self._path("cells", key, "json").read_text())["result"]
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def write_result(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        """Writes a result."""
        text = json.dumps({"key": key, "result": result}, indent=2) + "\n"
        self._write(self._path("cells", key, "json"), text.encode())

    def _path(self, kind: str, key: dict[str, Any], ending: str) -> Path:
        text = json.dumps({"hf_ssl_or": importlib.metadata.version("hf-ssl-or"), **key}, sort_keys=True)
        return self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.{ending}"

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(
                f"{path.parent}: cannot write {len(data) / 2**20:,.0f} MiB ({error.strerror}); make room there, or "
                "name another folder with data.cache_dir or $HF_SSL_OR_CACHE"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
