"""Images per second of the views: this package, kornia, and torchvision image by image, on the same images.

    python benchmarks/views.py --machine cpu --threads 2

All three draw crop, flip, colour jitter and grayscale from the same settings. The three take turns, so that a busy
machine slows them alike; the figures are the medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import kornia
import kornia.augmentation as K
import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from hf_ssl_or.data.views import draw_parameters, render_views
from hf_ssl_or.structures import ViewSpec

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def ours(images: Tensor, spec: ViewSpec, views: int) -> Callable[[int], Tensor]:
    index, side = np.arange(len(images)), images.shape[-1]

    def run(turn: int) -> Tensor:
        parameters = draw_parameters([spec] * views, seed=0, epoch=turn, index_B=index, source_size=side)
        return render_views(images, parameters, MEAN, STD)

    return run


def with_kornia(images: Tensor, spec: ViewSpec, views: int) -> Callable[[int], Tensor]:
    side = images.shape[-1]
    jitter = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    chain = K.AugmentationSequential(
        K.RandomResizedCrop((side, side), scale=spec.crop_scale, ratio=spec.crop_ratio),
        K.RandomHorizontalFlip(p=spec.flip),
        K.ColorJitter(*jitter, p=spec.jitter),
        K.RandomGrayscale(p=spec.grayscale),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        same_on_batch=False,
    )
    return lambda turn: chain(images.float().div(255).repeat(views, 1, 1, 1))


def with_torchvision(images: Tensor, spec: ViewSpec, views: int) -> Callable[[int], Tensor]:
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(images.shape[-1], scale=spec.crop_scale, ratio=spec.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(spec.flip),
            v2.RandomApply([jitter], p=spec.jitter),
            v2.RandomGrayscale(spec.grayscale),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return lambda turn: torch.stack([chain(image) for _ in range(views) for image in images])


def measure(runs: dict[str, Callable[[int], Tensor]], images: int, rounds: int) -> dict[str, float]:
    """Gives views per second of each, from rounds in which each has one turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - start)
    return {name: images / statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = []
    for size in arguments.sizes:
        images = torch.randint(0, 256, (arguments.batch, 3, size, size), dtype=torch.uint8)
        makers = (ours, with_kornia, with_torchvision)
        runs = {make.__name__: make(images, ViewSpec(), arguments.views) for make in makers}
        speeds = measure(runs, arguments.batch * arguments.views, arguments.rounds)
        results.append({"size": size, "views_per_s": {name: round(speed) for name, speed in speeds.items()}})
        print(f"{size} px, batch {arguments.batch}, {arguments.views} views, {arguments.threads} threads")
        for name, speed in speeds.items():
            print(f"  {name:18} {speed:10,.0f} views/s   1 : {speeds['ours'] / speed:.1f}")
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "kornia": kornia.__version__}
    settings = {key: value for key, value in vars(arguments).items() if key != "sizes"}
    out = Path(__file__).parent / "results" / arguments.machine / "views.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"cpu": platform.processor() or platform.machine(), **settings, "versions": versions, "results": results}
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
