"""What a sweep shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hf_ssl_or.runs.labels import duration
from hf_ssl_or.runs.sweep_results import ArmValues, SweepResults, column_label
from hf_ssl_or.sweeps.processes import Running


class Progress:
    """Shows arms, seeds done, mean and standard deviation of the first column, and the time left.

    Args:
        jobs: Runs at a time.
        console: Where to show it; None takes standard error.
    """

    def __init__(self, jobs: int, console: Console | None = None) -> None:
        self.jobs = jobs
        self.console = console or Console(stderr=True, highlight=False)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._seconds: dict[str, list[float]] = {}

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *how: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*how)

    def tell(self, line: str) -> None:
        """Prints a line, above the table where there is one."""
        self.console.print(line, markup=False, soft_wrap=True)

    def note_end(self, run: Running, left: int) -> None:
        """Takes note of a run that has ended."""
        seconds = time.monotonic() - run.started
        if run.failure is None:
            self._seconds.setdefault(run.arm.name, []).append(seconds)
        how = f"done in {duration(seconds)}" if run.failure is None else f"failed: {run.failure}; see {run.log}"
        self.tell(f"{run.arm.name} seed {run.seed}: {how}; {left} of the sweep's runs left")

    def show(self, results: SweepResults, running: list[Running]) -> None:
        """Shows how things stand."""
        if self._live is not None:
            self._live.update(self.table(results, running), refresh=True)

    def table(self, results: SweepResults, running: list[Running]) -> Table:
        """Returns the table."""
        column = results.columns[0] if results.columns else None
        table = Table(title=results.name)
        table.add_column("arm", overflow="fold")
        for head in ("seeds", "mean" if column is None else column_label(column).title, "minutes left"):
            table.add_column(head, justify="right")
        for arm in results.arms:
            metric = None if column is None else arm.metric(column)
            done = sum(bool(run.metrics) for run in arm.runs)
            value = "" if metric is None else metric.describe()
            shown = arm.failure or value
            table.add_row(arm.name, f"{done}/{len(arm.runs)}", shown, self._left(arm, running))
        return table

    def _left(self, arm: ArmValues, running: list[Running]) -> str:
        """Estimates an arm's minutes from its runs of this session, or from all where none of its own has ended."""
        left = sum(not run.metrics and run.failure is None for run in arm.runs)
        known = self._seconds.get(arm.name) or [second for some in self._seconds.values() for second in some]
        if not left:
            return "0"
        if not known:
            return ""
        mean = statistics.fmean(known)
        spent = sum(min(mean, time.monotonic() - run.started) for run in running if run.arm.name == arm.name)
        return f"{(left * mean - spent) / 60 / self.jobs:.1f}"
