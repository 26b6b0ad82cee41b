"""How fast are images ready: epochs of photos, the first batch of a run, decoding, and the wait for views in a run?

    python benchmarks/loader.py --machine cpu --threads 2 [--quick] [--only photos]

Folders of JPEGs are made first; all files are in the machine's memory by then.

Photos: seconds of an epoch of two views of 224 pixels (crop, flip, color jitter, grayscale, normalized, by the same
settings) of photos of 500 x 375 and of 4000 x 3000 pixels, decoding included. Ours crops from the files in every epoch
(`data.cache=none`; which files can be read was noted by an earlier run), or decodes once into a file (the first epoch,
with the decoding, and any later one). Lightly's is
`LightlyDataset` with its `SimCLRTransform`, torchvision's a v2 chain on uint8 tensors, both in a DataLoader; all have
`--workers` processes or threads.

Decoding, in images per second to squares of the cache's side: ours (`load_images`, threads), a plain loop of PIL, and
`datasets` with torchvision's transforms in a DataLoader of `--workers` processes, which is also what a first batch is
compared with. "wait" is what a run's own log says: the share of its time in which it waits for views. Writes
benchmarks/results/<machine>/loader.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
from common import Row, Table, clocked, faster, medians, parser, prepare, take_turns, write
from datasets import load_dataset
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from ours import MEAN, STD, build_trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.loader import ViewLoader
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.runs.reader import read_metrics
from hf_ssl_or.structures import ViewSpec

VIEWS = [ViewSpec(), ViewSpec()]
COLUMNS = {
    "name": ("question", ""),
    "ours": ("ours", ".1f"),
    "pil": ("PIL loop", ".1f"),
    "datasets": ("datasets", ".1f"),
    "times_faster": ("faster", ".2f"),
}
PHOTO_COLUMNS = {
    "name": ("an epoch of photos, by", ""),
    "pixels": ("photos", ""),
    "seconds": ("seconds", ".2f"),
    "photos_per_s": ("photos/s", ".1f"),
    "times_faster": ("ours faster", ".2f"),
}


def make_jpegs(folder: Path, count: int, side: int) -> None:
    """Writes smooth images of noise, about as large as photographs are."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05}.jpg", quality=90)


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Writes JPEGs with detail at all scales, as large as a camera's."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        pixels = np.zeros((height, width, 3))
        for octave in range(3, 8):
            size = (max(2, width >> octave), max(2, height >> octave))
            coarse = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 5
        pixels += generator.normal(0, 6, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=90)


def our_epoch(folder: Path, args: argparse.Namespace, cache: str, kept: Path | None) -> Callable[[], None]:
    """Returns a function that makes the views of all photos; with `kept`, from what an earlier call stored."""

    def epoch(place: Path) -> None:
        data = DataArguments(
            dataset=str(folder), image_size=224, cache=cache, cache_dir=str(place), num_workers=args.workers
        )
        data = dataclasses.replace(data, mean=list(MEAN), std=list(STD))
        loader = ViewLoader(load_images(data, "train"), VIEWS, batch_size=args.photo_batch, seed=0)
        for _ in loader.batches(0, loader.steps_per_epoch):
            pass

    def run() -> None:
        if kept is not None:
            return epoch(kept)
        with tempfile.TemporaryDirectory() as place:
            epoch(Path(place))

    return run


