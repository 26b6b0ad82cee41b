"""How long does a checkpoint hold up the training loop?

    python benchmarks/checkpoint.py --machine cpu --threads 2 [--quick]

Trains ResNet-18 with AdamW (or another encoder) for some steps and saves after each. "stall" is how long the loop
waits: the state is copied to memory of its own, and a thread writes the copy. "write" is how long that takes with the
loop held still, "beside" a step that runs while it is written, on the same cores. Target: a stall of less than
100 ms. Writes benchmarks/results/<machine>/checkpoint.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from common import Row, Table, clocked, medians, parser, prepare, write
from ours import build_trainer, noise_images, stepper

from hf_ssl_or.callbacks.checkpoints import BackgroundSaver
from hf_ssl_or.training.checkpoint import CheckpointStore, optimizer_tensors
from hf_ssl_or.training.optim import OptimizerArguments

COLUMNS = {
    "encoder": ("encoder", ""),
    "mebibytes": ("MiB", ".0f"),
    "step_ms": ("step ms", ".0f"),
    "stall_ms": ("stall ms", ".0f"),
    "write_ms": ("write ms", ".0f"),
    "beside_ms": ("step beside ms", ".0f"),
}


def measure(encoder: str, batch: int, budget: float, device: torch.device) -> Row:
    optimizer = OptimizerArguments(name="adamw", schedule="constant")
    trainer = build_trainer(
        "barlow_twins", encoder, noise_images(batch, 32), batch, optimizer=optimizer, device=device
    )
    step = stepper(trainer)
    step()
    tensors, entries = optimizer_tensors(trainer.optimizer)
    groups = {"method": trainer.method.state_dict(), "optimizer": tensors}
    size = sum(tensor.nbytes for group in groups.values() for tensor in group.values()) / 2**20
    timed_step = clocked(step, device)
    rounds: list[list[float]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, BackgroundSaver(CheckpointStore(Path(folder))) as saver:
        save = clocked(lambda: saver.save(len(rounds), groups, {"optimizer": entries}), device)
        wait = clocked(saver.wait, device)
        while len(rounds) < 4 or time.perf_counter() - started < budget:
            alone, stall, write_s = timed_step(), save(), wait()
            save()
            rounds.append([alone, stall, write_s, timed_step()])
            wait()
    step_ms, stall_ms, write_ms, beside_ms = medians(rounds[1:])  # the first save gets its memory
    return {
        "encoder": encoder,
        "mebibytes": size,
        "step_ms": step_ms,
        "stall_ms": stall_ms,
        "write_ms": write_ms,
        "beside_ms": beside_ms,
    }


def main() -> None:
    arguments = parser(__doc__, seconds=10)
    arguments.add_argument("--encoders", nargs="+", default=["slim", "resnet18", "vit_tiny"])
    args = arguments.parse_args()
    batch = 32
    if args.quick:
        batch, args.encoders, args.seconds = 4, ["slim"], 0.5
    device = prepare(args)
    table = Table(COLUMNS)
    for encoder in args.encoders:
        table.add(measure(encoder, batch, args.seconds, device))
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
