"""Where does a step's time go?

    python benchmarks/anatomy.py --machine cpu --threads 2 [--quick]
    python benchmarks/anatomy.py --machine h200 --device cuda --batch 256 --precision bf16

Takes steps of a run, views included, and stamps the clock where one part ends and the next begins: views, encoder
forward, head forward, loss, then the same three backward, penalty, optimizer, and the rest (learning rate, metrics,
zeroing). The device finishes each part before the next is clocked, so on a GPU the sum is more than a step of a real
run, where views are rendered beside it. Prints medians in percent of the whole. Writes
benchmarks/results/<machine>/anatomy.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from common import Row, parser, prepare, write
from ours import ENCODERS, build_trainer, noise_images

from hf_ssl_or import SSLTrainer

PARTS = (
    "views",
    "encoder forward",
    "head forward",
    "loss forward",
    "loss backward",
    "head backward",
    "encoder backward",
    "penalty",
    "optimizer",
    "rest",
)


class Stopwatch:
    """Notes how long each part took."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(list)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Ends a part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part].append(now - self.last)
        self.last = now

    def ending(self, work: Callable[..., Any], part: str, before: str) -> Callable[..., Any]:
        """Wraps `work`: what comes before it ends the part `before`, it is `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.lap(before)
            result = work(*args, **kwargs)
            self.lap(part)
            return result

        return run


def watch(trainer: SSLTrainer, watch: Stopwatch) -> None:
    """Puts stamps into a trainer whose method is an encoder, a projector and a loss of projections."""

    def after_encoder(module: Any, inputs: Any, output: Any) -> None:
        watch.lap("encoder forward")
        output.pooler_output.register_hook(lambda grad: watch.lap("head backward"))

    def after_head(module: Any, inputs: Any, output: torch.Tensor) -> None:
        watch.lap("head forward")
        output.register_hook(lambda grad: watch.lap("loss backward"))

    method: Any = trainer.method
    method.encoder.register_forward_hook(after_encoder)
    method.projector.register_forward_hook(after_head)
    trainer.accelerator.backward = watch.ending(trainer.accelerator.backward, "encoder backward", "loss forward")
    trainer.regularizer.add_gradients = watch.ending(trainer.regularizer.add_gradients, "penalty", "rest")
    trainer.wrapped_optimizer.step = watch.ending(trainer.wrapped_optimizer.step, "optimizer", "rest")


def measure(method: str, encoder: str, dim: int, args: argparse.Namespace, device: torch.device) -> Row:
    settings = {"projector_hidden": min(dim, 2048), "projector_dim": dim}
    common = {"device": device, "settings": settings, "penalty": "so", "mixed_precision": args.precision}
    steps, images = args.steps + 1, noise_images(2 * args.batch, 32)
    trainer = build_trainer(method, encoder, images, args.batch, **common)
    stopwatch, batches = Stopwatch(trainer.device), trainer.loader.batches(0, steps)
    watch(trainer, stopwatch)
    for step in range(steps):
        if step == 1:
            stopwatch.seconds.clear()
        stopwatch.last = time.perf_counter()
        batch = next(batches)
        stopwatch.lap("views")
        trainer.training_step(batch)
        stopwatch.lap("rest")
    milliseconds = {part: 1e3 * statistics.median(times) for part, times in stopwatch.seconds.items()}
    milliseconds["rest"] = 1e3 * sum(stopwatch.seconds["rest"]) / args.steps  # in several pieces each step
    total = sum(milliseconds.values())
    return {
        "name": method,
        "encoder": encoder,
        "dim": dim,
        "batch": args.batch,
        "total_ms": total,
        "parts_ms": {part: milliseconds.get(part, 0.0) for part in PARTS},
    }


def show(rows: list[Row]) -> None:
    print(f"{'percent of a step':20}" + "".join(f"{row['name']:>16}" for row in rows))
    print(f"{'':20}" + "".join(f"{row['encoder']:>11}{row['dim']:>5}" for row in rows))
    print(f"{'milliseconds':20}" + "".join(f"{row['total_ms']:16.0f}" for row in rows))
    for part in PARTS:
        print(f"{part:20}" + "".join(f"{row['parts_ms'][part] / row['total_ms']:16.1%}" for row in rows))


def main() -> None:
    arguments = parser(__doc__, seconds=0)
    arguments.add_argument("--precision", choices=("no", "bf16"), default="no")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--steps", type=int, default=4)
    args = arguments.parse_args()
    if args.quick:
        args.batch, args.steps = 16, 2
    device = prepare(args)
    cases = [("barlow_twins", name, 256) for name in ENCODERS]
    cases += [("barlow_twins", "slim", 8192), ("vicreg", "slim", 8192)]
    rows = [measure(*case, args, device) for case in (cases[:1] if args.quick else cases)]
    show(rows)
    write(__file__, args, rows=rows)


if __name__ == "__main__":
    main()