def lightly_epoch(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    spec = ViewSpec()
    transform = SimCLRTransform(
        input_size=224,
        cj_prob=spec.jitter,
        cj_strength=1.0,
        cj_bright=spec.brightness,
        cj_contrast=spec.contrast,
        cj_sat=spec.saturation,
        cj_hue=spec.hue,
        min_scale=spec.crop_scale[0],
        random_gray_scale=spec.grayscale,
        gaussian_blur=0.0,
        normalize={"mean": list(MEAN), "std": list(STD)},
    )
    images = LightlyDataset(str(folder), transform=transform)
    return epoch_of(DataLoader(images, args.photo_batch, shuffle=True, drop_last=True, num_workers=args.workers))


def torchvision_epoch(folder: Path, args: argparse.Namespace) -> Callable[[], None]:
    spec = ViewSpec()
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=spec.crop_scale, ratio=spec.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(spec.flip),
            v2.RandomApply([jitter], p=spec.jitter),
            v2.RandomGrayscale(spec.grayscale),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    images = Photos(sorted(folder.glob("*.jpg")), chain)
    return epoch_of(DataLoader(images, args.photo_batch, shuffle=True, drop_last=True, num_workers=args.workers))


class Photos(Dataset):
    """Two views of each file, as one writes it with torchvision."""

    def __init__(self, files: list[Path], chain: v2.Transform) -> None:
        self.files, self.chain = files, chain

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(self.files[i]).convert("RGB"))
        return [self.chain(image) for _ in VIEWS]


def epoch_of(loader: DataLoader) -> Callable[[], None]:
    def run() -> None:
        for _ in loader:
            pass

    return run


def photos(args: argparse.Namespace) -> list[Row]:
    """Measures epochs of photos of two sizes."""
    rows, table = [], Table(PHOTO_COLUMNS)
    for width, height, count in ((500, 375, args.photos), (4000, 3000, max(16, args.photos // 8))):
        with tempfile.TemporaryDirectory() as name:
            folder, kept = Path(name) / "photos", Path(name) / "kept"
            count -= count % args.photo_batch if count >= args.photo_batch else 0
            make_photos(folder, count, width, height)
            makers = {
                "ours, from the files": our_epoch(folder, args, "none", kept),
                "ours, the first epoch": our_epoch(folder, args, "disk", None),
                "ours, later epochs": our_epoch(folder, args, "disk", kept),
                "lightly": lightly_epoch(folder, args),
                "torchvision v2": torchvision_epoch(folder, args),
            }
            rounds = take_turns([clocked(run, torch.device("cpu")) for run in makers.values()], args.seconds)
            for place, (name, seconds) in enumerate(zip(makers, medians(rounds, 1.0), strict=True)):
                row: Row = {"name": name, "pixels": f"{width} x {height}", "seconds": seconds}
                row |= {"photos_per_s": count / seconds}
                row |= {"times_faster": faster(rounds, 1, place) if place > 2 else None}
                if place > 2:
                    row |= {"from_files_faster": faster(rounds, 0, place), "later_faster": faster(rounds, 2, place)}
                table.add(row)
            rows += table.rows[-len(makers) :]
    return rows


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
    last = [line for line in read_metrics(trainer.run_dir / "metrics.jsonl").lines if line["kind"] == "train"][-1]
    return {"name": "waiting for views, % of a run", "ours": last["data_wait_percent"]}


def main() -> None:
    arguments = parser(__doc__, seconds=10)
    arguments.add_argument("--images", type=int, default=1024)
    arguments.add_argument("--side", type=int, default=256, help="of the JPEGs")
    arguments.add_argument("--size", type=int, default=64, help="of the views")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--workers", type=int, default=2, help="of the DataLoader that ours is compared with")
    arguments.add_argument("--photos", type=int, default=256, help="of 500 x 375; an eighth of 4000 x 3000")
    arguments.add_argument("--photo-batch", type=int, default=16)
    arguments.add_argument("--only", choices=["photos", "others"], help="one half of the questions")
    args = arguments.parse_args()
    if args.quick:
        args.images, args.batch, args.seconds, args.photos = 64, 16, 0.5, 32
    prepare(args)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    of_photos = photos(args) if args.only != "others" else []
    if args.only == "photos":
        return write(__file__, args, photos=of_photos)
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_jpegs(folder, args.images, args.side)
        table.add(decoding(folder, args))
        for row in first_batches(folder, args):
            table.add(row)
        table.add(waiting(folder, args))
    write(__file__, args, rows=table.rows, photos=of_photos)
    return None


if __name__ == "__main__":
    main()
