from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from hf_ssl_or.errors import InputError
from hf_ssl_or.training.lock import RunLock


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with pytest.raises(InputError, match=f"run: in use by process {os.getpid()} on .*; wait"):
            RunLock(tmp_path / "run")
        RunLock(tmp_path / "other").release()
    lock = RunLock(tmp_path / "run")
    lock.release()
    lock.release()
    RunLock(tmp_path / "run").release()


def hold_and_fork(run_dir: Path, worker) -> None:
    lock = RunLock(run_dir)
    child = os.fork()
    if child:
        worker.value = child
    time.sleep(60)
    lock.release()


def test_a_killed_run_lets_go_even_if_its_workers_live_on(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")  # starts at once, without importing torch anew
    worker = fork.Value("i", 0, lock=False)
    process = fork.Process(target=hold_and_fork, args=(tmp_path, worker))
    process.start()
    while not worker.value:
        assert process.is_alive()
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid}"):
            RunLock(tmp_path)
        process.kill()
        process.join()
        os.kill(worker.value, 0)  # the worker lives
        RunLock(tmp_path).release()
    finally:
        os.kill(worker.value, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="run: cannot be locked"):
        RunLock(tmp_path / "run")
