"""What is not in the central square: crops of whole wide pictures against crops of their central squares.

    HF_SSL_OR_DATA=data python benchmarks/wide_pictures.py --machine cpu

Every training picture is a canvas of 64 x 192 pixels, filled with a texture of DTD, onto which a photo of Imagenette
(64 x 64) is pasted off center: its middle lies in the left or in the right third, so that the central square shows
half of it or none. One arm pretrains on crops of the whole pictures, the other on crops of their central squares (what
a center crop before the random crop leaves); the same recipe, the same number of views, the same initial weights. kNN
on the photos themselves, labeled train and test split, then says what the encoder has learned of photos.

Figures are mean and standard deviation over the seeds, which decide weights, order, augmentation, and which texture
and place a photo gets. Pictures and runs are kept in `--runs`, and continued if the script is started again. Writes
benchmarks/results/<machine>/wide_pictures.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
from common import Row, Table, parser, write
from PIL import Image

from hf_ssl_or.runs.reader import read_run

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "cifar10" / "barlow_twins" / "resnet18-slim.yaml"
ARMS = ("central squares", "whole pictures")
HEIGHT, WIDTH = 64, 192
COLUMNS = {"name": ("crops of", ""), "knn": ("kNN %", ".2f"), "knn_std": ("+-", ".2f"), "seconds": ("seconds", ".0f")}


def paste(photo: Image.Image, texture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pastes a photo off center onto a canvas of texture."""
    scale = max(WIDTH / texture.width, HEIGHT / texture.height)
    size = (max(WIDTH, round(texture.width * scale)), max(HEIGHT, round(texture.height * scale)))
    canvas = texture.convert("RGB").resize(size).crop((0, 0, WIDTH, HEIGHT))
    left = int(rng.integers(0, WIDTH // 6 + 1))
    canvas.paste(photo.convert("RGB"), (left if rng.random() < 0.5 else WIDTH - HEIGHT - left, 0))
    return canvas


def write_pictures(folder: Path, data: Path, seed: int, limit: int | None) -> None:
    """Writes the pictures of a seed, whole and as central squares."""
    if (folder / "done").exists():
        return
    photos = datasets.load_dataset(str(data / "imagenette64"), split="train")
    textures = datasets.load_dataset(str(data / "dtd10"), split="train")
    rng = np.random.default_rng(seed)
    for arm in ARMS:
        (folder / arm.replace(" ", "-")).mkdir(parents=True, exist_ok=True)
    for i in range(min(len(photos), limit or len(photos))):
        picture = paste(photos[i]["image"], textures[int(rng.integers(len(textures)))]["image"], rng)
        picture.save(folder / "whole-pictures" / f"{i:05d}.png", compress_level=1)
        left = (WIDTH - HEIGHT) // 2
        square = picture.crop((left, 0, left + HEIGHT, HEIGHT))
        square.save(folder / "central-squares" / f"{i:05d}.png", compress_level=1)
    (folder / "done").touch()


def run(arm: str, seed: int, folder: Path, data: Path, epochs: int, threads: int) -> Path:
    """Pretrains and evaluates, or continues what an earlier call left; returns the run's folder."""
    name = arm.replace(" ", "-")
    output = folder / f"run-{name}"
    if (output / "results.json").exists():
        return output
    settings = [
        f"data.dataset={folder / name}",
        "data.image_size=32",
        f"data.cache_dir={folder / 'cache'}",
        f"evaluation_data={{dataset: {data / 'imagenette64'}, image_size: 32, cache_dir: {folder / 'cache'}}}",
        "evaluation.protocols=[knn]",
        "evaluation.baselines=false",
        "orthogonality.penalty=none",
        "views.count=2",
        "training.batch_size=128",
        "training.keep_best=null",
        f"training.epochs={epochs}",
        f"training.monitor_every={epochs}",
        f"training.seed={seed}",
    ]
    command = [sys.executable, "-m", "hf_ssl_or", "train", str(RECIPE), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    resume = ["--resume"] if output.exists() else []
    done = subprocess.run([*command, *resume, *settings], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arm}, seed {seed}: {done.stderr[-2000:]}")
    print(f"{arm}, seed {seed}: done", file=sys.stderr, flush=True)
    return output


def summary(arm: str, folders: list[Path]) -> Row:
    """Returns mean and standard deviation over the seeds."""
    records = [read_run(folder) for folder in folders]
    values = [one.evaluations[0].headline_metric.mean for one in records]
    return {
        "name": arm,
        "seeds": len(values),
        "knn": statistics.fmean(values),
        "knn_std": statistics.stdev(values) if len(values) > 1 else None,
        "knn_values": values,
        "seconds": statistics.fmean(one.step_seconds or 0.0 for one in records),
    }


def main() -> None:
    arguments = parser(__doc__, seconds=0)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("HF_SSL_OR_DATA", "data")))
    arguments.add_argument("--runs", type=Path, default=Path("runs/wide-pictures"), help="where all is kept")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=12)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.epochs = [0], 1
    folders: dict[str, list[Path]] = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        folder = args.runs / f"seed-{seed}"
        write_pictures(folder, args.data, seed, 500 if args.quick else None)
        for arm in ARMS:
            folders[arm].append(run(arm, seed, folder, args.data, args.epochs, args.threads))
    table = Table(COLUMNS)
    for arm in ARMS:
        table.add(summary(arm, folders[arm]))
    args.data, args.runs = args.data.name, args.runs.name
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
