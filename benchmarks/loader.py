"""How fast are images ready: the first batch of a run, decoding, and the share of a run spent waiting for views?

    python benchmarks/loader.py --machine cpu --threads 2 [--quick]

A folder of JPEGs is made first. Decoding, in images per second to squares of the cache's side: ours (`load_images`,
threads), a plain loop of PIL, and `datasets` with torchvision's transforms in a DataLoader of `--workers` processes,
which is also what a first batch is compared with. All files are in the machine's memory by then. "wait" is what a
run's own log says: the share of its time in which it waits for views. Writes benchmarks/results/<machine>/loader.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from common import Row, Table, clocked, faster, medians, parser, prepare, take_turns, write
from datasets import load_dataset
from ours import build_trainer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.structures import ViewSpec
from hf_ssl_or.training.log import read_metrics

VIEWS = [ViewSpec(), ViewSpec()]
COLUMNS = {
    "name": ("question", ""),
    "ours": ("ours", ".1f"),
    "pil": ("PIL loop", ".1f"),
    "datasets": ("datasets", ".1f"),
    "times_faster": ("faster", ".2f"),
}


def make_jpegs(folder: Path, count: int, side: int) -> None:
    """Writes smooth images of noise, about as large as photographs are."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)


def plain_loop(files: list[Path], side: int) -> np.ndarray:
    """Decodes one image after the other."""
    return np.stack([np.asarray(Image.open(file).convert("RGB").resize((side, side))) for file in files])


def torch_loader(folder: Path, side: int, args: argparse.Namespace, chain: v2.Transform, views: int) -> DataLoader:
    """What one writes with `datasets` and torchvision."""
    images = load_dataset("imagefolder", data_dir=str(folder), split="train")
    images.set_transform(
        lambda rows: {"views": [torch.stack([chain(i) for _ in range(views)]) for i in rows["image"]]}
    )
    return DataLoader(images, args.batch, shuffle=views > 1, drop_last=views > 1, num_workers=args.workers)


def decoding(folder: Path, args: argparse.Namespace) -> Row:
    files, side = sorted(folder.glob("*.jpg")), args.size
    data = DataArguments(dataset=str(folder), image_size=side, cache_size=side, mean=[0.5] * 3, std=[0.2] * 3)
    chain = v2.Compose([v2.PILToTensor(), v2.Resize((side, side), antialias=True)])
    theirs = torch_loader(folder, side, args, chain, 1)
    works = (lambda: load_images(data, "train"), lambda: plain_loop(files, side), lambda: [None for _ in theirs])
    rounds = take_turns([clocked(work, torch.device("cpu")) for work in works], args.seconds)
    ours, pil, with_datasets = (len(files) / seconds for seconds in medians(rounds, 1.0))
    return {
        "name": "decoding, images/s",
        "ours": ours,
        "pil": pil,
        "datasets": with_datasets,
        "times_faster": faster(rounds, 0, 2),
    }


def first_batches(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Milliseconds from nothing to the first batch of views: nothing decoded yet, and decoded by an earlier run."""
    device, side = torch.device("cpu"), args.size
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(side, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def ours(cache: Path) -> None:
        data = DataArguments(dataset=str(folder), image_size=side, cache="disk", cache_dir=str(cache))
        loader = ViewLoader(load_images(data, "train"), VIEWS, batch_size=args.batch, seed=0)
        next(loader.batches(0, 1))

    def cold() -> None:
        with tempfile.TemporaryDirectory() as cache:
            ours(Path(cache))

    with tempfile.TemporaryDirectory() as kept:
        works = (lambda: ours(Path(kept)), cold, lambda: next(iter(torch_loader(folder, side, args, chain, 2))))
        rounds = take_turns([clocked(work, device) for work in works], args.seconds)
    warm_ms, cold_ms, theirs_ms = medians(rounds)
    head = "first batch, ms, "
    return [
        {"name": f"{head}later runs", "ours": warm_ms, "datasets": theirs_ms, "times_faster": faster(rounds, 0, 2)},
        {"name": f"{head}first run", "ours": cold_ms, "datasets": theirs_ms, "times_faster": faster(rounds, 1, 2)},
    ]


def waiting(folder: Path, args: argparse.Namespace) -> Row:
    """Percent of a short run in which it waits for views."""
    images = load_images(DataArguments(dataset=str(folder), image_size=args.size), "train")
    run = {"max_steps": 6, "log_every": 3, "monitor_every": 0, "save_every": 10**6}
    trainer = build_trainer("barlow_twins", "slim", images, args.batch, device=torch.device(args.device), **run)
    trainer.train()
    last = [line for line in read_metrics(trainer.run_dir / "metrics.jsonl") if line["kind"] == "train"][-1]
    return {"name": "waiting for views, % of a run", "ours": last["data_wait_percent"]}


def main() -> None:
    arguments = parser(__doc__, seconds=10)
    arguments.add_argument("--images", type=int, default=1024)
    arguments.add_argument("--side", type=int, default=256, help="of the JPEGs")
    arguments.add_argument("--size", type=int, default=64, help="of the views")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--workers", type=int, default=2, help="of the DataLoader that ours is compared with")
    args = arguments.parse_args()
    if args.quick:
        args.images, args.batch, args.seconds = 64, 16, 0.5
    prepare(args)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_jpegs(folder, args.images, args.side)
        table.add(decoding(folder, args))
        for row in first_batches(folder, args):
            table.add(row)
        table.add(waiting(folder, args))
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
