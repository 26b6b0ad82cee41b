"""One kill of a run at an instant, its resumption, and what the end then lacks."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effects import count_file_operations, die_at_file_operation
from processes import Ended
from tiny_runs import Started, differences, run


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        recipe: What was run.
        folder: Its folder.
        processes: Number of processes.
        seconds: How long it took.
        operations: How many operations on files of its folder the main process did.
    """

    recipe: Path
    folder: Path
    processes: int
    seconds: float
    operations: int


def uninterrupted(recipe: Path, folder: Path, processes: int = 1) -> Reference:
    """Runs to the end, twice: the second time undisturbed by what is imported once, and counted."""
    counter = folder.with_suffix(".count")
    line, log = ["train", recipe, "--output"], folder.with_suffix(".log")
    finished = run([*line, folder], log, processes=processes)
    assert not any(finished.statuses), finished.errors[-3000:]
    again = folder.with_name(f"{folder.name}-again")
    fault = partial(count_file_operations, again, counter)
    finished = run([*line, again], log, processes=processes, faults=[fault])
    assert differences(again, folder) == [], "two undisturbed runs differ: nothing can be compared"
    return Reference(recipe, folder, processes, finished.seconds, counter.stat().st_size // processes)


@dataclass(frozen=True)
class Kill:
    """An instant: a share of the run's duration, or just before an operation on a file of its folder.

    Attributes:
        share: Of the duration; None for a file operation.
        operation: Number of the operation.
        rank: The process that is killed; None for all.
    """

    share: float | None = None
    operation: int | None = None
    rank: int | None = None

    def __str__(self) -> str:
        when = f"at {self.share:.4f} of the time" if self.share is not None else f"at file operation {self.operation}"
        return f"SIGKILL {when}, {'all processes' if self.rank is None else f'process {self.rank}'}"


def draw_kills(seed: int, count: int, reference: Reference, *, within_writes: float = 0.5) -> Iterator[Kill]:
    """Draws instants; a share of them between two operations on files, which is where a write can be cut."""
    dice = random.Random(f"{seed}/{reference.processes}")
    for _ in range(count):
        rank = dice.choice([None, None, 0, 1]) if reference.processes > 1 else None
        if dice.random() < within_writes:
            yield Kill(operation=dice.randrange(reference.operations), rank=rank)
        else:
            yield Kill(share=dice.random(), rank=rank)


def kill_and_resume(kill: Kill, reference: Reference, folder: Path) -> tuple[bool, list[str]]:
    """Kills a run and resumes it.

    Returns:
        Whether the kill came before the end, and what is wrong afterwards; nothing, if the promise holds.
    """
    first = _start_and_kill(kill, reference, folder)
    problems = [] if _ended_well(first) else [f"ended with {first.statuses}: {first.errors[-1500:]}"]
    if (folder / "recipe.yaml").exists():
        line = ["train", folder, "--resume"]
    else:
        line = ["train", reference.recipe, "--output", folder, "--resume"]
    resumed = run(line, folder.with_suffix(".log2"), processes=reference.processes)
    if any(resumed.statuses):
        return True, [*problems, f"could not be resumed: {resumed.statuses} {resumed.errors[-1500:]}"]
    if "damaged" in resumed.errors or "incomplete" in resumed.errors:
        problems.append(f"a kill left a damaged file: {resumed.errors[-1500:]}")
    return -9 in first.statuses, problems + differences(folder, reference.folder)


def _start_and_kill(kill: Kill, reference: Reference, folder: Path) -> Ended:
    faults = []
    if kill.operation is not None:
        faults = [partial(die_at_file_operation, folder, kill.operation)]
    started = Started(
        ["train", reference.recipe, "--output", folder],
        folder.with_suffix(".log"),
        processes=reference.processes,
        faults=faults,
    )
    met = True
    if kill.share is not None:
        time.sleep(kill.share * reference.seconds)
        started.kill(rank=kill.rank)
        met = folder.exists()
    return started.wait(fail_together=not met)  # a launcher ends processes that wait for a lost one to join


def _ended_well(ended: Ended) -> bool:
    """Killed, or done, or stopped for want of the other process in a way that says so."""
    return set(ended.statuses) <= {0, -9, 75} and "Traceback" not in ended.errors
