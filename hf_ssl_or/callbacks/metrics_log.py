"""The run's numbers: one JSON object per line in `metrics.jsonl`, and the same to the trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerControl, TrainerState

from hf_ssl_or.callbacks.base import SSLCallback
from hf_ssl_or.errors import InputError
from hf_ssl_or.runs.reader import read_metrics


class MetricsLogCallback(SSLCallback):
    """Writes every log line, and every evaluation, to `metrics.jsonl` and to the trackers."""

    @contextmanager
    def running(self, trainer: Any) -> Iterator[None]:
        """Opens the log of this session; the trackers get the recipe."""
        self.log = MetricLog(trainer.run_dir / "metrics.jsonl", trainer.accelerator, trainer.state.global_step)
        trainer.accelerator.init_trackers("hf_ssl_or", config=flatten(trainer.recipe))
        yield

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes one line; an evaluation is told by transformers' prefix of its names."""
        measured = {
            name.removeprefix("eval_"): value for name, value in kwargs["logs"].items() if name.startswith("eval_")
        }
        self.log.write("monitor" if measured else "train", state.global_step - 1, measured or kwargs["logs"])


def flatten(nested: dict[str, Any], path: str = "") -> dict[str, str | int | float | bool]:
    """Flattens nested settings to dotted names, as trackers want them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in nested.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            flat |= flatten(value, name)
        else:
            flat[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat


def read_history(path: Path, start: int) -> list[dict[str, float]]:
    """Reads the log lines before a step back into the form of the history."""
    lines = []
    for line in read_metrics(path).lines:
        if line["step"] < start:
            prefix = "eval_" if line["kind"] == "monitor" else ""
            values = {f"{prefix}{key}": value for key, value in line.items() if key not in ("kind", "step", "epoch")}
            lines.append({**values, **({"epoch": line["epoch"]} if "epoch" in line else {}), "step": line["step"] + 1})
    return lines


class MetricLog:
    """Appends to a run's `metrics.jsonl`; only the main process writes.

    Args:
        path: The file. On resume, lines at or after `start_step` are dropped first: they will be written again.
        accelerator: Passes the numbers on to its trackers.
        start_step: First step of this session of the run.

    Raises:
        InputError: The file cannot be written.
    """

    def __init__(self, path: Path, accelerator: Accelerator, start_step: int) -> None:
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process and path.exists():
            kept = [line for line in read_metrics(path).lines if line["step"] < start_step]
            temporary = path.with_suffix(".tmp")
            with _named(path):
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
                os.replace(temporary, path)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes one line: `kind` is "train" or "monitor", `step` the number of finished steps minus one."""
        if self.accelerator.is_main_process:
            with _named(self.path), self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=step)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file where the operating system does not, as for a full disk."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


class Meter:
    """Sums named scalars on their device between two log lines, so that a step never waits for the host."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's detached scalars."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def fetch(self) -> dict[str, float]:
        """Returns the means since the last fetch, with one transfer, and starts anew."""
        if not self.count:
            return {}
        means = (torch.stack(list(self.sums.values())) / self.count).tolist()
        names, self.sums, self.count = list(self.sums), {}, 0
        return dict(zip(names, means, strict=True))
