"""The processes of one run, one after the other: training, then evaluation on other data sets."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_ssl_or.runs.labels import printable
from hf_ssl_or.sweeps.gather import TRANSFER, command_problem, is_trained, is_transferred, run_folder
from hf_ssl_or.sweeps.plan import Arm, Plan
from hf_ssl_or.sweeps.root import ARM

_SET_DEATH_SIGNAL = 1  # of Linux' prctl
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def stages(plan: Plan, root: Path, arm: Arm, seed: int) -> list[list[str]]:
    """Returns the command lines that a run still needs, in order, `hf-ssl-or` first; none for a finished run."""
    folder, lines = run_folder(root, arm, seed), []
    if not is_trained(arm, seed, folder):
        if arm.command is not None:
            words = [word.replace("{output}", str(folder)).replace("{seed}", str(seed)) for word in arm.command]
            return [words]
        recipe = str(root / arm.name / ARM)
        lines.append(["hf-ssl-or", "train", recipe, f"training.seed={seed}", "--output", str(folder), "--resume"])
    if arm.recipe is not None and plan.datasets and (lines or not is_transferred(plan, folder)):
        line = ["hf-ssl-or", "evaluate", str(folder), "--datasets", ",".join(plan.datasets)]
        protocols = [] if plan.protocols is None else ["--protocols", ",".join(plan.protocols)]
        lines.append([*line, *protocols, "--output", str(folder / TRANSFER)])
    return lines


def shell_line(lines: Sequence[Sequence[str]]) -> str:
    """Returns command lines as one line of a shell."""
    return " && ".join(shlex.join(line) for line in lines)


def start_process(line: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a command line whose output goes to a file; it is killed when this process dies in whatever way."""
    words = [sys.executable, "-m", "hf_ssl_or", *line[1:]] if line[0] == "hf-ssl-or" else list(line)
    with log.open("ab") as file:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C reaches the sweep alone, which then asks its runs to stop
            preexec_fn=die_with_parent,
        )


def die_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, so that no run outlives a killed sweep."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


class Running:
    """A run that goes on.

    Args:
        plan: The sweep.
        root: Its folder.
        arm: The arm.
        seed: The seed.
        threads: Threads of each process; None leaves what the environment says.
    """

    def __init__(self, plan: Plan, root: Path, arm: Arm, seed: int, threads: int | None) -> None:
        self.arm, self.seed, self.started = arm, seed, time.monotonic()
        self.folder = run_folder(root, arm, seed)
        self.log = self.folder.with_suffix(".log")
        self._lines = stages(plan, root, arm, seed)
        self._environment = os.environ | ({} if threads is None else dict.fromkeys(_THREADS, str(threads)))
        self.failure: str | None = None
        if arm.command is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._begin()

    def _begin(self) -> None:
        self._from = self.log.stat().st_size if self.log.exists() else 0
        try:
            self._process = start_process(self._lines.pop(0), self.log, self._environment)
        except OSError as error:
            self.failure = f"{error.filename}: {error.strerror}"

    def has_ended(self) -> bool:
        """Says whether all processes have ended, or one has failed; starts the next one."""
        if self.failure is not None:
            return True
        status = self._process.poll()
        if status is None:
            return False
        if status == 0 and self._lines:
            self._begin()
            return False
        if status:
            self.failure = self._reason(status)
        else:
            self.failure = command_problem(self.arm, self.folder)
        return True

    def _reason(self, status: int) -> str:
        """Returns the last line of the command line's own, or of anything, that the process has written."""
        with self.log.open("rb") as file:
            file.seek(self._from)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("hf-ssl-or: ")]
        said = (own or lines or ["it said nothing"])[-1].removeprefix("hf-ssl-or: ").removeprefix("error: ")
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"{how}: {printable(said)}"

    def stop(self) -> None:
        """Asks the process to save its state and end."""
        if self.failure is None and self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        """Waits for the process to end."""
        if self.failure is None:
            self._process.wait()
