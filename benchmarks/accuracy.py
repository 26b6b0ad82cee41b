"""How good is the encoder, and how soon? Views, the projector's width, penalties and fewer images, over several seeds.

    python benchmarks/accuracy.py --dataset FOLDER_OR_HUB_ID --machine cpu
    python benchmarks/accuracy.py --machine h200 --recipe recipes/cifar10/barlow_twins/resnet18-none.yaml \
        --epochs 200 --look 5 --fraction 1 --thresholds 80 85 88 90 --jobs 1 --threads 16

Every arm changes one thing of the recipe, and sees the same number of views: with four views of each image it runs for
half of the epochs, unless its images are halved. The schedule of the learning rate spans each run. The recipe's other
settings are the same for all arms and were not tuned for any of them. By default the recipe is that of a slim ResNet
with a fifth of CIFAR-10's images, which ends far below what a full run reaches: it compares arms, and is no record.

kNN and the linear probe are fit on the full training split and evaluated on the full test split. "To" a
threshold counts the views that were trained on, in thousands, until kNN (on the monitor's sample of images) gets
there: linear between two evaluations, the first one's if it is there already; a dash: not all seeds got there.
Seconds are those of training steps, without looks, and mean little where runs share the machine (`--jobs`) with each
other or anything else. Seeds decide weights, order and augmentation of a run; figures are mean and standard deviation
over the seeds.

Runs are kept in `--runs`, and continued from where they were if the script is started again. Writes
benchmarks/results/<machine>/accuracy.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Row, Table, parser, write

from hf_ssl_or.runs.reader import read_metrics, read_run

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "cifar10" / "barlow_twins" / "resnet18-slim.yaml"
# Name -> (views, share of the images, other changes). The first is what the others change.
ARMS: dict[str, tuple[int, float, tuple[str, ...]]] = {
    "2 views": (2, 1.0, ()),
    "4 views": (4, 1.0, ()),
    "8 views": (8, 1.0, ()),
    "projector of 8192": (2, 1.0, ("method.projector_dim=8192",)),
    "SO": (2, 1.0, ("orthogonality.penalty=so",)),
    "SO, a hundred times its weight": (2, 1.0, ("orthogonality.penalty=so", "orthogonality.weight=1e-4")),
    "SRIP": (2, 1.0, ("orthogonality.penalty=srip",)),
    "4 views, SO": (4, 1.0, ("orthogonality.penalty=so",)),
    "4 views, half the images": (4, 0.5, ()),
}
COLUMNS = {
    "name": ("arm", ""),
    "epochs": ("epochs", "d"),
    "knn": ("kNN %", ".2f"),
    "knn_std": ("+-", ".2f"),
    "linear": ("linear %", ".2f"),
    "linear_std": ("+-", ".2f"),
    "rankme": ("RankMe", ".1f"),
    "rankme_std": ("+-", ".1f"),
    "seconds": ("seconds", ".0f"),
}


def changes(arm: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Returns the recipe's settings of one run."""
    views, share, others = ARMS[arm]
    epochs = round(args.epochs * 2 / (views * share))
    return [
        *((f"data.dataset={args.dataset}",) if args.dataset else ()),
        f"data.fraction={args.fraction * share}",
        f"views.count={views}",
        f"training.epochs={epochs}",
        f"training.monitor_every={max(1, round(args.look * epochs / args.epochs))}",
        f"training.save_every={epochs}",
        f"training.seed={seed}",
        "training.keep_best=null",
        "training.log_every=10",
        f"method.projector_dim={args.dim}",
        "orthogonality.penalty=none",
        f"evaluation_data={{dataset: {args.dataset or 'uoft-cs/cifar10'}}}",
        "evaluation.protocols=[knn, linear-lbfgs]",
        "evaluation.baselines=false",
        *others,
        *args.set,
    ]


def run(arm: str, seed: int, args: argparse.Namespace) -> Path:
    """Trains and evaluates, or continues with what an earlier call left; gives the run's folder."""
    folder = args.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    if (folder / "results.json").exists():
        return folder
    command = [sys.executable, "-m", "hf_ssl_or", "train", str(args.recipe), "--output", str(folder)]
    threads = {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *(["--resume"] if folder.exists() else []), *changes(arm, seed, args)],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{arm}, seed {seed}: {done.stderr[-2000:]}")
    print(f"{arm}, seed {seed}: done", file=sys.stderr, flush=True)
    return folder


