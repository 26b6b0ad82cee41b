"""Kills runs at many instants, also within the writing of checkpoints, and compares each resumed end bit by bit.

    python tests/faults/torture.py --kills 50 --processes 1 2 --seed 0

Prints a table; exits with 1 if any run lost or changed anything.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what all tests share

from kills import draw_kills, kill_and_resume, uninterrupted
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tiny_runs import write_recipe


def torture(folder: Path, processes: int, kills: int, seed: int, minutes: float, console: Console) -> Counter[str]:
    """Kills `kills` runs; gives how many were hit, were hit within writes, came too late, and failed."""
    recipe = write_recipe(folder / "tiny.yaml")
    reference = uninterrupted(recipe, folder / f"whole-{processes}", processes)
    counts: Counter[str] = Counter()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{processes} process{'es' if processes > 1 else ''}", total=kills)
        deadline = time.monotonic() + 60 * minutes
        for number, kill in enumerate(draw_kills(seed, kills, reference)):
            if time.monotonic() > deadline:
                counts["left out"] = kills - number
                break
            own = folder / f"run-{processes}-{number}"
            hit, problems = kill_and_resume(kill, reference, own)
            counts["killed" if hit else "too late"] += 1
            counts["between file operations"] += hit and kill.operation is not None
            if problems:
                counts["FAILED"] += 1
                console.print(f"[bold red]{kill}[/]: {'; '.join(problems)}", soft_wrap=True)
            shutil.rmtree(own, ignore_errors=True)
            progress.advance(bar)
    return counts


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each number of processes (default: 50)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--seed", type=int, default=0, help="key of the instants (default: 0)")
    parser.add_argument("--minutes", type=float, default=60, help="stops after so long, each (default: 60)")
    arguments = parser.parse_args()
    console = Console()
    columns = ("killed", "between file operations", "too late", "left out", "FAILED")
    table = Table("processes", *columns, title=f"seed {arguments.seed}: resumed ends that differ are failures")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for processes in arguments.processes:
            own = Path(folder) / str(processes)
            own.mkdir()
            counts = torture(own, processes, arguments.kills, arguments.seed, arguments.minutes, console)
            table.add_row(str(processes), *(str(counts[column]) for column in columns))
            failed += counts["FAILED"]
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
