"""A set that is read from its shards while a run trains: the next blocks in threads, never more than two windows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.decode import Statistics, Tally, decode, note_unreadable, stored_side, too_many_unreadable
from hf_ssl_or.data.images import ImageSet
from hf_ssl_or.data.order import WindowOrder
from hf_ssl_or.data.shards import DamagedBlock, OpenBlock, Shards, index_shards, write_json
from hf_ssl_or.data.sources import list_shards
from hf_ssl_or.distributed import world_size
from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import keyed_permutation

_CONNECTIONS = 8  # blocks that are read at a time
_ROWS_AHEAD = 2**18  # places of the order that are looked at ahead, at most
_BATCHES_AHEAD = 3  # batches that are decoded at a time
_TASK = 16  # images that a thread decodes at a time
_SAMPLE, _SAMPLE_BLOCKS = 4096, 32  # images that the statistics are measured on; blocks that a sample spreads over

Reader = OpenBlock | DamagedBlock


class BlockBuffer:
    """Opens blocks in threads before they are needed, and lets go of each after its last use in sight.

    It looks along the coming batches as far as their blocks fit into the budget. Only a batch that needs more than the
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
        """Gives the next batch's rows and blocks; None at the end, or until a batch is released."""
        self._look_ahead()
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
        self._look_ahead()

    def close(self) -> None:
        """Opens nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look_ahead(self) -> None:
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


@dataclass(kw_only=True)
class ShardedImageSet(ImageSet):
    """A set of shards, decoded by threads as they arrive; `images` is empty, (0, 3, S, S), and there are no labels.

    An image that cannot be read is replaced by the next one of its block, or of the next block that is sound.

    Attributes:
        shards: The blocks.
        arguments: How they are read.
        peak_bytes: The most encoded bytes that a stream has held, as the index counts them.
    """

    shards: Shards
    arguments: DataArguments
    peak_bytes: int = 0
    _failures: dict[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._substitute = lru_cache(maxsize=2)(self.shards.open)

    def __len__(self) -> int:
        return len(self.shards)

    def order(self, batch_size: int, seed: int) -> WindowOrder:
        """Gives the order in which a run takes the images."""
        return WindowOrder(
            self.shards.rows_K,
            self.shards.nbytes_K,
            batch_size=batch_size,
            lanes=self.arguments.stream_lanes,
            window_bytes=self._window_bytes,
            seed=seed,
        )

    def batch(self, index_B: Tensor | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Decodes images, block after block: few blocks are held, however many the images are in."""
        rows = torch.as_tensor(index_B).cpu().numpy()
        order = np.argsort(rows, kind="stable")
        borders = np.flatnonzero(np.diff(self.shards.block_of(rows[order]))) + 1
        images_BCHW = torch.cat(list(self.stream(np.split(rows[order], borders))))
        return images_BCHW[torch.from_numpy(np.argsort(order))].to(device)

    def subset(self, indices: Tensor | np.ndarray) -> ImageSet:
        """Gives a set of some of the images, decoded into memory; of many at random it reads as many blocks."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(ImageSet)}
        return ImageSet(**known | {"images": self.batch(indices)})

    def sample(self, size: int, *key: int | str) -> ImageSet:
        """Gives a set of at most `size` images from some blocks at random, at least 32 if there are as many."""
        blocks, rows = keyed_permutation(len(self.shards.rows_K), *key), np.empty(0, dtype=np.int64)
        each = -(-size // min(len(blocks), _SAMPLE_BLOCKS))
        for block in blocks:
            if len(rows) >= size:
                break
            own = keyed_permutation(int(self.shards.rows_K[block]), *key, int(block))[:each]
            rows = np.concatenate([rows, self.shards.first_K[block] + own])
        return self.subset(np.sort(rows[:size]))

    def to(self, device: torch.device | str) -> ImageSet:
        """Gives the set itself: it has no pixels to move."""
        return self

    def stream(self, indices: Iterable[np.ndarray], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Decodes one batch after the other, ahead of time."""
        lanes = self.arguments.stream_lanes
        buffer = BlockBuffer(self.shards, indices, 2 * self._window_bytes // min(world_size(), lanes))
        pool = ThreadPoolExecutor(self.arguments.workers())
        pinned = torch.device(device).type == "cuda"
        pending: deque[tuple[Iterable[int], Tensor, list[Future[dict[int, str]]]]] = deque()
        try:
            while True:
                while len(pending) < _BATCHES_AHEAD and (taken := buffer.take()) is not None:
                    pending.append(self._start(pool, *taken, pinned))
                if not pending:
                    return
                blocks, images_BCHW, tasks = pending.popleft()
                for task in tasks:
                    self._note(task.result())
                buffer.release(blocks)
                self.peak_bytes = max(self.peak_bytes, buffer.peak)
                yield images_BCHW.to(device, non_blocking=True)
        finally:
            buffer.close()
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _window_bytes(self) -> int:
        return self.arguments.stream_window_mib * 2**20

    def _start(
        self, pool: ThreadPoolExecutor, index_B: np.ndarray, readers: dict[int, Future[Reader]], pinned: bool
    ) -> tuple[Iterable[int], Tensor, list[Future[dict[int, str]]]]:
        """Begins to decode a batch: gives its blocks, the tensor that is being filled, and the tasks that fill it."""
        shape = (len(index_B), *self.images.shape[1:])
        images_BCHW = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        out = images_BCHW.numpy()
        tasks = [
            pool.submit(self._decode, index_B[start : start + _TASK], out[start : start + _TASK], readers)
            for start in range(0, len(index_B), _TASK)
        ]
        return list(readers), images_BCHW, tasks

    def _decode(self, rows: np.ndarray, out: np.ndarray, readers: dict[int, Future[Reader]]) -> dict[int, str]:
        """Decodes rows into `out`; gives those that could not be read."""
        failures: dict[int, str] = {}
        for k, row in enumerate(rows.tolist()):
            out[k] = self._image(row, readers, failures)
        return failures

    def _image(self, row: int, readers: dict[int, Future[Reader]], failures: dict[int, str]) -> np.ndarray:
        """Decodes a row, or the next one that can be read."""
        shards = self.shards
        home = int(shards.block_of(np.array(row)))
        place = row - int(shards.first_K[home])
        for block in (*range(home, len(shards.rows_K)), *range(home)):
            reader = readers[block].result() if block in readers else self._substitute(block)
            rows = int(shards.rows_K[block])
            for k in range(1 if isinstance(reader, DamagedBlock) else rows):
                i = (place + k) % rows
                image = decode(reader, i, self.source_size)
                if isinstance(image, np.ndarray):
                    return image
                failures[int(shards.first_K[block]) + i] = image
        raise too_many_unreadable(self.name, len(self), self.arguments.max_corrupt, list(failures.values()))

    def _note(self, failures: dict[int, str]) -> None:
        note_unreadable(self._failures, failures, self.name, len(self), self.arguments.max_corrupt)


def load_stream(arguments: DataArguments, split: str, *, name: str, statistics: Statistics | None = None) -> ImageSet:
    """Indexes the shards of the training split; images are read when they are wanted.

    Args:
        arguments: Settings of the data.
        split: Name of the split.
        name: What results call the set.
        statistics: Mean and standard deviation; None measures them on a sample, once for all runs.

    Raises:
        InputError: The split is another, or its shards are not there or not readable.
    """
    if split != arguments.train_split:
        raise InputError(
            f"data.streaming: only {arguments.train_split!r} is streamed, not {split!r}, and no labels are read; to "
            "judge, name a set that is not streamed: evaluation_data.dataset, or data.streaming=false to evaluate"
        )
    shards = index_shards(list_shards(arguments, split), arguments, name)
    side, statistics = _measure(shards, arguments, statistics)
    return _image_set(shards, arguments, side, statistics)


def _image_set(shards: Shards, arguments: DataArguments, side: int, statistics: Statistics) -> ShardedImageSet:
    return ShardedImageSet(
        images=torch.empty(0, 3, side, side, dtype=torch.uint8),
        labels=None,
        class_names=None,
        mean=statistics[0],
        std=statistics[1],
        name=shards.name,
        fingerprint=shards.fingerprint,
        image_size=arguments.image_size,
        shards=shards,
        arguments=arguments,
    )


def _measure(shards: Shards, arguments: DataArguments, statistics: Statistics | None) -> tuple[int, Statistics]:
    """Finds side and statistics of the images: as given, else as an earlier run measured them, else on a sample."""
    path = (
        arguments.cache_folder()
        / "shards"
        / f"{shards.fingerprint}-{arguments.image_size}-{arguments.cache_size}.json"
    )
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    found = dict(known)
    if "side" not in found:
        found["side"] = arguments.cache_size or _natural_side(shards, arguments.image_size)
    side = int(found["side"])
    if statistics is None and "mean" not in found:
        sample = _image_set(shards, arguments, side, ((0.0,) * 3, (1.0,) * 3)).sample(_SAMPLE, "statistics")
        tally = Tally()
        tally.add(sample.images.numpy())
        found["mean"], found["std"] = tally.statistics()
    if found != known:
        write_json(path, json.dumps(found))
    return side, statistics or (tuple(found["mean"]), tuple(found["std"]))


def _natural_side(shards: Shards, image_size: int) -> int:
    for block in keyed_permutation(len(shards.rows_K), "side"):
        if isinstance(reader := shards.open(int(block)), OpenBlock):
            return stored_side(reader, np.arange(reader.rows), image_size)
    return image_size
