"""Trains Faster R-CNN on an encoder of this package and prints the mean average precision on the test images.

    python docs/detection.py ENCODER DATASET --epochs 10
    python docs/detection.py ENCODER DATASET --epochs 10 --from-scratch

ENCODER is a folder or a Hub id, a ResNet with the standard stem or a ViT. DATASET is a Hub id or a folder with `train`
and `test` splits of `image` and `objects` (`bbox` as x, y, width, height in pixels, and `category`). `--from-scratch`
draws the encoder's weights anew: the run to compare with. Needs `pip install "hf-ssl-or[detection]"`.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from datasets import load_dataset
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoConfig, AutoImageProcessor

from hf_ssl_or import SSLResNetBackbone, SSLViTBackbone
from hf_ssl_or.evaluation.detection import PyramidBackbone

FAMILIES = {"ssl_resnet": SSLResNetBackbone, "ssl_vit": SSLViTBackbone}


def build_detector(options: argparse.Namespace, num_classes: int) -> FasterRCNN:
    """Puts a feature pyramid and Faster R-CNN on the encoder; class 0 is the background."""
    config = AutoConfig.from_pretrained(options.encoder)
    config.out_features = config.stage_names[1:] if config.model_type == "ssl_resnet" else config.stage_names[-1:]
    family = FAMILIES[config.model_type]
    backbone = family(config) if options.from_scratch else family.from_pretrained(options.encoder, config=config)
    pyramid = PyramidBackbone(backbone, options.width)
    processor = AutoImageProcessor.from_pretrained(options.encoder)
    sizes = tuple((options.smallest_anchor * 2**level,) for level in range(pyramid.levels))
    return FasterRCNN(
        pyramid,
        1 + num_classes,
        min_size=options.image_size,
        max_size=options.image_size,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * pyramid.levels),
        box_roi_pool=MultiScaleRoIAlign(pyramid.names, output_size=7, sampling_ratio=2),
        box_batch_size_per_image=128,
    )


def read(row: dict, device: torch.device, flip: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns an image (3, H, W) in [0, 1] and its boxes as corners (n, 4) with labels from 1."""
    image = pil_to_tensor(row["image"].convert("RGB")).float() / 255
    boxes = torch.tensor(row["objects"]["bbox"], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    if flip:
        image, boxes[:, [0, 2]] = image.flip(-1), image.shape[-1] - boxes[:, [2, 0]]
    labels = 1 + torch.tensor(row["objects"]["category"], dtype=torch.int64)
    return image.to(device), {"boxes": boxes.to(device), "labels": labels.to(device)}


def train(detector: FasterRCNN, rows: list[dict], options: argparse.Namespace, device: torch.device) -> None:
    """Trains all weights with AdamW and a one-cycle schedule; images are mirrored at random."""
    steps = options.epochs * (len(rows) // options.batch_size)
    optimizer = torch.optim.AdamW(detector.parameters(), options.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, steps)
    rng = np.random.default_rng(options.seed)
    detector.train()
    for _ in range(options.epochs):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - options.batch_size + 1, options.batch_size):
            batch = [read(rows[i], device, rng.random() < 0.5) for i in order[start : start + options.batch_size]]
            loss = sum(detector(*map(list, zip(*batch, strict=True))).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def evaluate(detector: FasterRCNN, rows: list[dict], device: torch.device) -> dict[str, float]:
    """Returns the mean average precision (IoU 0.50 to 0.95, and at 0.50), in percent."""
    metric = MeanAveragePrecision()
    detector.eval()
    for row in rows:
        image, target = read(row, device)
        metric.update(detector([image]), [target])
    found = metric.compute()
    return {name: round(100 * float(found[key]), 2) for name, key in (("mAP", "map"), ("mAP50", "map_50"))}


def main() -> None:
    """Trains, evaluates, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("dataset")
    parser.add_argument("--from-scratch", action="store_true")
    counts = {"epochs": 10, "batch-size": 8, "seed": 0, "limit": 10**9}
    for name, value in {**counts, "image-size": 300, "smallest-anchor": 16, "width": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = load_dataset(options.dataset)
    rows = {split: list(splits[split].select(range(min(options.limit, len(splits[split]))))) for split in splits}
    num_classes = len(splits["train"].features["objects"]["category"].feature.names)
    detector = build_detector(options, num_classes).to(device)
    train(detector, rows["train"], options, device)
    print(json.dumps({**evaluate(detector, rows["test"], device), **vars(options)}))


if __name__ == "__main__":
    main()
