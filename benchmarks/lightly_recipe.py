"""Lightly's recipe of Barlow Twins around the encoder of a recipe of ours: how good, and how soon?

    python benchmarks/lightly_recipe.py --recipe recipes/papers/cpu/resnet.yaml --seed 0 --output runs/lightly-0

As an arm of a sweep, whose `time_to` then says how much sooner others are as good:

    lightly: {command: [python, benchmarks/lightly_recipe.py, --recipe, R, --seed, "{seed}", --output, "{output}"]}

The recipe gives the images (the very rows of its `data.fraction`), the encoder with the weights it starts from, the
batch size, the epochs, the precision and the evaluation; its method, views and penalty are not used, and its optimizer
with `--adamw` alone, which tells what of a difference is the optimizer's. The
rest is a loop as lightly's examples put it together for CIFAR-10: its views of BYOL without blur on PIL images, which
a DataLoader makes; each view encoded by itself; its projection head of three layers (2048 wide) and its loss. SGD is
that of its CIFAR-10 benchmark: a learning rate of 0.06 per 128 images, momentum 0.9, weight decay 5e-4, a cosine to 0
that moves once per epoch. Views are normalized with the recipe's mean and standard deviation, as evaluation is.

After each epoch kNN is measured on the images that the monitor of a run takes, and at the end the protocols of the
recipe are run, as after a run. Minutes are those of training, waiting for views included and evaluations left out, as
in a run's log. On a CPU the same seed gives the same weights. Writes results.json into `--output`: the columns of a
run, and its `curve`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hf_ssl_or.callbacks.monitor import knn_of, validation_split
from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.evaluation.evaluator import evaluate_encoder
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.randomness import hashed_seed
from hf_ssl_or.recipe import Recipe, load_recipe
from hf_ssl_or.run import build_method, labeled_images, load_training_images

LR, BATCH, MOMENTUM, WEIGHT_DECAY = 0.06, 128, 0.9, 5e-4


class TwoViews(Dataset):
    """Two views of each image, as torchvision's CIFAR10 with lightly's transform gives them.

    Args:
        images: What is viewed; its pixels are decoded already.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        how: Any = {
            "input_size": images.image_size,
            "gaussian_blur": 0.0,
            "normalize": {"mean": list(images.mean), "std": list(images.std)},
        }
        self.transform = BYOLTransform(BYOLView1Transform(**how), BYOLView2Transform(**how))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> list[Tensor]:
        return self.transform(Image.fromarray(self.images.full_image(place)))


class BarlowTwins(nn.Module):
    """Encoder, lightly's projection head and its loss.

    Args:
        encoder: Of this package.
        hidden: Width of the head's hidden layers.
        dim: Width of the projections.
    """

    def __init__(self, encoder: Any, hidden: int, dim: int) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder, BarlowTwinsLoss()
        self.projector = BarlowTwinsProjectionHead(encoder.config.hidden_size, hidden, dim)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Returns the loss."""
        return self.criterion(*(self.projector(self.encoder(view).pooler_output) for view in views))


def train_epoch(
    module: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, device: torch.device, precision: str
) -> float:
    """Takes the steps of one epoch and returns their seconds."""
    module.train()
    started = time.perf_counter()
    for views in loader:
        views = [view.to(device, non_blocking=True) for view in views]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = module(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def run(recipe: Recipe, hidden: int, dim: int, workers: int, adamw: bool) -> dict[str, Any]:
    """Trains and evaluates; returns what results.json holds."""
    training, seed = recipe.training, recipe.training.seed
    device = torch.device("cuda" if training.device == "auto" and torch.cuda.is_available() else "cpu")
    images = load_training_images(recipe)
    labeled = labeled_images(recipe, images)
    if labeled is None or training.max_steps is not None or training.mixed_precision == "fp16":
        raise SystemExit("the recipe: wants labeled images, epochs in place of max_steps, and no fp16")
    if len(images) < training.batch_size:
        raise SystemExit(f"the recipe: {len(images)} images make no batch of {training.batch_size}")
    knn_images = validation_split(labeled[0], training.monitor_images, seed)
    encoder = build_method(recipe).encoder
    set_seeds(hashed_seed(seed, "lightly"))
    module = BarlowTwins(encoder, hidden, dim).to(device)
    loader = DataLoader(
        TwoViews(images), batch_size=training.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    if adamw:
        ours = training.optimizer
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            module.parameters(), ours.lr, weight_decay=ours.weight_decay
        )
    else:
        lr = LR * training.batch_size / BATCH
        optimizer = torch.optim.SGD(module.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.epochs)

    def features(some: ImageSet) -> Tensor:
        return extract_features(encoder, some, progress=False, device=device, mixed_precision=training.mixed_precision)

    minutes, curve = 0.0, []
    for epoch in range(1, training.epochs + 1):
        minutes += train_epoch(module, optimizer, loader, device, training.mixed_precision) / 60
        schedule.step()
        curve.append({"minutes": minutes, "epoch": epoch, "knn": knn_of(features, *knn_images)})
        print(f"epoch {epoch}: {minutes:.2f} minutes, kNN {curve[-1]['knn']:.2f} %", flush=True)
    measured = evaluate_encoder(encoder, *labeled, recipe.evaluation, device=device, progress=False)
    return {"metrics": {**columns(measured), "monitor/knn": curve[-1]["knn"], "minutes": minutes}, "curve": curve}


def columns(measured: dict[str, Any]) -> dict[str, float]:
    """Returns what the table of a sweep shows of a run: the headline of each protocol, and RankMe."""
    found = {
        f"{entry['protocol']}/{entry['headline']}": entry["metrics"][entry["headline"]]["mean"]
        for entry in measured["evaluations"]
    }
    return found | {"rankme": measured["collapse"]["rankme"]}


def set_seeds(seed: int) -> None:
    """Seeds what lightly's and torchvision's transforms draw from, and the loader."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recipe", type=Path, required=True, help="gives images, encoder, batch size and epochs")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--output", type=Path, required=True, help="folder of results.json")
    arguments.add_argument("--epochs", type=int, help="in place of the recipe's")
    arguments.add_argument("--hidden", type=int, default=2048, help="width of the projector's hidden layers")
    arguments.add_argument("--dim", type=int, default=2048, help="width of the projections")
    arguments.add_argument(
        "--adamw", action="store_true", help="AdamW with the recipe's rate and decay in place of SGD"
    )
    arguments.add_argument("--workers", type=int, default=0, help="processes of the DataLoader")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    arguments.add_argument("--quick", action="store_true", help="few images, two epochs, narrow: does it run?")
    args = arguments.parse_args()
    if args.quick:
        args.epochs, args.hidden, args.dim = args.epochs or 2, 64, 64
        args.set += ["data.fraction=0.01", "training.monitor_images=200", "evaluation.train_limit=500"]
    epochs = [] if args.epochs is None else [f"training.epochs={args.epochs}"]
    recipe = load_recipe(args.recipe, [*args.set, *epochs, f"training.seed={args.seed}"])
    results = run(recipe, args.hidden, args.dim, args.workers, args.adamw)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
