"""The order of a run's images: which of them a step takes, as a function of (seed, step) and nothing else."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from hf_ssl_or.errors import InputError
from hf_ssl_or.randomness import keyed_permutation

_MIB = 2**20


class Order(Protocol):
    """Which images a step takes.

    Attributes:
        steps_per_epoch: Steps in one pass over the images; an incomplete last batch is dropped.
    """

    steps_per_epoch: int

    def indices(self, step: int, first: int, size: int) -> np.ndarray:
        """Returns the indices at places first, ..., first + size - 1 of a step's global batch (int64)."""
        ...


class ShuffledOrder:
    """An epoch is a permutation of all images, keyed by (seed, epoch).

    Args:
        n: Images.
        batch_size: Images per step over all processes.
        seed: Seed of the run.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.steps_per_epoch, self._batch_size = n // batch_size, batch_size
        self._permutation = lru_cache(maxsize=2)(lambda epoch: keyed_permutation(n, seed, "order", epoch))

    def indices(self, step: int, first: int, size: int) -> np.ndarray:
        """Returns the indices at places first, ..., first + size - 1 of a step's global batch (int64)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self._batch_size + first
        return self._permutation(epoch)[start : start + size]


class WindowOrder:
    """An order for images that lie in blocks, of which only a few fit into memory.

    An epoch is the blocks in an order keyed by (seed, epoch), with the rows of each shuffled, as one long line. Its
    first `steps * batch_size` places are cut into equal lanes, and lane l fills the l-th part of every batch. A lane
    goes through its part in windows of whole blocks, and the rows of a window come in an order of their own. So a
    batch needs blocks of the current windows alone, process r of N those of its lanes alone if N divides the lanes,
    and no number of processes changes what a step takes.

    This is no uniform permutation. Which blocks meet in a window, and when, is uniform, and within a window the rows
    are shuffled uniformly; but the rows of a block all come in one window (or two, where lanes meet in it). With
    blocks in which all images are alike (a set sorted by class), a batch holds at most as many kinds as the windows
    hold blocks.

    Args:
        rows_K: Rows of each block, each at least 1.
        nbytes_K: Bytes of each block in memory.
        batch_size: Images per step over all processes.
        lanes: Parts of a batch that go through the blocks side by side.
        window_bytes: Bytes of the windows of all lanes together.
        seed: Seed of the run.

    Raises:
        InputError: The lanes do not divide the batch, or a lane's window cannot hold the largest block.
    """

    def __init__(
        self, rows_K: np.ndarray, nbytes_K: np.ndarray, *, batch_size: int, lanes: int, window_bytes: int, seed: int
    ) -> None:
        if batch_size % lanes:
            raise InputError(
                f"data.stream_lanes: {lanes} does not divide training.batch_size {batch_size}; take a divisor"
            )
        if (largest := int(nbytes_K.max())) > window_bytes // lanes:
            raise InputError(
                f"data.stream_window_mib: {window_bytes // _MIB} MiB for {lanes} lanes do not hold a row group of "
                f"{largest / _MIB:.1f} MiB each; set at least {-(-largest * lanes // _MIB)}, or fewer "
                "data.stream_lanes, or write the set with smaller row groups"
            )
        self._rows_K, self._nbytes_K, self._seed = rows_K, nbytes_K, seed
        self._first_K = np.cumsum(rows_K) - rows_K
        self.steps_per_epoch = int(rows_K.sum()) // batch_size
        self._share, self._window_bytes = batch_size // lanes, window_bytes // lanes
        self._epoch = lru_cache(maxsize=2)(self._lay_out)
        self._bounds = lru_cache(maxsize=4 * lanes)(self._cut)
        self._window = lru_cache(maxsize=4 * lanes)(self._shuffle)

    def indices(self, step: int, first: int, size: int) -> np.ndarray:
        """Returns the indices at places first, ..., first + size - 1 of a step's global batch (int64)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        parts = []
        for lane in range(first // self._share, -(-(first + size) // self._share)):
            start = max(first - lane * self._share, 0)
            stop = min(first + size - lane * self._share, self._share)
            parts.append(self._from_lane(epoch, lane, place * self._share + start, place * self._share + stop))
        return np.concatenate(parts)

    def _from_lane(self, epoch: int, lane: int, start: int, stop: int) -> np.ndarray:
        """Returns the rows at places start, ..., stop - 1 of a lane."""
        bounds = self._bounds(epoch, lane)
        parts, window = [], int(np.searchsorted(bounds, start, side="right")) - 1
        while start < stop:
            first, end = int(bounds[window]), min(int(bounds[window + 1]), stop)
            parts.append(self._window(epoch, lane, window)[start - first : end - first])
            start, window = end, window + 1
        return np.concatenate(parts)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an epoch's order of blocks, and where in the long row each ends."""
        order_K = keyed_permutation(len(self._rows_K), self._seed, "blocks", epoch)
        return order_K, np.cumsum(self._rows_K[order_K])

    def _cut(self, epoch: int, lane: int) -> np.ndarray:
        """Returns the places of a lane at which its windows begin, and its length."""
        order_K, ends_K = self._epoch(epoch)
        length = self.steps_per_epoch * self._share
        start, stop = lane * length, (lane + 1) * length
        bounds, held = [0], 0
        for k in range(int(np.searchsorted(ends_K, start, side="right")), len(order_K)):
            begin = int(ends_K[k - 1]) if k else 0
            if begin >= stop:
                break
            size = int(self._nbytes_K[order_K[k]])
            if held + size > self._window_bytes:
                bounds.append(begin - start)
                held = 0
            held += size
        return np.array([*bounds, length])

    def _shuffle(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Returns the rows of a window in their order."""
        order_K, ends_K = self._epoch(epoch)
        bounds = self._bounds(epoch, lane)
        start, stop = (lane * int(bounds[-1]) + int(bounds[window + i]) for i in (0, 1))
        parts = []
        for k in range(int(np.searchsorted(ends_K, start, side="right")), len(order_K)):
            block, end = int(order_K[k]), int(ends_K[k])
            begin = end - int(self._rows_K[block])
            if begin >= stop:
                break
            rows = keyed_permutation(end - begin, self._seed, "rows", epoch, block)  # a cut takes any, not the first
            parts.append(self._first_K[block] + rows[max(start - begin, 0) : stop - begin])
        rows = np.concatenate(parts)
        return rows[keyed_permutation(len(rows), self._seed, "window", epoch, lane, window)]
