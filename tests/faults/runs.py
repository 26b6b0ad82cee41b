"""Tiny runs as real processes: started, hit by a fault at an instant, resumed, and compared with an undisturbed one.

Importing torch takes longer than the run, so processes are forked from a server that has imported everything (the
standard library's fork server). Each is a process of its own session with the real command line, files and signals.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
STEPS = 20
RECIPE: dict[str, Any] = {
    "data": {"dataset": "shapes", "image_size": 16, "shapes_train": 96, "shapes_test": 0, "num_workers": 1},
    "encoder": {
        "name": "resnet18",
        "stem": "small",
        "channels": [8, 8, 16, 16],
        "model_args": {"layers": [1, 1, 1, 1]},
    },
    # A teacher, a predictor and their statistics are part of the state.
    "method": {"name": "byol", "projector_dim": 32, "projector_hidden": 64, "predictor_hidden": 64},
    "views": {"count": 2},
    "orthogonality": {"penalty": "srip", "weight": 1e-3},  # its vectors too
    "training": {
        "batch_size": 16,
        "max_steps": STEPS,
        "log_every": 1,
        "monitor_every": 2,
        "monitor_images": 32,
        "save_steps": 3,
        "device": "cpu",
        "optimizer": {"name": "adamw", "lr": 0.003},
    },
}
TIMING = {"images_per_second", "data_wait_percent"}
GROUPS = ("method", "optimizer", "orthogonality")

Fault = Callable[[], None]


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """Writes the tiny recipe, with settings of sections replaced."""
    tree = {name: {**section, **sections.get(name, {})} for name, section in RECIPE.items()}
    path.write_text(yaml.safe_dump(tree))
    return path


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit status of each process (-9 for SIGKILL), and what all of them wrote to stderr."""

    statuses: list[int]
    errors: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What the command line said in the end: its own lines, one per problem."""
        return [line for line in self.errors.splitlines() if line.startswith("hf-ssl-or: ")]


class Started:
    """A run that goes on, of one or several processes.

    Args:
        arguments: Of the command line, after `hf-ssl-or`.
        log: File for stderr of all processes.
        processes: Number of processes, which find each other as torchrun's do.
        faults: Called in each process before it starts, with effects of their own.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        log: Path,
        *,
        processes: int = 1,
        faults: Sequence[Fault] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log, self.started = log, time.monotonic()
        context = server()
        self.processes: list[BaseProcess] = []
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        for rank in range(processes):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            variables = {"HF_SSL_OR_CACHE": str(log.parent / "cache"), **own, **(environment or {})}
            line = [str(argument) for argument in arguments]
            process = context.Process(target=_be_a_run, args=(line, variables, str(log), list(faults)))
            process.start()
            self.processes.append(process)

    def kill(self, number: signal.Signals = signal.SIGKILL, rank: int | None = None) -> None:
        """Sends a signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 90.0) -> Ended:
        """Waits for the end; what still runs after `timeout` seconds is killed and is an error."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process.pid for process in self.processes if process.is_alive()]
        self.kill()
        for process in self.processes:
            process.join()
        errors = self.log.read_text() if self.log.exists() else ""
        assert not late, f"processes {late} did not end within {timeout} s:\n{errors[-3000:]}"
        statuses = [int(process.exitcode or 0) for process in self.processes]
        return Ended(statuses, errors, time.monotonic() - self.started)

    def wait_for(self, event: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Waits until something has happened; False if the run ended before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if event():
                return True
            if not any(process.is_alive() for process in self.processes):
                return event()
            time.sleep(0.0005)
        raise AssertionError(f"nothing happened within {timeout} s:\n{self.log.read_text()[-3000:]}")


def run(arguments: Sequence[object], log: Path, *, timeout: float = 90.0, **more: Any) -> Ended:
    """Starts a run and waits for its end."""
    return Started(arguments, log, **more).wait(timeout)


def server() -> multiprocessing.context.ForkServerContext:
    """Gives the context whose processes start with everything imported."""
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


def _be_a_run(arguments: list[str], variables: dict[str, str], log: str, faults: list[Fault]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    sys.argv = ["hf-ssl-or", *arguments]
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in any program
    for fault in faults:
        fault()
    from hf_ssl_or.cli import main

    sys.exit(main(arguments))


def free_port() -> int:
    """Finds a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- comparing ends ---------------------------------------------------------------------------------------------------


def differences(folder: Path, whole: Path) -> list[str]:
    """Lists in what the end of a run differs from another's, bit by bit; times of day and speeds apart."""
    found = []
    tensors = ["encoder/model", *(f"checkpoints/step-{STEPS}/{group}" for group in GROUPS)]
    for name in tensors:
        found += _array_differences(
            name, load_file(folder / f"{name}.safetensors"), load_file(whole / f"{name}.safetensors")
        )
    spectra = sorted(path.name for path in (whole / "spectra").iterdir())
    for name in spectra:
        with np.load(folder / "spectra" / name) as ours, np.load(whole / "spectra" / name) as theirs:
            found += _array_differences(f"spectra/{name}", dict(ours), dict(theirs))
    for name, read in (("metrics.jsonl", metrics), ("state.json", _state), ("results.json", _results)):
        if read(folder) != read(whole):
            found.append(f"{name} differs")
    left = [path.name for path in folder.rglob("*") if ".tmp" in path.name or path.name.startswith(".old")]
    return found + [f"{name} was left behind" for name in left]


def _array_differences(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    if ours.keys() != theirs.keys():
        return [f"{name}: {sorted(ours.keys() ^ theirs.keys())} in one only"]
    return [f"{name}: {key} differs" for key in ours if ours[key].tobytes() != theirs[key].tobytes()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the log without what depends on time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def _state(folder: Path) -> Any:
    return json.loads((folder / "checkpoints" / f"step-{STEPS}" / "state.json").read_text())


def _results(folder: Path) -> Any:
    results = json.loads((folder / "results.json").read_text())
    results["run"].pop("train_seconds_this_session")
    return {key: value for key, value in results.items() if key != "environment"}
