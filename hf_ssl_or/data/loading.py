"""Loads a split: decodes it once, into memory or into a file that this and later runs map into memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.decode import DecodeJob, Tally
from hf_ssl_or.data.image_dataset import ImageSet, Storage
from hf_ssl_or.data.image_source import ImageSource
from hf_ssl_or.data.labels import choose_rows
from hf_ssl_or.data.pixel_kind import (
    PixelKind,
    default_bound,
    kept_dtype,
    measure_kind,
    preprocessing_of,
    sample_rows,
    wanted_range,
)
from hf_ssl_or.data.pixel_store import PixelStore, decode_to_disk, decode_to_memory
from hf_ssl_or.data.sources import load_source
from hf_ssl_or.data.stream import load_stream
from hf_ssl_or.models.image_conversion import Preprocessing

_SMALL_BYTES = 64 * 2**20  # "auto": decoded again in each run rather than stored
_LARGE_SIDE = 512  # pixels
_MEMORY_BYTES = 2**30  # "none": held in memory rather than decoded in each step


def load_images(
    arguments: DataArguments,
    split: str,
    *,
    num_channels: int = 3,
    like: Preprocessing | None = None,
    squares: bool = False,
    rows: np.ndarray | None = None,
    source: ImageSource | None = None,
) -> ImageSet:
    """Loads a split, decoding it if no earlier run has.

    Of several processes on a machine let one go first, or each decodes the set (the files stay sound either way).

    Args:
        arguments: Settings of the data; `fraction` concerns the training split only.
        split: Name of the split.
        num_channels: Channels that the encoder takes.
        like: How pixels are treated, say those of the training images; None takes what the arguments say, and
            measures the rest on these images. Its mean and standard deviation are taken over.
        squares: Decodes what evaluation needs, not what views need; the other is decoded when it is asked for.
        rows: Images of the split that are taken; None takes all, or the fraction.
        source: The split, where it is open already; None opens the one that the arguments name.

    Raises:
        InputError: The set, the split or a column is not there, too many images cannot be read, or the folder of the
            cache cannot be written.
    """
    name = public_name(arguments.dataset)
    if arguments.streaming:
        return load_stream(arguments, split, name=name, num_channels=num_channels, like=like)
    if source is None:
        source = load_source(arguments, split)
    if rows is None:
        fraction = arguments.fraction if split == arguments.train_split else 1.0
        rows = choose_rows(source.labels, len(source), fraction, arguments.fraction_seed)
    kind = measure_kind(
        ((source, int(row)) for row in sample_rows(rows)),
        like.value_range if like is not None else wanted_range(arguments),
        like.num_channels if like is not None else num_channels,
        name,
    )
    preprocessing = like or preprocessing_of(arguments, kind, num_channels)
    job = DecodeJob(
        source=source,
        rows=rows,
        preprocessing=preprocessing,
        dtype=kept_dtype(preprocessing, kind),
        bound=None if arguments.cache == "none" else arguments.cache_size or default_bound(preprocessing.image_size),
        workers=arguments.workers(),
        max_corrupt=arguments.max_corrupt,
    )
    images = ImageSet(
        job=job,
        labels=None,
        class_names=source.class_names,
        preprocessing=preprocessing,
        name=name,
        full_storage=_full_storage(arguments, job, kind),
        square_storage=_storage(arguments, _square_bytes(job)),
    )
    store, tally = _first_pass(images, arguments, squares=squares)
    return _readable(images, source, store, tally, squares=squares, measure=like is None and arguments.mean is None)


def _full_bytes(job: DecodeJob, kind: PixelKind) -> int:
    """Estimates the bytes of the full images."""
    height, width = kind.median_size
    shrink = 1.0 if job.bound is None else min(1.0, job.bound / min(height, width))
    return int(len(job.rows) * height * width * shrink**2) * _pixel_bytes(job)


def _full_storage(arguments: DataArguments, job: DecodeJob, kind: PixelKind) -> Storage:
    """Decides where full images are kept.

    Large ones that no bound makes smaller are kept nowhere: to decode a JPEG as small as its crops allow costs less
    than to crop it at its full size.
    """
    large = max(_LARGE_SIDE, 2 * default_bound(job.preprocessing.image_size))
    if arguments.cache == "none" and min(kind.median_size) > large:
        return Storage("on_the_fly")
    return _storage(arguments, _full_bytes(job, kind))


def _square_bytes(job: DecodeJob) -> int:
    itemsize = 1 if job.dtype == "uint8" else 4
    return len(job.rows) * job.preprocessing.image_size**2 * job.preprocessing.num_channels * itemsize


def _pixel_bytes(job: DecodeJob) -> int:
    return job.preprocessing.num_channels * np.dtype(job.dtype).itemsize


def _storage(arguments: DataArguments, nbytes: int) -> Storage:
    """Decides where so many bytes of decoded images are kept."""
    if arguments.cache == "none":
        return Storage("memory" if nbytes <= _MEMORY_BYTES else "on_the_fly")
    to_disk = arguments.cache == "disk" or nbytes > _SMALL_BYTES
    return Storage("disk", arguments.cache_folder()) if to_disk else Storage("memory")


def _first_pass(images: ImageSet, arguments: DataArguments, *, squares: bool) -> tuple[PixelStore, Tally]:
    """Decodes all images once and stores them; of those that are decoded in each step it finds what can be read."""
    job = images.square_job if squares else images.job
    storage = images.square_storage if squares else images.full_storage
    if storage.mode == "memory":
        return decode_to_memory(job)
    if storage.mode == "disk":
        return decode_to_disk(job, arguments.cache_folder())
    bound = default_bound(images.image_size)
    return decode_to_disk(replace(images.job, bound=bound), arguments.cache_folder(), keep_pixels=False)


def _readable(
    images: ImageSet, source: ImageSource, store: PixelStore, tally: Tally, *, squares: bool, measure: bool
) -> ImageSet:
    """Returns the set without what cannot be read, with labels and statistics."""
    rows = np.delete(images.job.rows, [int(place) for place in tally.unreadable])
    left_out = {int(images.job.rows[int(place)]): reason for place, reason in tally.unreadable.items()}
    preprocessing = images.preprocessing
    if measure and tally.count:
        mean, std = tally.statistics(preprocessing)
        preprocessing = replace(preprocessing, mean=mean, std=std)
    kept = store if store.flat.size else None
    return replace(
        images,
        job=replace(images.job, rows=rows),
        labels=None if source.labels is None else torch.from_numpy(source.labels[rows]),
        preprocessing=preprocessing,
        full=None if squares else kept,
        squares=kept if squares else None,
        left_out=left_out,
    )


def public_name(name: str) -> str:
    """Leaves out where on this machine a local set is: the name goes into results, configurations and cards."""
    path = Path(name).expanduser()
    is_pattern = any(sign in name for sign in "*?[{") or ".tar" in name or ".parquet" in name
    local = path.is_absolute() or path.exists() or name.startswith((".", "~")) or is_pattern
    return path.resolve().name.split("?")[0] if local else name


def describe_images(images: ImageSet) -> list[str]:
    """Returns a few lines on what the images of a run are and how they are stored."""
    p, bound, store = images.preprocessing, images.job.bound, images.full
    kind = "8 bits" if p.eight_bit and p.value_range == (0, 255) else images.job.dtype
    values = "each type's own range" if p.value_range == "dtype" else f"values from {p.value_range[0]:g} to "
    values += "" if p.value_range == "dtype" else f"{p.value_range[1]:g}"
    limit = "at their own size" if bound is None else f"shorter side of at most {bound} pixels (data.cache_size)"
    mode = images.full_storage.mode
    where = {"memory": "in memory", "disk": "in a file", "on_the_fly": "nowhere; decoded in each step"}[mode]
    amount = "" if store is None else f", {store.nbytes / 2**20:,.0f} MiB"
    channels = f"{p.num_channels} channel{'s' * (p.num_channels > 1)}"
    return [
        f"{images.name}: {len(images):,} images, {channels} of {kind}, {values}",
        f"stored {where}{amount}, {limit}",
        f"evaluated at {p.image_size} x {p.image_size} pixels, crop_pct {p.crop_pct:g}, {p.interpolation}",
    ]
