"""Runs a sweep: what is missing of it, several runs at a time, whatever ended the call before."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hf_ssl_or.errors import InputError
from hf_ssl_or.report.sweep_page import write_sweep_report
from hf_ssl_or.runs import layout
from hf_ssl_or.runs.sweep_results import SweepResults
from hf_ssl_or.sweeps.gather import gather
from hf_ssl_or.sweeps.plan import Arm, Plan, read_plan
from hf_ssl_or.sweeps.processes import Running, shell_line, stages
from hf_ssl_or.sweeps.progress import Progress
from hf_ssl_or.sweeps.representations import add_representations, keep_representations
from hf_ssl_or.sweeps.root import prepare
from hf_ssl_or.training.lock import RunLock

_POLL = 0.1  # seconds


class SweepInterrupted(Exception):
    """The sweep was asked to stop (SIGTERM, SIGINT); the same call continues."""


def sweep(
    source: str | Path | Mapping[str, Any],
    output_dir: str | Path | None = None,
    *,
    jobs: int = 1,
    threads: int | None = None,
) -> SweepResults:
    """Runs what is missing of a sweep, gathers all of it, and draws tables and figures.

    A run that fails does not stop the others: `failures` of the results says why.

    Args:
        source: A YAML file, or its content as a mapping.
        output_dir: Folder of the sweep; None takes "runs/<name of the sweep>".
        jobs: Runs at a time.
        threads: Threads of each run; None shares the machine's cores where `jobs` is above 1.

    Raises:
        InputError: The file is wrong, or the folder holds another sweep; the message names it.
        SweepInterrupted: By a signal; the runs have saved their state.
    """
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name}: 1 or more, not {value}")
    if threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    plan = read_plan(source)
    root = _root(plan, output_dir)
    with RunLock(root), Progress(jobs) as progress:
        prepare(plan, root, progress.tell)
        missing = [(arm, seed) for seed in plan.seeds for arm in plan.arms if stages(plan, root, arm, seed)]
        total = len(plan.seeds) * len(plan.arms)
        progress.tell(f"{plan.name}: {total} runs in {root}, {len(missing)} of them to do")
        failures: dict[tuple[str, int], str] = {}
        try:
            _run_all(plan, root, missing, failures, progress, threads)
        finally:
            results = keep_representations(plan, gather(plan, root, failures), root)
            results.write(root / layout.RESULTS)
        results = add_representations(plan, results, root, progress.tell)
        results.write(root / layout.RESULTS)
        write_sweep_report(root)
    return results


def list_runs(source: str | Path | Mapping[str, Any], output_dir: str | Path | None = None) -> list[str]:
    """Returns a shell's line for each run that is missing of a sweep, and prepares the folder that they name."""
    plan = read_plan(source)
    root = _root(plan, output_dir)
    told: list[str] = []
    with RunLock(root):
        prepare(plan, root, told.append)
        lines = (stages(plan, root, arm, seed) for seed in plan.seeds for arm in plan.arms)
        return [shell_line(line) for line in lines if line]


def _root(plan: Plan, output_dir: str | Path | None) -> Path:
    return Path(output_dir) if output_dir is not None else Path("runs") / plan.name


def _run_all(
    plan: Plan,
    root: Path,
    missing: list[tuple[Arm, int]],
    failures: dict[tuple[str, int], str],
    progress: Progress,
    threads: int | None,
) -> None:
    """Runs, `jobs` at a time, and notes why a run has failed."""
    waiting, running = list(missing), list[Running]()
    results = gather(plan, root, failures)
    with _stop_on_signals():
        try:
            while waiting or running:
                while waiting and len(running) < progress.jobs:
                    running.append(Running(plan, root, *waiting.pop(0), threads))
                ended = [run for run in running if run.has_ended()]
                for run in ended:
                    running.remove(run)
                    if run.failure is not None:
                        failures[run.arm.name, run.seed] = run.failure
                    progress.note_end(run, len(waiting) + len(running))
                if ended:
                    results = gather(plan, root, failures)
                progress.show(results, running)
                time.sleep(_POLL)
        except SweepInterrupted:
            progress.tell("asked to stop: the runs save their state")
            raise
        finally:
            for run in running:
                run.stop()
            for run in running:
                run.wait()


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise SweepInterrupted(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
