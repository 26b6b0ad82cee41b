"""Being asked to stop: the step is finished, the state saved, and the run can be resumed. Or having lost a process."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

AGREE_EVERY = 8  # steps between two agreements of several processes: each costs one small all-reduce
_LOST = re.compile(r"[Cc]onnection (?:closed|reset|refused)[\w ]*|[Bb]roken pipe|[Tt]imed out|gloo|NCCL")


class TrainingInterrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT), or lost a process; resuming continues from what is saved."""


@contextmanager
def peer_failure() -> Iterator[None]:
    """Says in one line that another process of the run has ended, which torch says in a traceback of its own.

    Raises:
        TrainingInterrupted: Gloo or NCCL could not reach another process.
    """
    try:
        yield
    except RuntimeError as error:
        lost = _LOST.search(str(error))
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or lost is None:
            raise
        where, what = f"process {os.environ.get('RANK', '0')}", "another process of this run has ended"
        raise TrainingInterrupted(f"{where}: {what} or cannot be reached ({lost[0]}) and says why") from error


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish that the loop asks for after each step; a second one acts as usual."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None
        self.asked_by_signal = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])

    def asked(self, done: int, by_callback: bool = False, *, agree: bool = False) -> bool:
        """Says whether to stop after `done` steps; the same answer on every process.

        Args:
            done: Finished steps.
            by_callback: Whether a callback of this process asks for it.
            agree: Asks the other processes now; else they agree at every eighth step.
        """
        wishes = torch.tensor([float(self.signal is not None), float(by_callback)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            if done % AGREE_EVERY and not agree:
                return False
            wishes = self.accelerator.reduce(wishes, "sum")
        signaled, ended = (wishes > 0).tolist()
        self.asked_by_signal = bool(signaled)
        return bool(signaled or ended)

    @property
    def name(self) -> str:
        """Name of the signal that asked, say "SIGTERM"; of another process's, "a signal to another process"."""
        return signal.Signals(self.signal).name if self.signal else "a signal to another process"
