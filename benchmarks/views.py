"""Images per second of the views: this package, kornia, and torchvision image by image, on the same images.

    python benchmarks/views.py --machine cpu --threads 2 [--quick] [--sizes 32 96]

All three draw crop, flip, color jitter and grayscale from the same settings. The three take turns, so that a busy
machine slows them alike; the figures are the medians over the rounds, and "faster" the median of the rounds' ratios.
Target: at least 3 times kornia. Writes benchmarks/results/<machine>/views.json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

import kornia.augmentation as K
import numpy as np
import torch
from common import Row, Table, clocked, faster, medians, parser, prepare, take_turns, write
from torch import Tensor
from torchvision.transforms import v2

from hf_ssl_or.data.augmentation_sampling import ViewGroup
from hf_ssl_or.data.views import render_views, sample_parameters
from hf_ssl_or.models.image_conversion import Preprocessing
from hf_ssl_or.structures import ViewSpec

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
COLUMNS = {
    "name": ("views by", ""),
    "size": ("px", "d"),
    "views_per_s": ("views/s", ",.0f"),
    "times_faster": ("faster", ".2f"),
}


def ours(images: Tensor, spec: ViewSpec, views: int) -> Callable[[int], Tensor]:
    index, side = np.arange(len(images)), images.shape[-1]
    images_BHWC, how = images.permute(0, 2, 3, 1).contiguous(), Preprocessing(image_size=side, mean=MEAN, std=STD)

    def run(turn: int) -> Tensor:
        group = ViewGroup(specs=(spec,) * views, size=side, seed=0, epoch=turn)
        return render_views(images_BHWC, sample_parameters(group, index, original_size=(side, side)), how)

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


def with_compiled_kornia(images: Tensor, spec: ViewSpec, views: int) -> Callable[[int], Tensor]:
    """The same chain through torch.compile, which compiles what it can of it between its graph breaks."""
    eager = with_kornia(images, spec, views)
    return torch.compile(lambda turn: eager(0), dynamic=False)


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


def measure(images: Tensor, views: int, budget: float) -> list[Row]:
    """Returns views per second of each, and how many times as fast ours is."""
    makers = {
        "ours": ours,
        "kornia": with_kornia,
        "kornia, compiled": with_compiled_kornia,
        "torchvision": with_torchvision,
    }
    turns, runs = count(), [make(images, ViewSpec(), views) for make in makers.values()]
    works = [clocked(partial(lambda run: run(next(turns)), run), images.device) for run in runs]
    rounds = take_turns(works, budget)
    return [
        {
            "name": name,
            "size": images.shape[-1],
            "views_per_s": views * len(images) / seconds,
            "times_faster": faster(rounds, 0, place) if place else None,
        }
        for place, (name, seconds) in enumerate(zip(makers, medians(rounds, 1.0), strict=True))
    ]


def main() -> None:
    arguments = parser(__doc__, seconds=10)
    arguments.add_argument("--batch", type=int, default=256)
    arguments.add_argument("--views", type=int, default=2)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[32, 96])
    args = arguments.parse_args()
    if args.quick:
        args.batch, args.sizes, args.seconds = 32, [32], 0.5
    device, table = prepare(args), Table(COLUMNS)
    for size in args.sizes:
        images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8, device=device)
        for row in measure(images, args.views, args.seconds):
            table.add(row)
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
