"""What does a whole training step cost? Trainer.training_step against a plain loop of lightly's modules.

    python benchmarks/step.py --machine cpu --threads 2 [--quick]
    python benchmarks/step.py --machine h200 --device cuda --precision bf16 --batch 256

Both have the same method, encoder (timm's), widths, batch, precision and optimizer (SGD with momentum), and the same
augmentation where views are part of the question. Three questions:

- all methods, views given, with an encoder of a tenth of ResNet-18's work: never slower?
- ResNet-18 with a projector of 8192 dimensions: 1.3 times as fast?
- an epoch, views included, with the small encoder: twice as fast? Lightly's transforms run in a DataLoader with
  `--workers` processes that live on between epochs; ours are rendered by the loader. Images are in memory for both.

Ours, ours with SO, and lightly's take turns; times are medians, "faster" is the median of the rounds' ratios, and
"SO" says how much longer a step with the penalty takes. Writes benchmarks/results/<machine>/step.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import SLIM, Row, Table, build_timm, clocked, faster, medians, parser, prepare, take_turns, write
from lightly.transforms import SimCLRTransform
from lightly_loops import SAME, Loop, build
from ours import MEAN, STD, build_trainer, noise_images, noise_pixels, stepper
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from hf_ssl_or.structures import ViewSpec

SIDE = 32
SPEC = ViewSpec(crop_scale=(0.08, 1.0), saturation=0.4)  # what SimCLRTransform draws at half strength, without blur
STEP_COLUMNS = {
    "name": ("method", ""),
    "encoder": ("encoder", ""),
    "dim": ("dim", "d"),
    "batch": ("images", "d"),
    "ours_ms": ("ours ms", ".0f"),
    "ours_so_ms": ("with SO", ".0f"),
    "lightly_ms": ("lightly", ".0f"),
    "times_faster": ("faster", ".2f"),
    "penalty_share": ("SO", ".1%"),
}
EPOCH_COLUMNS = {
    "name": ("method", ""),
    "encoder": ("encoder", ""),
    "ours_images_per_s": ("ours img/s", ".0f"),
    "lightly_images_per_s": ("lightly", ".0f"),
    "times_faster": ("faster", ".2f"),
}


class PilImages(Dataset):
    """The same images as PIL's, which lightly's transforms take."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.images = [to_pil_image(image) for image in pixels.permute(0, 3, 1, 2)]
        self.transform = SimCLRTransform(
            input_size=SIDE, cj_strength=0.5, cj_sat=0.8, gaussian_blur=0.0, normalize={"mean": MEAN, "std": STD}
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Any]:
        return [self.transform(self.images[i]), i]


def loop(name: str, encoder: str, hidden: int, dim: int, args: argparse.Namespace, device: torch.device) -> Loop:
    extra = {"layers": [1, 1, 1, 1]} if encoder == "slim" else {}
    net = build_timm("resnet18", SIDE, SLIM if encoder == "slim" else None, **extra)
    return Loop(build(name, net, net.num_features, hidden, dim), device, args.precision)


def compare_step(
    name: str, encoder: str, batch: int, hidden: int, dim: int, args: argparse.Namespace, device: torch.device
) -> Row:
    """Measures a step on views that are there."""
    images = noise_images(batch, SIDE)
    settings = {"projector_hidden": hidden, "projector_dim": dim, **SAME[name]}
    common = {"device": device, "settings": settings, "mixed_precision": args.precision}
    trainers = [build_trainer(name, encoder, images, batch, penalty=penalty, **common) for penalty in ("none", "so")]
    theirs = loop(name, encoder, hidden, dim, args, device)
    views = list(next(trainers[0].loader.batches(0, 1)).views_VBCHW)
    works = [*map(stepper, trainers), lambda: theirs.step(views)]
    rounds = take_turns([clocked(work, device) for work in works], args.seconds)
    ours, ours_so, lightly = medians(rounds)
    return {
        "name": name,
        "encoder": encoder,
        "dim": dim,
        "hidden": hidden,
        "batch": batch,
        "rounds": len(rounds),
        "ours_ms": ours,
        "ours_so_ms": ours_so,
        "lightly_ms": lightly,
        "times_faster": faster(rounds, 0, 2),
        "times_faster_with_so": faster(rounds, 1, 2),
        "penalty_share": faster(rounds, 0, 1) - 1,
    }


def compare_epoch(name: str, encoder: str, args: argparse.Namespace, device: torch.device) -> Row:
    """Measures an epoch with its views."""
    pixels = noise_pixels(args.images, SIDE)
    images = noise_images(args.images, SIDE, pixels)
    settings = {"projector_hidden": args.dim, "projector_dim": args.dim, **SAME[name]}
    common = {"device": device, "settings": settings, "mixed_precision": args.precision, "spec": SPEC}
    trainer = build_trainer(name, encoder, images, args.batch, **common)
    theirs, steps = loop(name, encoder, args.dim, args.dim, args, device), len(images) // args.batch
    loader = DataLoader(
        PilImages(pixels),
        args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )

    def our_epoch() -> None:
        for batch in trainer.loader.batches(0, steps):
            trainer.training_step(batch)

    rounds = take_turns(
        [clocked(our_epoch, device), clocked(lambda: theirs.epoch(loader, steps), device)], args.seconds
    )
    ours, lightly = medians(rounds, 1.0)
    return {
        "name": name,
        "encoder": encoder,
        "workers": args.workers,
        "ours_images_per_s": steps * args.batch / ours,
        "lightly_images_per_s": steps * args.batch / lightly,
        "times_faster": faster(rounds, 0, 1),
    }


def read_arguments(doc: str, methods: Sequence[str], *, seconds: float) -> argparse.Namespace:
    """Reads the command line of a script that compares steps and epochs with a peer, which has these methods."""
    arguments = parser(doc, seconds=seconds)
    arguments.add_argument("--precision", choices=("no", "bf16"), default="no")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--dim", type=int, default=256, help="width of the projector for the small encoder")
    arguments.add_argument("--wide", type=int, default=8192, help="width of the projector with ResNet-18")
    arguments.add_argument("--images", type=int, default=1024, help="of an epoch")
    arguments.add_argument("--workers", type=int, default=2, help="of the peer's DataLoader")
    arguments.add_argument("--methods", nargs="+", choices=methods, default=list(methods), metavar="NAME")
    args = arguments.parse_args()
    if args.quick:
        args.batch, args.wide, args.images, args.seconds = 16, 512, 64, 0.5
    return args


def step_cases(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """Returns (method, encoder, hidden width, projector) of the steps to compare."""
    wide = [name for name in ("barlow_twins", "vicreg") if name in args.methods]
    return [
        *((name, "slim", args.dim, args.dim) for name in args.methods),
        *((name, "resnet18", min(2048, args.wide), args.wide) for name in wide),
    ]


def main() -> None:
    args = read_arguments(__doc__, list(SAME), seconds=5)
    device = prepare(args)
    steps = Table(STEP_COLUMNS)
    for name, encoder, hidden, dim in step_cases(args):
        steps.add(compare_step(name, encoder, args.batch, hidden, dim, args, device))
    print("\nwhole epochs, views included")
    epochs = Table(EPOCH_COLUMNS)
    for name in ("barlow_twins", "vicreg", "simclr", "byol"):
        if name in args.methods:
            epochs.add(compare_epoch(name, "slim", args, device))
    write(__file__, args, steps=steps.rows, epochs=epochs.rows)


if __name__ == "__main__":
    main()
