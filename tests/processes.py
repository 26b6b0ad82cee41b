"""Processes that start with everything imported: one, or several that find each other as torchrun's do.

Importing torch and transformers takes longer than what most tests let a process do, so processes are forked from a
server that has imported everything (the standard library's fork server). Each is a process of its own session with
real files and signals, one thread, and otherwise the environment of whoever starts it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent


@dataclass(frozen=True)
class Ended:
    """How processes ended: the exit status of each (-9 for SIGKILL), and what all of them wrote to stderr."""

    statuses: list[int]
    errors: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What the command line said in the end: its own lines, one per problem."""
        return [line for line in self.errors.splitlines() if line.startswith("hf-ssl-or: ")]


class Processes:
    """Processes that go on.

    Args:
        target: Called in each.
        arguments: Of the target; all of this is pickled.
        log: File for stderr of all; stdout is beside it, with `.out` at its end.
        count: Number of processes.
        environment: What else is in their environment.
    """

    def __init__(
        self,
        target: Callable[..., object],
        *arguments: object,
        log: Path,
        count: int = 1,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log, self.started = log, time.monotonic()
        context = server()
        self.processes: list[BaseProcess] = []
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        for rank in range(count):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **own, **(environment or {})}
            process = context.Process(target=_begin, args=(variables, str(log), target, arguments))
            process.start()
            self.processes.append(process)

    def kill(self, number: signal.Signals = signal.SIGKILL, rank: int | None = None) -> None:
        """Sends a signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 90.0, *, fail_together: bool = False) -> Ended:
        """Waits for the end; what still runs after `timeout` seconds is killed and is an error.

        Args:
            timeout: Seconds.
            fail_together: When a process fails, kill the others, as torchrun does.
        """
        deadline = time.monotonic() + timeout
        while alive := [process for process in self.processes if process.is_alive()]:
            if time.monotonic() > deadline or (fail_together and any(p.exitcode for p in self.processes)):
                break
            wait([process.sentinel for process in alive], max(0.0, deadline - time.monotonic()))
        late = [] if time.monotonic() < deadline else [p.pid for p in self.processes if p.is_alive()]
        self.kill()
        for process in self.processes:
            process.join()
        errors = self.log.read_text() if self.log.exists() else ""
        assert not late, f"processes {late} did not end within {timeout} s:\n{errors[-3000:]}"
        statuses = [int(process.exitcode or 0) for process in self.processes]
        return Ended(statuses, errors, time.monotonic() - self.started)

    def wait_for(self, event: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Waits until something has happened; False if the processes ended before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if event():
                return True
            if not any(process.is_alive() for process in self.processes):
                return event()
            time.sleep(0.0005)
        raise AssertionError(f"nothing happened within {timeout} s:\n{self.log.read_text()[-3000:]}")


def run_all(target: Callable[..., object], *arguments: object, log: Path, **more: Any) -> None:
    """Calls a function in each of several processes and waits until it has ended well in all."""
    ended = Processes(target, *arguments, log=log, **more).wait(600, fail_together=True)
    assert not any(ended.statuses), f"{ended.statuses}\n{ended.errors[-4000:]}"


def command_line(arguments: Sequence[str]) -> None:
    """Is a target: `hf-ssl-or`, from its arguments to its exit status."""
    sys.argv = ["hf-ssl-or", *arguments]
    from hf_ssl_or.cli import main

    sys.exit(main(list(arguments)))


def server() -> multiprocessing.context.ForkServerContext:
    """Returns the context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    variables = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        context.set_forkserver_preload(["warm"])
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _begin(variables: dict[str, str], log: str, target: Callable[..., object], arguments: Sequence[object]) -> None:
    os.setsid()
    for descriptor, path in ((1, f"{log}.out"), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in any program
    target(*arguments)


def free_port() -> int:
    """Finds a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
