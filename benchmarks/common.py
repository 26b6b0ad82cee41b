"""What the benchmarks share: arguments, taking turns, tables, and results with the machine that they are from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "lightly", "kornia")
SLIM = (32, 64, 128, 128)

Row = dict[str, Any]


def parser(doc: str, *, seconds: float) -> argparse.ArgumentParser:
    """The arguments that every script has; `doc` is the script's own docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--machine", default="cpu", help="name of the folder under benchmarks/results")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seconds", type=float, default=seconds, help="for each line, though three rounds at least")
    made.add_argument("--quick", action="store_true", help="smaller sizes and less time: does it run?")
    return made


def prepare(args: argparse.Namespace) -> torch.device:
    """Sets threads and seed."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return torch.device(args.device)


def clocked(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Returns a function that does `work` and returns its seconds, the device's queue included."""

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return run


def take_turns(
    runs: Sequence[Callable[[], float]], budget: float, *, least: int = 3, warm: bool = True
) -> list[list[float]]:
    """Returns rounds of one result of each run, every other round in reverse, so that a busy machine slows all alike.

    Args:
        runs: What to measure.
        budget: Seconds after which no round begins.
        least: Rounds, whatever the budget.
        warm: Does a first round that does not count.
    """
    for run in runs if warm else ():
        run()
    rounds, start = [], time.perf_counter()
    while len(rounds) < least or (time.perf_counter() - start < budget and len(rounds) < 50):
        order = -1 if len(rounds) % 2 else 1
        rounds.append([run() for run in runs[::order]][::order])
    return rounds


def medians(rounds: list[list[float]], scale: float = 1e3) -> list[float]:
    """Median of each run, in milliseconds unless `scale` says otherwise."""
    return [scale * statistics.median(times) for times in zip(*rounds, strict=True)]


def faster(rounds: list[list[float]], ours: int, theirs: int) -> float:
    """Median over the rounds of theirs / ours: how many times as fast ours is."""
    return statistics.median(times[theirs] / times[ours] for times in rounds)


def build_timm(name: str, side: int, channels: Sequence[int] | None = None, **arguments: Any) -> nn.Module:
    """Timm's encoder as one uses it on small images: patches of 4, or a stem of one 3 x 3 convolution."""
    if name.startswith("vit"):
        return timm.create_model(name, num_classes=0, img_size=side, patch_size=4 if side <= 64 else 16)
    encoder = timm.create_model(name, num_classes=0, **({"channels": channels} if channels else {}), **arguments)
    if side <= 64:
        encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


class Table:
    """Prints rows as they come, and keeps them.

    Args:
        columns: Key of a row -> (head, format); a missing value is printed as a dash.
    """

    def __init__(self, columns: dict[str, tuple[str, str]]) -> None:
        self.columns, self.rows = columns, []
        self.widths = {key: max(len(head), 9) + 2 for key, (head, _) in columns.items()}
        first = next(iter(columns))
        self.widths[first] = 30
        print(
            "".join(
                f"{head:<{self.widths[k]}}" if k == first else f"{head:>{self.widths[k]}}"
                for k, (head, _) in columns.items()
            )
        )

    def add(self, row: Row) -> None:
        """Prints a row at once."""
        self.rows.append(row)
        line = ""
        for place, (key, (_, form)) in enumerate(self.columns.items()):
            text = "-" if row.get(key) is None else format(row[key], form)
            line += f"{text:{'<' if place == 0 else '>'}{self.widths[key]}}"
        print(line, flush=True)


def about(args: argparse.Namespace, packages: Sequence[str] = ()) -> Row:
    """Describes the machine, the settings and the versions, of `packages` too."""
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    found = {name: version(name) for name in (*PACKAGES, *packages)}
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": gpu,
            "python": platform.python_version(),
        },
        "settings": {key: value for key, value in vars(args).items() if key != "machine"},
        "versions": found,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """Returns what the machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(script: str, args: argparse.Namespace, *, packages: Sequence[str] = (), **results: Any) -> None:
    """Writes benchmarks/results/<machine>/<script>.json; `packages` are further ones whose versions it names."""
    path = RESULTS / args.machine / f"{Path(script).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about(args, packages), **results}, indent=1) + "\n")
    print(f"written to {path}")


def rewrite(pages: Iterable[Path], written: Callable[[str], str], *, script: str, check: bool) -> None:
    """Writes documents anew from the results, or with `check` only fails where one is not what they say.

    Args:
        pages: The documents.
        written: Returns a document's new text from the old one.
        script: Name of the script that writes them.
        check: Changes nothing.
    """
    for page in pages:
        old = page.read_text()
        new = written(old)
        if check and new != old:
            sys.exit(f"{page} is not what the results say: run python benchmarks/{script}.py")
        if new != old:
            page.write_text(new)
        print(f"{page} is what the results say")
