"""Saving a checkpoint while training continues: the loop waits for a copy in memory, and a thread writes the copy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from hf_ssl_or.training.checkpoint import CheckpointStore, snapshot


class BackgroundSaver:
    """Saves one checkpoint at a time; as a context it does not end before the last one is written.

    Args:
        store: Where checkpoints go.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copy: dict[str, dict[str, Tensor]] = {}

    def save(
        self,
        step: int,
        groups: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        best: tuple[float, str] | None = None,
    ) -> None:
        """Copies the state, and returns while it is being written. Waits for the save before this one.

        Args:
            step: Number of finished steps.
            groups: As for `CheckpointStore.save`.
            state: Likewise.
            best: A value and its name, for `CheckpointStore.mark_best`.

        Raises:
            InputError: The save before this one failed.
        """
        self.wait()
        self._copy = snapshot(groups, into=self._copy)
        self._pending = self._thread.submit(self._write, step, state, best)

    def _write(self, step: int, state: dict[str, Any], best: tuple[float, str] | None) -> None:
        self.store.write(step, self._copy, state)
        if best is not None:
            self.store.mark_best(step, *best)

    def check(self) -> None:
        """Raises what the last save raised, if it has ended; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
            InputError: It failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
