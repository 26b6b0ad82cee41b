"""Saving a checkpoint while training continues: the loop waits for a copy in memory, and a thread writes the copy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import TrainerControl, TrainerState

from hf_ssl_or.callbacks.base import SSLCallback
from hf_ssl_or.training.checkpoint import CheckpointStore, snapshot


class CheckpointCallback(SSLCallback):
    """Saves a checkpoint when one is due, in the background, and keeps the best one besides."""

    def __init__(self) -> None:
        self.best: tuple[float, str] | None = None

    def running(self, trainer: Any) -> BackgroundSaver:
        """Runs the thread that writes."""
        self.saver = BackgroundSaver(trainer.store)
        return self.saver

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint of an encoder whose measure decides which one is kept."""
        if (value := kwargs["metrics"].get(f"eval_{args.keep_best}")) is not None:
            self.best, control.should_save = (value, args.keep_best), True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Copies the state and has it written."""
        trainer, best = kwargs["trainer"], self.best
        self.best = None
        groups, values = trainer.checkpoint()
        if state.is_world_process_zero:
            self.saver.save(state.global_step, groups, values, best=best)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises what the last save raised, if it has ended."""
        self.saver.check()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Waits until the last checkpoint is on the disk."""
        self.saver.wait()


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
