"""A set that is read from its shards while a run trains: the next blocks in threads, never more than two windows."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.augmentation_sampling import ViewPlan
from hf_ssl_or.data.callable_views import CallablePlan, CallableViews, render_all
from hf_ssl_or.data.decode import DecodeJob, Statistics, Tally, decode, note_unreadable, too_many_unreadable
from hf_ssl_or.data.image_dataset import (
    ImageSet,
    Rendered,
    Storage,
    crop_file,
    empty_crops,
    render_groups,
    write_crops,
)
from hf_ssl_or.data.pixel_kind import (
    PixelKind,
    default_bound,
    kept_dtype,
    measure_kind,
    preprocessing_of,
    wanted_range,
)
from hf_ssl_or.data.pixel_store import decode_to_memory
from hf_ssl_or.data.sampling import WindowOrder
from hf_ssl_or.data.shards import DamagedBlock, OpenBlock, Shards, index_shards, write_json
from hf_ssl_or.data.sources import list_shards
from hf_ssl_or.distributed import world_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.randomness import keyed_permutation

_CONNECTIONS = 8  # blocks that are read at a time
_ROWS_AHEAD = 2**18  # places of the order that are planned ahead, at most
_BATCHES_AHEAD = 3  # batches that are decoded at a time
_TASK = 16  # images that a thread decodes at a time
_SAMPLE, _SAMPLE_BLOCKS = 4096, 32  # images that the statistics are measured on; blocks that a sample spreads over
_KIND_SAMPLE = 256  # images that the range of values is measured on

Reader = OpenBlock | DamagedBlock
Fill = Callable[[int, Reader, int], str | None]


class BlockBuffer:
    """Opens blocks in threads before they are needed, and lets go of each after its last use in sight.

    It opens those of the coming batches as far as they fit into the budget. Only a batch that needs more than the
    budget by itself exceeds it.

    Args:
        shards: The blocks.
        indices: The rows of one batch after the other.
        budget: Bytes of the blocks that are held or on their way.

    Attributes:
        held: Bytes of these blocks now.
        peak: The most that they have been.
    """

    def __init__(self, shards: Shards, indices: Iterable[np.ndarray], budget: int) -> None:
        self._shards, self._coming, self._budget = shards, iter(indices), budget
        self._pool = ThreadPoolExecutor(_CONNECTIONS)
        self._next: np.ndarray | None = None
        self._waiting: deque[tuple[np.ndarray, list[int]]] = deque()
        self._rows_ahead, self.held, self.peak = 0, 0, 0
        self._readers: dict[int, Future[Reader]] = {}
        self._uses: Counter[int] = Counter()

    def take(self) -> tuple[np.ndarray, dict[int, Future[Reader]]] | None:
        """Returns the next batch's rows and blocks; None at the end, or until a batch is released."""
        self._open_ahead()
        if not self._waiting:
            return None
        index_B, blocks = self._waiting.popleft()
        self._rows_ahead -= len(index_B)
        return index_B, {block: self._readers[block] for block in blocks}

    def release(self, blocks: Iterable[int]) -> None:
        """Takes back the blocks of a batch."""
        for block in blocks:
            self._uses[block] -= 1
            if not self._uses[block]:
                del self._readers[block], self._uses[block]
                self.held -= int(self._shards.nbytes_K[block])
        self._open_ahead()

    def close(self) -> None:
        """Opens nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open_ahead(self) -> None:
        while self._rows_ahead < _ROWS_AHEAD:
            if self._next is None:
                self._next = next(self._coming, None)
            if self._next is None:
                return
            blocks = np.unique(self._shards.block_of(self._next)).tolist()
            new = [block for block in blocks if block not in self._readers]
            more = int(self._shards.nbytes_K[new].sum())
            if self._readers and self.held + more > self._budget:
                return
            self._readers |= {block: self._pool.submit(self._shards.open, block) for block in new}
            self._uses.update(blocks)
            self._waiting.append((self._next, blocks))
            self._rows_ahead += len(self._next)
            self.held += more
            self.peak = max(self.peak, self.held)
            self._next = None


class ShardRows:
    """Images of shards by number, for a sample of them: a block is opened when one of its images is wanted.

    Args:
        shards: The blocks.
        open_blocks: How many are held.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None

    def __init__(self, shards: Shards, open_blocks: int) -> None:
        self.name, self.fingerprint, self._shards = shards.name, shards.fingerprint, shards
        self._open = lru_cache(maxsize=open_blocks)(shards.open)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, i: int) -> Any:
        """Opens image i without decoding it."""
        reader, place = self._at(i)
        return reader.read(place)

    def describe(self, i: int) -> str:
        """Returns where image i is."""
        reader, place = self._at(i)
        return reader.describe(place)

    def _at(self, i: int) -> tuple[Reader, int]:
        block = int(self._shards.block_of(np.array(i)))
        return self._open(block), i - int(self._shards.first_K[block])


