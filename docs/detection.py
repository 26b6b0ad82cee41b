"""Trains Faster R-CNN on an encoder of this package and prints the average precision on the test images.

    python docs/detection.py ENCODER DATASET --epochs 10
    python docs/detection.py ENCODER DATASET --epochs 10 --from-scratch
    python docs/detection.py ENCODER --voc FOLDER --head c4 --json voc.json

ENCODER is a folder or a Hub id, a ResNet with the standard stem or a ViT. DATASET is a Hub id or a folder with `train`
and `test` splits of `image` and `objects` (`bbox` as x, y, width, height in pixels, and `category`). FOLDER holds
VOC2007 and perhaps VOC2012 as they come, with JPEGImages, Annotations and ImageSets/Main, also under VOCdevkit: trains
on trainval of both, tests on test of 2007. `--from-scratch` draws the encoder's weights anew: the run to compare with.
`--max-steps 2` is a smoke test.

`--head pyramid` (default) puts a feature pyramid on the encoder and trains with AdamW. `--head c4`, for ResNets, is
MoCo's detector on VOC with the batch and learning rate of He, Du, Ma (NeurIPS 2024): 24,000 steps of 9 images, a batch
norm after the head's stage, batch norms that are trained and whose statistics are measured anew before the test. Its
cost: not measured. AP is COCO's (mean over IoU 0.50 to 0.95, 101 points of recall), not the 11 points of VOC07.
Objects that VOC calls difficult are trained on; the test ignores them and, as COCO does with crowds, what is found on
them.

Needs `pip install "hf-ssl-or[detection]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoConfig, AutoImageProcessor

from hf_ssl_or import SSLResNetBackbone, SSLResNetModel, SSLViTBackbone
from hf_ssl_or.errors import InputError
from hf_ssl_or.evaluation.detection import (
    VOC_CLASSES,
    PyramidBackbone,
    build_c4_detector,
    load_voc,
    update_batch_norm,
)

FAMILIES = {"ssl_resnet": SSLResNetBackbone, "ssl_vit": SSLViTBackbone}

# Settings that depend on the head. Of several image sizes (shorter side) a training image takes one at random, a test
# image the last. c4: MoCo's for VOC07+12, apart from batch and learning rate, which were 16 and 0.02.
PYRAMID = {
    "epochs": 10,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "image_size": [300],
    "smallest_anchor": 16,
    "width": 256,
}
C4 = {"steps": 24_000, "batch_size": 9, "learning_rate": 0.01, "image_size": [*range(480, 801, 32)]}
HEADS: dict[str, dict[str, Any]] = {"pyramid": PYRAMID, "c4": C4}
C4_WARMUP, C4_DECAYS, C4_LONGER_SIDE, C4_NORM_BATCHES = 100, (18 / 24, 22 / 24), 1333, 200

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def build_detector(options: argparse.Namespace, num_classes: int) -> FasterRCNN:
    """Puts the head on the encoder; class 0 is the background."""
    config = AutoConfig.from_pretrained(options.encoder)
    if config.model_type not in (FAMILIES if options.head == "pyramid" else ["ssl_resnet"]):
        takes = "a ResNet or a ViT" if options.head == "pyramid" else "a ResNet"
        raise InputError(
            f"--head {options.head}: takes {takes} of this package, {options.encoder} is {config.model_type}"
        )
    processor = AutoImageProcessor.from_pretrained(options.encoder)
    colors = {"image_mean": processor.image_mean, "image_std": processor.image_std}
    if options.head == "c4":
        encoder = SSLResNetModel(config) if options.from_scratch else SSLResNetModel.from_pretrained(options.encoder)
        sizes = {"min_size": tuple(options.image_size), "max_size": C4_LONGER_SIDE}
        return build_c4_detector(encoder, 1 + num_classes, **sizes, **colors)
    config.out_features = config.stage_names[1:] if config.model_type == "ssl_resnet" else config.stage_names[-1:]
    family = FAMILIES[config.model_type]
    backbone = family(config) if options.from_scratch else family.from_pretrained(options.encoder, config=config)
    pyramid = PyramidBackbone(backbone, options.width)
    anchors = tuple((options.smallest_anchor * 2**level,) for level in range(pyramid.levels))
    return FasterRCNN(
        pyramid,
        1 + num_classes,
        min_size=tuple(options.image_size),
        max_size=max(options.image_size),
        rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * pyramid.levels),
        box_roi_pool=MultiScaleRoIAlign(pyramid.names, output_size=7, sampling_ratio=2),
        box_batch_size_per_image=128,
        **colors,
    )


def read_sets(options: argparse.Namespace) -> tuple[Sequence[dict], Sequence[dict], int]:
    """Returns the images for training, those for the test, and the number of classes."""
    if (options.dataset is None) == (options.voc is None):
        raise InputError("either DATASET or --voc FOLDER")
    if options.voc is not None:
        train, test = load_voc(options.voc)
        num_classes = len(VOC_CLASSES)
    else:
        splits = load_dataset(options.dataset)
        train, test = splits["train"], splits["test"]
        num_classes = len(train.features["objects"]["category"].feature.names)
    train, test = (torch.utils.data.Subset(rows, range(min(options.limit, len(rows)))) for rows in (train, test))
    if len(train) < options.batch_size:
        raise InputError(f"--batch-size {options.batch_size}: there are {len(train)} images to train on, take fewer")
    return train, test, num_classes


def read(row: dict, device: torch.device, flip: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns an image (3, H, W) in [0, 1] and its boxes as corners (n, 4), labels from 1, and which to ignore."""
    image = pil_to_tensor(row["image"].convert("RGB")).float() / 255
    boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    if flip:
        image, boxes[:, [0, 2]] = image.flip(-1), image.shape[-1] - boxes[:, [2, 0]]
    labels = 1 + torch.tensor(row["objects"]["category"], dtype=torch.int64)
    difficult = torch.tensor(row["objects"].get("difficult", [0] * len(labels)), dtype=torch.int64)
    target = {"boxes": boxes, "labels": labels, "iscrowd": difficult}  # COCO's metric ignores crowds
    return image.to(device), {name: value.to(device) for name, value in target.items()}


