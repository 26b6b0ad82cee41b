"""What does an epoch cost by stable-pretraining's own recipe?

    pip install stable-pretraining
    python benchmarks/recipes.py --machine cpu --threads 2 [--quick]
    python benchmarks/recipes.py --machine h200 --device cuda --precision bf16 --batch 256 --workers 8

Both have the same method, encoder (timm's), widths, batch, precision and optimizer (SGD with momentum). Two questions:

- a step on views that are there: `Trainer.training_step` against its method's module in a plain loop. VICReg, SimCLR
  and SimSiam have equal losses on equal projections, its BYOL half of ours; its Barlow Twins divides by unbiased
  deviations. Its SimCLR normalizes projections by batch, and its MoCo runs the teacher on the queries' images too.
- an epoch with its views: the time from its `on_train_epoch_start` to its `on_train_epoch_end` within one long fit,
  so neither its set-up nor the start of its workers counts, waiting for an epoch's first batch does. Its views are
  drawn "in workers", image by image by `--workers` processes that live on, or "batched", by its `gpu_transform`
  (kornia) on the device. Ours are rendered by the loader. All crop, flip, jitter and turn gray in the same ranges with
  the same probabilities; its workers draw on PIL images, and kornia jitters a whole batch in one order.

Both sides take turns; times are medians, "faster" is the median of the rounds' ratios. Writes
benchmarks/results/<machine>/recipes.json.
"""

from __future__ import annotations

import argparse

import torch
from common import SLIM, Row, Table, build_timm, clocked, faster, medians, prepare, take_turns, write
from lightly_loops import Loop
from ours import build_trainer, noise_images, noise_pixels, stepper
from stable_loops import SAME, Fit, GivenViews, build, view_loader
from stable_pretraining import Module
from step import SIDE, SPEC, read_arguments, step_cases

STEP_COLUMNS = {
    "name": ("method", ""),
    "encoder": ("encoder", ""),
    "dim": ("dim", "d"),
    "batch": ("images", "d"),
    "ours_ms": ("ours ms", ".0f"),
    "stable_ms": ("stable-p.", ".0f"),
    "times_faster": ("faster", ".2f"),
}
EPOCH_COLUMNS = {
    "name": ("method", ""),
    "encoder": ("encoder", ""),
    "views": ("its views", ""),
    "ours_images_per_s": ("ours img/s", ".0f"),
    "stable_images_per_s": ("stable-p.", ".0f"),
    "times_faster": ("faster", ".2f"),
}
EPOCHS = [("barlow_twins", False), ("barlow_twins", True), ("simclr", False), ("byol", False)]


def theirs(name: str, encoder: str, hidden: int, dim: int) -> Module:
    extra = {"layers": [1, 1, 1, 1]} if encoder == "slim" else {}
    return build(name, build_timm("resnet18", SIDE, SLIM if encoder == "slim" else None, **extra), hidden, dim)


def compare_step(name: str, encoder: str, hidden: int, dim: int, args: argparse.Namespace) -> Row:
    """Measures a step on views that are there."""
    device, images = torch.device(args.device), noise_images(args.batch, SIDE)
    settings = {"projector_hidden": hidden, "projector_dim": dim, **SAME[name]}
    common = {"device": device, "settings": settings, "mixed_precision": args.precision}
    trainer = build_trainer(name, encoder, images, args.batch, **common)
    loop = Loop(GivenViews(theirs(name, encoder, hidden, dim)), device, args.precision)
    views = list(next(trainer.loader.batches(0, 1)).views_VBCHW)
    works = [stepper(trainer), lambda: loop.step(views)]
    rounds = take_turns([clocked(work, device) for work in works], args.seconds)
    ours, stable = medians(rounds)
    return {
        "name": name,
        "encoder": encoder,
        "dim": dim,
        "hidden": hidden,
        "batch": args.batch,
        "rounds": len(rounds),
        "ours_ms": ours,
        "stable_ms": stable,
        "times_faster": faster(rounds, 0, 1),
    }


def compare_epoch(name: str, batched: bool, args: argparse.Namespace) -> Row:
    """Measures an epoch with its views."""
    device, pixels = torch.device(args.device), noise_pixels(args.images, SIDE)
    images = noise_images(args.images, SIDE, pixels)
    settings = {"projector_hidden": args.dim, "projector_dim": args.dim, **SAME[name]}
    common = {"device": device, "settings": settings, "mixed_precision": args.precision, "spec": SPEC}
    trainer, steps = build_trainer(name, "slim", images, args.batch, **common), len(images) // args.batch
    how = {"workers": args.workers, "batched": batched, "pinned": device.type == "cuda"}
    loader = view_loader(pixels, SIDE, SPEC, args.batch, **how)
    fit = Fit(theirs(name, "slim", args.dim, args.dim), loader, device, args.precision)

    def our_epoch() -> None:
        for batch in trainer.loader.batches(0, steps):
            trainer.training_step(batch)

    rounds = take_turns([clocked(our_epoch, device), clocked(fit.epoch, device)], args.seconds)
    fit.close()
    ours, stable = medians(rounds, 1.0)
    return {
        "name": name,
        "encoder": "slim",
        "views": "batched" if batched else "in workers",
        "workers": args.workers,
        "rounds": len(rounds),
        "ours_images_per_s": steps * args.batch / ours,
        "stable_images_per_s": steps * args.batch / stable,
        "times_faster": faster(rounds, 0, 1),
    }


def main() -> None:
    args = read_arguments(__doc__, list(SAME), seconds=8)
    prepare(args)
    steps = Table(STEP_COLUMNS)
    for case in step_cases(args):
        steps.add(compare_step(*case, args))
    print("\nwhole epochs, views included")
    epochs = Table(EPOCH_COLUMNS)
    for name, batched in EPOCHS:
        if name in args.methods:
            epochs.add(compare_epoch(name, batched, args))
    packages = ("stable-pretraining", "lightning")
    write(__file__, args, packages=packages, steps=steps.rows, epochs=epochs.rows)


if __name__ == "__main__":
    main()
