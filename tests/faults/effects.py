"""What goes wrong inside a run: each is called in the run's process before the command line starts.

They act on the process from its edges (audit hooks, limits, signals, clocks); where a fault has no edge, as a NaN in a
batch has none, one function of the package is wrapped.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

_CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def touches(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Says whether an audited event is about to change, or open, a file of a folder."""
    if event not in _CHANGING and event != "open":
        return False
    return isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(folder)


def die_at_file_operation(folder: Path, number: int) -> None:
    """Kills the process (SIGKILL) just before its n-th operation on a file of the folder, counted from 0."""
    count = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if touches(event, arguments, str(folder)) and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_file_operations(folder: Path, output: Path) -> None:
    """Writes how many operations on files of the folder there were so far, one letter each."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if touches(event, arguments, str(folder)):
            os.write(descriptor, b".")

    sys.addaudithook(hook)


def signal_at_operation(kind: str, part: str, number: signal.Signals, rank: int = 0) -> None:
    """Sends a signal to one process once, just before an operation of a kind on a path that contains `part`."""
    if os.environ.get("RANK", "0") != str(rank):
        return
    waiting = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if waiting and event == kind and part in str(arguments[0]):
            waiting.clear()
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def fill_disk_at(part: str, ballast: Path) -> None:
    """Fills the disk to its last byte just before a file whose path contains `part` is opened."""
    waiting = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if waiting and event == "open" and part in str(arguments[0]):
            waiting.clear()
            descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while os.write(descriptor, bytes(4096)):
                    pass

    sys.addaudithook(hook)


def limit_file_size(number_of_bytes: int) -> None:
    """Lets the kernel refuse every write beyond this size of a file: EFBIG, as a quota or a file system may."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (number_of_bytes, number_of_bytes))


def slow_disk(seconds: float) -> None:
    """Makes each wait for the disk take longer."""
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        real(descriptor)

    os.fsync = slow


def jumping_clock(seconds: float) -> None:
    """Makes the time of day go backwards at each reading."""
    real, jumps = time.time, itertools.count(1)
    time.time = lambda: real() - seconds * next(jumps)


def nan_in_batch(step: int) -> None:
    """Puts a NaN into one pixel of the batch of a step."""
    from hf_ssl_or.data.loader import ViewLoader

    real = ViewLoader._batch

    def damaged(self: ViewLoader, at: int, *rest: Any) -> Any:
        batch = real(self, at, *rest)
        if at == step:
            batch.views_VBCHW[0, 0, 0, 0, 0] = float("nan")
        return batch

    ViewLoader._batch = damaged  # type: ignore[method-assign]


def nan_in_gradient(step: int) -> None:
    """Lets the loss of a step be finite and its gradient not, as the root of zero does."""
    from hf_ssl_or.training.trainer import SSLTrainer

    real = SSLTrainer.training_step

    def damaged(self: SSLTrainer, batch: Any) -> Any:
        parameter = next(self.method.encoder.parameters())
        handle = parameter.register_hook(lambda grad: grad * float("nan") if batch.step == step else grad)
        try:
            return real(self, batch)
        finally:
            handle.remove()

    SSLTrainer.training_step = damaged  # type: ignore[method-assign]


def streamed_images() -> None:
    """Decodes images anew in each step, in worker processes, as for sets that do not fit into memory."""
    from hf_ssl_or.data import loading

    loading._MEMORY_BYTES = 0


def kill_a_worker_at(step: int) -> None:
    """Kills a process that decodes images just before a step."""
    from hf_ssl_or.training.trainer import SSLTrainer

    real = SSLTrainer.training_step

    def then(self: SSLTrainer, batch: Any) -> Any:
        if batch.step == step:
            worker = multiprocessing.active_children()[0]
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        return real(self, batch)

    SSLTrainer.training_step = then  # type: ignore[method-assign]


def die_at_step(step: int, rank: int = 0) -> None:
    """Kills one process of a run at a step, before it meets the others."""
    from hf_ssl_or.training.trainer import SSLTrainer

    if os.environ.get("RANK", "0") != str(rank):
        return
    real = SSLTrainer.training_step

    def then(self: SSLTrainer, batch: Any) -> Any:
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)

    SSLTrainer.training_step = then  # type: ignore[method-assign]