def batches(rows: Sequence[dict], options: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """Yields batches without end, in a new order each epoch; images are mirrored at random."""
    rng = np.random.default_rng(options.seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - options.batch_size + 1, options.batch_size):
            chosen = [int(i) for i in order[start : start + options.batch_size]]
            images, targets = zip(*(read(rows[i], device, rng.random() < 0.5) for i in chosen), strict=True)
            yield list(images), list(targets)


def build_optimizer(
    detector: FasterRCNN, options: argparse.Namespace, steps: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Returns AdamW with one cycle for the pyramid, SGD with a warm-up and two decays for c4."""
    if options.head == "pyramid":
        optimizer = torch.optim.AdamW(detector.parameters(), options.learning_rate, weight_decay=1e-2)
        return optimizer, OneCycleLR(optimizer, options.learning_rate, steps)

    def factor(step: int) -> float:
        warm = min(1.0, 1e-3 + (1 - 1e-3) * step / C4_WARMUP)
        return warm * 0.1 ** sum(step >= decay * steps for decay in C4_DECAYS)

    norms = [p for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    others = set(detector.parameters()).difference(norms)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": [p for p in detector.parameters() if p in others]}]
    sgd = torch.optim.SGD(groups, options.learning_rate, momentum=0.9, weight_decay=1e-4)
    return sgd, LambdaLR(sgd, factor)


def train(detector: FasterRCNN, rows: Sequence[dict], options: argparse.Namespace, device: torch.device) -> None:
    """Trains all weights; c4 then measures its batch norms' statistics."""
    c4 = options.head == "c4"
    steps = options.steps if c4 else options.epochs * (len(rows) // options.batch_size)
    taken = steps if options.max_steps is None else min(steps, options.max_steps)
    optimizer, schedule = build_optimizer(detector, options, steps)
    data = batches(rows, options, device)
    detector.train()
    for images, targets in islice(data, taken):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        if not c4:
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if c4:
        update_batch_norm(detector, islice(data, min(taken, C4_NORM_BATCHES)))


@torch.no_grad()
def evaluate(detector: FasterRCNN, rows: Sequence[dict], device: torch.device) -> dict[str, float | None]:
    """Returns the average precision (IoU 0.50 to 0.95, at 0.50 and at 0.75), in percent; None without objects."""
    metric = MeanAveragePrecision()
    detector.eval()
    for i in range(len(rows)):
        image, target = read(rows[i], device)
        metric.update(detector([image]), [target])
    found = metric.compute()  # -1 where no object counts
    values = {"AP": float(found["map"]), "AP50": float(found["map_50"]), "AP75": float(found["map_75"])}
    return {name: None if value < 0 else round(100 * value, 2) for name, value in values.items()}


def positive(text: str) -> int:
    """Reads a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {text}")
    return int(text)


def parse_options() -> argparse.Namespace:
    """Reads the command line; what was left out takes the head's own value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--voc", type=Path, metavar="FOLDER")
    parser.add_argument("--head", choices=list(HEADS), default="pyramid")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--max-steps", type=positive, help="stops training there, with the schedule of the full run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the result there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=positive, default=10**9)
    parser.add_argument("--image-size", type=positive, nargs="+")
    parser.add_argument("--learning-rate", type=float)
    for name in ("epochs", "steps", "batch-size", "smallest-anchor", "width"):
        parser.add_argument(f"--{name}", type=positive)
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: its folder does not exist, create it first")
    own = HEADS[options.head]
    for name in {name for head in HEADS.values() for name in head}:
        given = getattr(options, name)
        if given is not None and name not in own:
            raise InputError(f"--{name.replace('_', '-')}: no setting of --head {options.head}")
        setattr(options, name, own.get(name) if given is None else given)
    return options


def main() -> None:
    """Trains, evaluates, prints JSON."""
    options = parse_options()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, test, num_classes = read_sets(options)
    detector = build_detector(options, num_classes).to(device)
    train(detector, rows, options, device)
    settings = {name: value for name, value in vars(options).items() if value is not None}
    result = json.dumps({**evaluate(detector, test, device), **settings}, default=str)
    print(result)
    if options.json:
        options.json.write_text(result + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
