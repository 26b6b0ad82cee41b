"""Loads a split: decodes it once, into memory or into a file that this and later runs map into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.decode import DecodeJob, Statistics, Tally, decode_all, stored_side
from hf_ssl_or.data.images import ImageSet, StreamedImageSet
from hf_ssl_or.data.labels import choose_rows
from hf_ssl_or.data.sources import load_source
from hf_ssl_or.data.stream import load_stream
from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import keyed_permutation

_SMALL_BYTES = 64 * 2**20  # "auto": decoded again in each run rather than stored
_MEMORY_BYTES = 2**30  # "none": held in memory rather than decoded in each step
_SAMPLE = 4096  # images that the statistics of a streamed set are measured on
_logger = logging.getLogger(__name__)


def load_images(arguments: DataArguments, split: str, *, statistics: Statistics | None = None) -> ImageSet:
    """Loads a split as uint8 squares, decoding it if no earlier run has.

    Of several processes on a machine let one go first, or each decodes the set (the files stay sound either way).

    Args:
        arguments: Settings of the data; `fraction` concerns the training split only.
        split: Name of the split.
        statistics: Mean and standard deviation to take over, say those of the training images; None takes those of
            the arguments, else measures them on these images.

    Raises:
        InputError: The set, the split or a column is not there, too many images cannot be read, or the folder of the
            cache cannot be written.
    """
    if statistics is None and arguments.mean is not None and arguments.std is not None:
        statistics = tuple(arguments.mean), tuple(arguments.std)
    if arguments.streaming:
        return load_stream(arguments, split, name=_public_name(arguments.dataset), statistics=statistics)
    source = load_source(arguments, split)
    fraction = arguments.fraction if split == arguments.train_split else 1.0
    rows = choose_rows(source.labels, len(source), fraction, arguments.fraction_seed)
    job = DecodeJob(
        source=source,
        rows=rows,
        side=arguments.cache_size or stored_side(source, rows, arguments.image_size),
        workers=arguments.workers(),
        max_corrupt=arguments.max_corrupt,
    )
    if arguments.cache == "none" and job.nbytes > _MEMORY_BYTES:
        empty = torch.empty(0, 3, job.side, job.side, dtype=torch.uint8)
        known = _about(job, rows, arguments.image_size, statistics or _sampled_statistics(job))
        return StreamedImageSet(images=empty, job=job, **known)
    to_disk = arguments.cache == "disk" or (arguments.cache == "auto" and job.nbytes > _SMALL_BYTES)
    images, tally = _from_disk(job, arguments.cache_folder()) if to_disk else _in_memory(job)
    kept = np.delete(rows, [int(place) for place in tally.unreadable])
    return ImageSet(images=images, **_about(job, kept, arguments.image_size, statistics or tally.statistics()))


def _about(job: DecodeJob, rows: np.ndarray, image_size: int, statistics: Statistics) -> dict[str, Any]:
    labels = job.source.labels
    return {
        "labels": None if labels is None else torch.from_numpy(labels[rows]),
        "class_names": job.source.class_names,
        "mean": statistics[0],
        "std": statistics[1],
        "name": _public_name(job.source.name),
        "fingerprint": job.key(),
        "image_size": image_size,
    }


def _public_name(name: str) -> str:
    """Leaves out where on this machine a local set is: the name goes into results, configurations and cards."""
    path = Path(name).expanduser()
    local = path.is_absolute() or path.exists() or name.startswith(".") or ".tar" in name or ".parquet" in name
    return path.resolve().name.split("?")[0] if local else name


def _sampled_statistics(job: DecodeJob) -> Statistics:
    sample = np.sort(job.rows[keyed_permutation(len(job.rows), "statistics")[:_SAMPLE]])
    return _in_memory(replace(job, rows=sample))[1].statistics()


def _in_memory(job: DecodeJob) -> tuple[Tensor, Tally]:
    images, tally = torch.empty(len(job.rows), 3, job.side, job.side, dtype=torch.uint8), Tally()
    for some in decode_all(job, tally):
        images[tally.count - len(some) : tally.count] = torch.from_numpy(some)
    return images[: tally.count], tally


def _from_disk(job: DecodeJob, folder: Path) -> tuple[Tensor, Tally]:
    """Maps the file of an earlier run, or makes it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.source.name).strip("-.")[-60:]
    data = folder / f"{name}-{job.side}px-{job.key()}.uint8"
    tally = _read_tally(data, job)
    if tally is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tally = _write(job, data)
        except OSError as error:
            raise InputError(
                f"data.cache_dir: cannot write {job.nbytes / 2**20:,.0f} MiB to {folder} ({error.strerror or error}); "
                "make room there, name another folder, or set data.cache to none"
            ) from error
    shape = (tally.count, 3, job.side, job.side)
    # Private mapping: torch wants memory that it may write to, and nothing written there reaches the file.
    return torch.from_file(str(data), shared=False, size=int(np.prod(shape)), dtype=torch.uint8).view(shape), tally


def _read_tally(data: Path, job: DecodeJob) -> Tally | None:
    """Reads what an earlier run counted; None if it left no file, or one of another length."""
    try:
        note = json.loads(data.with_suffix(".json").read_bytes())
        sound = note.pop("sha256") == _digest(note) and data.stat().st_size == note["count"] * 3 * job.side**2
    except OSError:
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        sound = False
    if not sound:
        _logger.warning("%s is damaged and is made again", data)
    return Tally(**note) if sound else None


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _write(job: DecodeJob, data: Path) -> Tally:
    """Writes the images, then what was counted: a `.json` file says that the images are complete."""
    tally = Tally()
    with _replacing(data) as file:
        for some in decode_all(job, tally):
            file.write(some.tobytes())
    with _replacing(data.with_suffix(".json")) as file:
        note = asdict(tally)
        file.write(json.dumps({"sha256": _digest(note), **note}).encode())
    return tally


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file of a unique name and renames it at the end: readers see all or nothing, whoever else writes."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
