"""Pushes a run while it trains: each checkpoint by a process of its own, of low priority, that no step waits for.

A thread looks once a second for a checkpoint that has appeared. While one is being pushed, newer ones wait, and of
those only the newest is pushed next. The pushing process reads the checkpoint's files from the disk; it shares neither
memory nor device nor interpreter with the training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.push import check_destination, push_folder, push_to_hub
from hf_ssl_or.hub.redaction import mask
from hf_ssl_or.hub.run_folder import Statements, run_at_checkpoint
from hf_ssl_or.hub.upload_queue import Destination

_LOOK_EVERY = 1.0  # seconds
_STATE = ("method.safetensors", "state.json")
_WORK, LOG = ".push", "push.log"


@contextmanager
def pushing_checkpoints(run_folder: Path, repo_id: str, save_encoder: Callable[[Path], None]) -> Iterator[None]:
    """Pushes the checkpoints that appear in a run's folder; what became of them is written to its `push.log`.

    Args:
        run_folder: The run.
        repo_id: The repository, "owner/name".
        save_encoder: Writes the run's encoder, with whatever weights it has now, into a folder.
    """
    work = run_folder / _WORK
    shutil.rmtree(work, ignore_errors=True)
    save_encoder(work / "template")
    watcher = _Watcher(run_folder, repo_id)
    watcher.start()
    try:
        yield
    except BaseException:
        watcher.stop(kill=True)
        raise
    else:
        watcher.stop(kill=False)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def push_finished(run_folder: Path, repo_id: str) -> None:
    """Pushes a run that has ended; a failure does not undo the run. What became of it is written to its `push.log`."""
    try:
        line = push_to_hub(run_folder, repo_id).describe()
    except InputError as error:
        line = f"not pushed: {error}"
    with open(run_folder / LOG, "a", encoding="utf-8") as log:
        log.write(f"{mask(line)}\n")


class _Watcher(threading.Thread):
    def __init__(self, run_folder: Path, repo_id: str) -> None:
        super().__init__(name="push", daemon=True)
        self.run_folder, self.repo_id = run_folder, repo_id
        self.last = _newest(run_folder)
        self.stopping = threading.Event()
        self.process: subprocess.Popen | None = None

    def run(self) -> None:
        """Starts a process for each new checkpoint, one at a time."""
        while not self.stopping.wait(_LOOK_EVERY):
            if self.process is not None and self.process.poll() is None:
                continue
            newest = _newest(self.run_folder)
            if newest > self.last and self._take(newest):
                self.last = newest
                self.process = self._start()

    def stop(self, *, kill: bool) -> None:
        """Ends the watch; a push under way is waited for, or is left to the outbox."""
        self.stopping.set()
        self.join()
        if self.process is not None:
            if kill:
                self.process.terminate()
            self.process.wait()

    def _take(self, step: int) -> bool:
        """Links a checkpoint's files, so that they stay when the trainer prunes it; False if it just did."""
        taken = self.run_folder / _WORK / "checkpoint"
        shutil.rmtree(taken, ignore_errors=True)
        taken.mkdir()
        try:
            for name in _STATE:
                _link(self.run_folder / "checkpoints" / f"step-{step}" / name, taken / name)
        except FileNotFoundError:
            return False
        return True

    def _start(self) -> subprocess.Popen:
        distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in distributed}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "hf_ssl_or.hub.background", str(self.run_folder.resolve()), self.repo_id]
        with open(self.run_folder / LOG, "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(file, to)


def _newest(run_folder: Path) -> int:
    """Returns the step of the newest checkpoint, 0 for none; one that is being written has another name."""
    names = [path.name.removeprefix("step-") for path in (run_folder / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def main(run_folder: Path, repo_id: str) -> str:
    """Pushes the checkpoint that the watcher took; gives a line for the log."""
    work = run_folder / _WORK
    step = json.loads((work / "checkpoint" / "state.json").read_text(encoding="utf-8"))["step"]
    to = Destination(repo_id=check_destination(repo_id), message=f"Upload encoder after step {step}")
    try:
        with run_at_checkpoint(run_folder, work / "checkpoint", work / "template") as source:
            result = push_folder(run_folder, source, to, Statements())
    except InputError as error:
        return f"step {step}: {error}"
    return f"step {step}: {result.describe()}"


if __name__ == "__main__":
    os.nice(19)
    print(mask(main(Path(sys.argv[1]), sys.argv[2])), flush=True)  # noqa: T201 - into push.log
