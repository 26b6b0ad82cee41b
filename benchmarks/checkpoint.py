"""How long does a checkpoint hold up the training loop?

    python benchmarks/checkpoint.py --machine cpu --threads 2 [--quick]

Trains ResNet-18 with AdamW (or another encoder) for some steps and saves after each. "stall" is how long the loop
waits; "copy" is the part that no loop can avoid, copying the state to memory of its own; "write" is the rest, until
the files are on the disk. Target: a stall of less than 100 ms. Writes benchmarks/results/<machine>/checkpoint.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import Row, Table, clocked, medians, parser, prepare, take_turns, write
from ours import build_trainer, noise_images, stepper

from hf_ssl_or.training.checkpoint import CheckpointStore, optimizer_tensors, snapshot
from hf_ssl_or.training.optim import OptimizerArguments

COLUMNS = {
    "encoder": ("encoder", ""),
    "mebibytes": ("MiB", ".0f"),
    "step_ms": ("step ms", ".0f"),
    "stall_ms": ("stall ms", ".0f"),
    "copy_ms": ("copy ms", ".1f"),
    "write_ms": ("write ms", ".0f"),
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
    with tempfile.TemporaryDirectory() as folder:
        store, saved = CheckpointStore(Path(folder)), iter(range(1, 1000))

        def save() -> None:
            store.save(next(saved), groups, {"optimizer": entries})

        works = (step, save, lambda: snapshot(groups))
        step_ms, stall_ms, copy_ms = medians(take_turns([clocked(work, device) for work in works], budget))
    return {
        "encoder": encoder,
        "mebibytes": size,
        "step_ms": step_ms,
        "stall_ms": stall_ms,
        "copy_ms": copy_ms,
        "write_ms": stall_ms - copy_ms,
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
