"""How does the cost of a step grow with views, projector, batch, image size and processes?

    python benchmarks/growth.py --machine cpu --threads 2 [--quick]
    python benchmarks/growth.py --machine h200 --device cuda --encoder resnet18 --batch 256

A step is Trainer.training_step on views that are there, of Barlow Twins and VICReg, with an encoder of a tenth of
ResNet-18's work. In each table the sizes take turns; "times" is the median of the rounds' ratios to the smallest size.
The target for views: 8 cost at most 4.1 times as much as 2, which is the growth of the encoder's own work.

Processes (gloo on a CPU, one GPU each otherwise) share the batch, and the CPU's threads; each count has a fresh start,
and counts take turns. Writes benchmarks/results/<machine>/growth.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Row, Table, clocked, faster, medians, parser, prepare, take_turns, write
from ours import ENCODERS, build_trainer, noise_images, stepper

SIDE = 32
COLUMNS = {"name": ("method", ""), "size": ("size", "d"), "ours_ms": ("ours ms", ".0f"), "times": ("times", ".2f")}


def step(
    args: argparse.Namespace,
    device: torch.device,
    method: str,
    *,
    views: int = 2,
    dim: int = 256,
    batch: int | None = None,
    side: int = SIDE,
) -> Callable[[], float]:
    settings = {"projector_hidden": min(dim, 2048), "projector_dim": dim}
    images = noise_images(batch or args.batch, side)
    trainer = build_trainer(method, args.encoder, images, len(images), views=views, device=device, settings=settings)
    return clocked(stepper(trainer), device)


def grow(
    table: Table, name: str, sizes: list[int], build: Callable[[int], Callable[[], float]], budget: float
) -> None:
    """Measures the steps of several sizes in turns."""
    rounds = take_turns([build(size) for size in sizes], budget)
    for place, (size, ms) in enumerate(zip(sizes, medians(rounds), strict=True)):
        table.add({"name": name, "size": size, "ours_ms": ms, "times": faster(rounds, 0, place)})


def one_process_of_many(args: argparse.Namespace) -> None:
    """What each of the processes does: some steps, whose median the first one prints."""
    device = torch.device(args.device)
    images = noise_images(args.batch, SIDE)
    settings = {"projector_hidden": 256, "projector_dim": 256}
    trainer = build_trainer("barlow_twins", args.encoder, images, args.batch, device=device, settings=settings)
    run = clocked(stepper(trainer), trainer.device)
    run()
    times = [run() for _ in range(3 if args.quick else 10)]
    if trainer.accelerator.is_main_process:
        print(json.dumps({"seconds": statistics.median(times)}), flush=True)
    trainer.accelerator.end_training()


def launched(processes: int, args: argparse.Namespace) -> float:
    """Seconds of a step when so many processes share the batch."""
    threads = max(1, args.threads // processes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = ["--worker", f"--device={args.device}", f"--threads={threads}", f"--batch={args.batch}"]
    command = [*launcher, __file__, *options, f"--encoder={args.encoder}", *(["--quick"] if args.quick else [])]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=Path.cwd())
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])["seconds"]


def main() -> None:
    arguments = parser(__doc__, seconds=4)
    arguments.add_argument("--encoder", choices=ENCODERS, default="slim")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--views", type=int, nargs="+", default=[2, 4, 8])
    arguments.add_argument("--dims", type=int, nargs="+", default=[256, 2048, 8192])
    arguments.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    arguments.add_argument("--sides", type=int, nargs="+", default=[32, 64, 96])
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of one machine")
    arguments.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.quick:
        args.batch, args.dims, args.batches, args.sides, args.seconds = 16, [64, 256], [8, 16], [32, 48], 0.5
    device = prepare(args)
    if args.worker:
        one_process_of_many(args)
        return
    both, one = ("barlow_twins", "vicreg"), ("barlow_twins",)
    questions: dict[str, tuple[tuple[str, ...], list[int], Callable[[str, int], Callable[[], float]]]] = {
        "views": (both, args.views, lambda m, n: step(args, device, m, views=n)),
        "dims": (both, args.dims, lambda m, n: step(args, device, m, dim=n)),
        "batches": (one, args.batches, lambda m, n: step(args, device, m, batch=n)),
        "sides": (one, args.sides, lambda m, n: step(args, device, m, batch=args.batch // 2, side=n)),
        "processes": (one, args.processes, lambda _, n: partial(launched, n, args)),
    }
    results: dict[str, list[Row]] = {}
    for question, (methods, sizes, build) in questions.items():
        print(f"\n{question}")
        table = Table(COLUMNS)
        for method in methods:
            grow(table, method, sizes, partial(build, method), 0 if question == "processes" else args.seconds)
        results[question] = table.rows
    write(__file__, args, **results)


if __name__ == "__main__":
    main()
