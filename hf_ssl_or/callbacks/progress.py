"""What a person sees of a running training: one bar on a terminal, one line per log interval elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerControl, TrainerState

from hf_ssl_or.callbacks.base import SSLCallback


class ProgressCallback(SSLCallback):
    """Shows the progress of the run on standard error."""

    def running(self, trainer: Any) -> RunProgress:
        """Shows the bar while training runs."""
        state = trainer.state
        self.progress = RunProgress(state.global_step, state.max_steps, enabled=state.is_world_process_zero)
        return self.progress

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts one step."""
        self.progress.advance()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the newest numbers."""
        measured = {
            name.removeprefix("eval_"): value for name, value in kwargs["logs"].items() if name.startswith("eval_")
        }
        self.progress.show_monitor(measured) if measured else self.progress.show(kwargs["logs"])


class Waited(Protocol):
    """What the clock reads from a loader."""

    wait_s: float


class RunProgress:
    """Progress of a run on standard error.

    Args:
        start: Steps that were done before this session of the run.
        total: Steps of the whole run.
        enabled: False on all processes but the main one.
    """

    def __init__(self, start: int, total: int, *, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not (enabled and self.console.is_terminal))
        self.task = self.bar.add_task("train", total=total, completed=start, note="")
        self.done, self.total = start, total

    def __enter__(self) -> RunProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self) -> None:
        """Counts one step."""
        self.done += 1
        self.bar.advance(self.task)

    def show(self, values: dict[str, float]) -> None:
        """Shows the newest loss and speed."""
        note = (
            f"epoch {values['epoch']:.1f}  loss {values['loss']:.4f}  {values['images_per_second']:.0f} img/s  "
            f"data wait {values['data_wait_percent']:.1f} %"
        )
        if self.console.is_terminal:
            self.bar.update(self.task, note=note)
        else:
            self.console.print(f"step {self.done}/{self.total}  {note}", soft_wrap=True)

    def show_monitor(self, values: dict[str, float]) -> None:
        """Prints one line about the encoder."""
        knn = f"kNN {values['knn']:.2f} %  " if "knn" in values else ""
        rank = f"RankMe {values['rankme']:.1f}  effective rank {values['effective_rank']:.1f}"
        error = f"orthogonality error {values['orthogonality_error']:.3g}"
        self.console.print(f"step {self.done}  {knn}{rank}  {error}", soft_wrap=True)


class Clock:
    """Images per second and the share of time spent waiting for data, between two log lines.

    Args:
        loader: Counts the seconds its consumer waited.
        batch_size: Images per step over all processes.
        now: The clock.
    """

    def __init__(self, loader: Waited, batch_size: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.loader, self.batch_size, self.now = loader, batch_size, now
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.resume()

    def resume(self) -> None:
        """Continues after an evaluation or a checkpoint, which is not training time."""
        self._started, self._waited = self.now(), self.loader.wait_s

    def tick(self) -> None:
        """Counts one finished step."""
        self.steps += 1
        self.seconds += self.now() - self._started
        self.waited += self.loader.wait_s - self._waited
        self.resume()

    def read(self) -> dict[str, float]:
        """Returns the rates since the last reading."""
        seconds = max(self.seconds, 1e-9)
        rates = {
            "images_per_second": round(self.steps * self.batch_size / seconds, 1),
            "data_wait_percent": round(100 * self.waited / seconds, 2),
        }
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        return rates
