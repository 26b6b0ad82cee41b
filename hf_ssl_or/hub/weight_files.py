"""The weights in an encoder's folder: which files hold them, and one hash that says which they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_ssl_or.errors import InputError
from hf_ssl_or.models.auto import SHARD_INDEX, shard_names

WEIGHTS = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Lists an encoder's weight files: one, or the shards that its index names. Pickles are never read.

    Raises:
        InputError: There are none, one is missing, or the index names a file outside the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / SHARD_INDEX).is_file():
        raise InputError(f"{folder}: has no {WEIGHTS}; only safetensors are read and pushed")
    try:
        files = [folder / name for name in shard_names(folder / SHARD_INDEX)]
    except ValueError as error:
        raise InputError(str(error)) from error
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: is missing, though {SHARD_INDEX} names it")
    return files


def weights_sha256(folder: Path) -> str:
    """Hashes names, types, shapes and values of all tensors; how they are spread over files does not matter.

    Raises:
        InputError: The weights are missing or damaged.
    """
    where: dict[str, Path] = {}
    digest = hashlib.sha256()
    try:
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
        for name, file in sorted(where.items()):
            with safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: its weights cannot be read: {error}") from error
    return digest.hexdigest()