def looks(folder: Path, batch: int, views: int) -> list[tuple[float, float, float]]:
    """Returns thousands of views, seconds in steps and kNN accuracy of every look."""
    seconds, done, found = 0.0, 0, []
    for line in read_metrics(folder / "metrics.jsonl").lines:
        if line["kind"] == "train":
            seconds += (line["step"] + 1 - done) * batch / line["images_per_second"]
            done = line["step"] + 1
        elif "knn" in line:
            found.append((done * batch * views / 1000, seconds, line["knn"]))
    return found


def cost(threshold: float, curve: list[tuple[float, float, float]]) -> tuple[float | None, float | None]:
    """Returns views and seconds until the curve first is at the threshold, linear between evaluations, or None."""
    if curve[0][2] >= threshold:
        return curve[0][:2]
    for early, late in pairwise(curve):
        if late[2] >= threshold:
            share = (threshold - early[2]) / (late[2] - early[2])
            return early[0] + share * (late[0] - early[0]), early[1] + share * (late[1] - early[1])
    return None, None


def measures(folder: Path, thresholds: list[float]) -> dict[str, float | None]:
    """Reads what one run came to."""
    run = read_run(folder)
    curve = looks(folder, run.recipe["training"]["batch_size"], run.recipe["views"]["count"])
    costs = {threshold: cost(threshold, curve) for threshold in thresholds}
    top1 = {entry.protocol: entry.headline_metric.mean for entry in run.evaluations}
    return {
        "knn": top1["knn"],
        "linear": top1["linear-lbfgs"],
        "rankme": run.results.collapse.measures["rankme"],
        "seconds": run.step_seconds,
        **{f"to_{threshold:g}": views for threshold, (views, _) in costs.items()},
        **{f"seconds_to_{threshold:g}": seconds for threshold, (_, seconds) in costs.items()},
    }


def summary(arm: str, folders: list[Path], args: argparse.Namespace) -> Row:
    """Returns mean and standard deviation over the seeds; None where a seed has no value."""
    found = [measures(folder, args.thresholds) for folder in folders]
    row: Row = {"name": arm, "epochs": read_run(folders[0]).recipe["training"]["epochs"], "seeds": len(found)}
    for key in found[0]:
        values: list[Any] = [one[key] for one in found]
        known = None not in values
        row[key] = statistics.fmean(values) if known else None
        row[f"{key}_std"] = statistics.stdev(values) if known and len(values) > 1 else None
        row[f"{key}_values"] = values
    return row


def main() -> None:
    arguments = parser(__doc__, seconds=0)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--dataset", help="CIFAR-10's folder or Hub id (default: the recipe's)")
    arguments.add_argument("--recipe", type=Path, default=RECIPE)
    arguments.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="where runs are kept")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=12, help="with two views")
    arguments.add_argument("--look", type=int, default=1, help="epochs between two looks, with two views")
    arguments.add_argument("--fraction", type=float, default=0.2, help="share of the training images")
    arguments.add_argument("--dim", type=int, default=256, help="width of the projector's output")
    arguments.add_argument("--thresholds", type=float, nargs="+", default=[36, 38, 40], help="of kNN, in percent")
    arguments.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments.add_argument("--set", nargs="*", default=["training.batch_size=128"], help="more settings for all")
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.fraction, args.arms = [0], 4, 0.02, args.arms[:2]
    pairs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(pairs, pool.map(lambda pair: run(*pair, args), pairs), strict=True))
    table = Table(COLUMNS | {f"to_{t:g}": (f"to {t:g} %", ".0f") for t in args.thresholds})
    for arm in args.arms:
        table.add(summary(arm, [folders[arm, seed] for seed in args.seeds], args))
    args.recipe, args.runs = args.recipe.name, args.runs.name
    args.dataset = Path(args.dataset).name if args.dataset else None
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