@dataclass(kw_only=True)
class StreamingImageSet(ImageSet):
    """A set of shards, decoded by threads as they arrive; there are no labels.

    An image that cannot be read is replaced by the next one of its block, or of the next block that is sound.

    Attributes:
        shards: The blocks.
        arguments: How they are read.
        peak_bytes: The most encoded bytes that a stream has held, as the index counts them.
    """

    shards: Shards
    arguments: DataArguments
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._substitute = lru_cache(maxsize=2)(self.shards.open)

    @property
    def fingerprint(self) -> str:
        """Changes when the shards do."""
        return self.shards.fingerprint

    def order(self, batch_size: int, seed: int) -> WindowOrder:
        """Returns the order in which a run takes the images."""
        return WindowOrder(
            self.shards.rows_K,
            self.shards.nbytes_K,
            batch_size=batch_size,
            lanes=self.arguments.stream_lanes,
            window_bytes=self._window_bytes,
            seed=seed,
        )

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """Returns a set of some of the images, those that can be read, decoded into memory."""
        workers = self.job.workers
        job = dataclasses.replace(
            self.job,
            source=ShardRows(self.shards, workers + 2),
            rows=torch.as_tensor(indices).cpu().numpy(),
            bound=default_bound(self.image_size),
            max_corrupt=max(self.job.max_corrupt, 0.5),  # a few damaged images are more of a sample than of the set
        )
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(ImageSet) if field.init}
        storage = Storage("memory")
        images = ImageSet(**known | {"job": job, "full_storage": storage, "square_storage": storage, "_on_device": {}})
        images.squares, tally = decode_to_memory(images.square_job)
        rows = np.delete(job.rows, [int(place) for place in tally.unreadable])
        images.job = dataclasses.replace(job, rows=rows)
        return images

    def sample(self, size: int, *key: int | str) -> ImageSet:
        """Returns a set of at most `size` images from some blocks at random, at least 32 if there are as many."""
        return self.subset(sample_of_blocks(self.shards, size, *key))

    def square_batches(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yields batches of squares (B, S, S, C), decoded ahead of time."""
        job, side, pinned = self.square_job, self.image_size, torch.device(device).type == "cuda"

        def begin(index_B: np.ndarray) -> tuple[Tensor, Fill]:
            shape = (len(index_B), side, side, job.preprocessing.num_channels)
            out = torch.empty(shape, dtype=getattr(torch, job.dtype), pin_memory=pinned)

            def fill(b: int, reader: Reader, place: int) -> str | None:
                image = decode(reader, place, job)
                if isinstance(image, str):
                    return image
                out.numpy()[b] = image.pixels
                return None

            return out, fill

        for squares_BHWC in self._decode(indices, lambda index_B: index_B, begin):
            yield squares_BHWC.to(device, non_blocking=True)

    def _views_of_crops(self, plans: Iterable[ViewPlan], device: torch.device) -> Iterator[Rendered]:
        plans, ahead = itertools.tee(plans)
        for plan, (crops, index_B) in zip(plans, self._crops(ahead, device), strict=True):
            crops = [x.to(device, non_blocking=True) for x in crops]
            yield render_groups(crops, plan, self.preprocessing), index_B

    def _crops(self, plans: Iterable[ViewPlan], device: torch.device) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        def begin(plan: ViewPlan) -> tuple[tuple[list[Tensor], np.ndarray], Fill]:
            outs = empty_crops(plan, self.job, device)

            def fill(b: int, reader: Reader, place: int) -> str | None:
                one = ViewPlan(plan.index_B[b : b + 1], plan.groups)
                crops = crop_file(place, reader, self.job, one)
                if isinstance(crops, str):
                    return crops
                write_crops(crops, b, outs)
                return None

            return (outs, plan.index_B), fill

        yield from self._decode(plans, lambda plan: plan.index_B, begin)

    def callable_views(
        self, plans: Iterable[CallablePlan], lists: Sequence[CallableViews], device: torch.device | str = "cpu"
    ) -> Iterator[Rendered]:
        """Yields the views that callables return; they are called in this process, which owns its random states."""

        def begin(plan: CallablePlan) -> tuple[tuple[list[Any], CallablePlan], Fill]:
            images: list[Any] = [None] * len(plan.index_B)

            def fill(b: int, reader: Reader, place: int) -> str | None:
                image = decode(reader, place, self.job)
                if isinstance(image, str):
                    return image
                images[b] = image.pixels
                return None

            return (images, plan), fill

        for images, plan in self._decode(plans, lambda plan: plan.index_B, begin):
            yield self._normalized(render_all(images, plan, lists), device), plan.index_B

    def _decode(
        self, items: Iterable[Any], index_of: Callable[[Any], np.ndarray], begin: Callable[[Any], tuple[Any, Fill]]
    ) -> Iterator[Any]:
        """Decodes one batch after the other, ahead of time.

        Args:
            items: What each batch wants.
            index_of: Returns the rows that it wants it of.
            begin: Returns the batch's result, and what decodes an image into a place of it or says why it cannot.
        """
        lanes = self.arguments.stream_lanes
        items, ahead = itertools.tee(items)
        budget = 2 * self._window_bytes // min(world_size(), lanes)
        buffer = BlockBuffer(self.shards, (index_of(item) for item in ahead), budget)
        pool = ThreadPoolExecutor(self.arguments.workers())
        pending: deque[tuple[Iterable[int], Any, list[Future[dict[int, str]]]]] = deque()
        try:
            while True:
                while len(pending) < _BATCHES_AHEAD and (taken := buffer.take()) is not None:
                    index_B, readers = taken
                    result, fill = begin(next(items))
                    starts = range(0, len(index_B), _TASK)
                    tasks = [pool.submit(self._fill_some, fill, index_B, start, readers) for start in starts]
                    pending.append((list(readers), result, tasks))
                if not pending:
                    return
                blocks, result, tasks = pending.popleft()
                for task in tasks:
                    self._note(task.result())
                buffer.release(blocks)
                self.peak_bytes = max(self.peak_bytes, buffer.peak)
                yield result
        finally:
            buffer.close()
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _window_bytes(self) -> int:
        return self.arguments.stream_window_mib * 2**20

    def _fill_some(
        self, fill: Fill, index_B: np.ndarray, start: int, readers: dict[int, Future[Reader]]
    ) -> dict[int, str]:
        """Decodes some rows of a batch; returns those that could not be read."""
        failures: dict[int, str] = {}
        for b in range(start, min(start + _TASK, len(index_B))):
            self._fill_one(fill, b, int(index_B[b]), readers, failures)
        return failures

    def _fill_one(
        self, fill: Fill, b: int, row: int, readers: dict[int, Future[Reader]], failures: dict[int, str]
    ) -> None:
        """Decodes a row, or the next one that can be read."""
        shards = self.shards
        home = int(shards.block_of(np.array(row)))
        place = row - int(shards.first_K[home])
        for block in (*range(home, len(shards.rows_K)), *range(home)):
            reader = readers[block].result() if block in readers else self._substitute(block)
            rows = int(shards.rows_K[block])
            for k in range(1 if isinstance(reader, DamagedBlock) else rows):
                i = (place + k) % rows
                failure = fill(b, reader, i)
                if failure is None:
                    return
                failures[int(shards.first_K[block]) + i] = failure
        raise too_many_unreadable(self.name, len(self), self.arguments.max_corrupt, list(failures.values()))

    def _note(self, failures: dict[int, str]) -> None:
        note_unreadable(self.failures, failures, self.name, len(self), self.arguments.max_corrupt)


def sample_of_blocks(shards: Shards, size: int, *key: int | str) -> np.ndarray:
    """Returns at most `size` rows from some blocks at random, in order: of many at random it would read as many."""
    blocks, rows = keyed_permutation(len(shards.rows_K), *key), np.empty(0, dtype=np.int64)
    each = -(-size // min(len(blocks), _SAMPLE_BLOCKS))
    for block in blocks:
        if len(rows) >= size:
            break
        own = keyed_permutation(int(shards.rows_K[block]), *key, int(block))[:each]
        rows = np.concatenate([rows, shards.first_K[block] + own])
    return np.sort(rows[:size])


def load_stream(
    arguments: DataArguments, split: str, *, name: str, num_channels: int = 3, like: Preprocessing | None = None
) -> ImageSet:
    """Indexes the shards of the training split; images are read when they are wanted.

    Args:
        arguments: Settings of the data.
        split: Name of the split.
        name: What results call the set.
        num_channels: Channels that the encoder takes.
        like: How pixels are treated; None measures it on a sample, once for all runs.

    Raises:
        InputError: The split is another, or its shards are not there or not readable.
    """
    if split != arguments.train_split:
        raise InputError(
            f"data.streaming: only {arguments.train_split!r} is streamed, not {split!r}, and no labels are read; to "
            "evaluate, name a set that is not streamed: evaluation_data.dataset, or data.streaming=false to evaluate"
        )
    shards = index_shards(list_shards(arguments, split), arguments, name)
    kind, statistics = _measure(shards, arguments, num_channels)
    preprocessing = like or preprocessing_of(arguments, kind, num_channels)
    if like is None and statistics is not None:
        preprocessing = dataclasses.replace(preprocessing, mean=statistics[0], std=statistics[1])
    return _image_set(shards, arguments, preprocessing, kind)


def _image_set(
    shards: Shards, arguments: DataArguments, preprocessing: Preprocessing, kind: PixelKind
) -> StreamingImageSet:
    job = DecodeJob(
        source=ShardRows(shards, 1),
        rows=np.arange(len(shards)),
        preprocessing=preprocessing,
        dtype=kept_dtype(preprocessing, kind),
        workers=arguments.workers(),
        max_corrupt=arguments.max_corrupt,
    )
    nowhere = Storage("on_the_fly")
    return StreamingImageSet(
        job=job,
        labels=None,
        class_names=None,
        preprocessing=preprocessing,
        name=shards.name,
        full_storage=nowhere,
        square_storage=nowhere,
        shards=shards,
        arguments=arguments,
    )


def _measure(shards: Shards, arguments: DataArguments, num_channels: int) -> tuple[PixelKind, Statistics | None]:
    """Finds kind and statistics of the pixels: as an earlier run measured them, else on a sample."""
    asked = f"{num_channels}-{arguments.image_size}-{arguments.value_range}-{arguments.crop_pct}"
    digest = hashlib.blake2b(f"{shards.fingerprint}/{asked}/{arguments.mean is None}".encode(), digest_size=12)
    path = arguments.cache_folder() / "shards" / f"{digest.hexdigest()}.json"
    try:
        known: dict[str, Any] = json.loads(path.read_text())
        return PixelKind.from_dict(known["kind"]), known["statistics"]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none yet, or a damaged one
    rows = ShardRows(shards, arguments.workers() + 2)
    few = sample_of_blocks(shards, _KIND_SAMPLE, "pixel kind")
    kind = measure_kind(((rows, int(row)) for row in few), wanted_range(arguments), num_channels, shards.name)
    statistics = None
    if arguments.mean is None:
        plain = preprocessing_of(arguments, kind, num_channels)
        sample = _image_set(shards, arguments, plain, kind).sample(_SAMPLE, "statistics")
        tally, squares = Tally(), sample.load_squares()
        assert squares is not None
        tally.add([squares[i] for i in range(len(squares))], plain)
        statistics = tally.statistics(plain)
    write_json(path, json.dumps({"kind": dataclasses.asdict(kind), "statistics": statistics}))
    return kind, statistics
