"""Which copies of an image does the measured threshold of near-duplicates find, and how many others does it take?

    HF_SSL_OR_DATA=data python benchmarks/duplicates.py random:resnet18@64 --sets imagenette64 dtd10 --machine cpu

A sample of up to 1,000 images of each set is encoded, and copies of a tenth of them: as JPEG of quality 90, and
enlarged 1.5 times. A copy counts as found if its cosine is at least the threshold that `embed --duplicates` measures
on the sample; an image counts among the others if another image of the sample is that near. Writes
benchmarks/results/<machine>/duplicates.json.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from common import Row, Table, parser, prepare, write
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_ssl_or.data.image_dataset import ImageSet
from hf_ssl_or.evaluation.curation import duplicate_threshold, nearest_neighbors
from hf_ssl_or.evaluation.encoder_loading import FrozenEncoder, load_encoder
from hf_ssl_or.evaluation.features import extract_features
from hf_ssl_or.models.image_conversion import Preprocessing

COLUMNS = {
    "name": ("encoder", ""),
    "set": ("set", ""),
    "threshold": ("threshold", ".4f"),
    "jpeg": ("JPEG 90 %", ".0f"),
    "enlarged": ("1.5x %", ".0f"),
    "others": ("others %", ".1f"),
}


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return Image.open(file).convert("RGB")


def enlarged(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.BICUBIC)


def encode(encoder: FrozenEncoder, images: list[Image.Image]) -> Tensor:
    """Returns features of images, as the encoder wants them."""
    own: Any = encoder.processing
    preprocessing = own.exact or Preprocessing(
        image_size=encoder.image_size,
        crop_pct=own.crop_pct or 1.0,
        interpolation=own.interpolation or "bilinear",
        mean=own.mean or (0.45,) * 3,
        std=own.std or (0.27,) * 3,
    )
    data = ImageSet.from_arrays(images, preprocessing=preprocessing)
    return extract_features(encoder.model, data, device="cpu", batch_size=64, progress=False)


def measure(name: str, folder: Path, count: int) -> Row:
    """Measures one encoder on one set."""
    table = datasets.load_dataset(str(folder), split="train")
    step = max(1, len(table) // count)
    images = [table[i]["image"].convert("RGB") for i in range(0, len(table), step)][:count]
    encoder = load_encoder(name)
    features = encode(encoder, images)
    threshold = duplicate_threshold(features)
    cosine_NK, _ = nearest_neighbors(features, 1)
    row: Row = {"name": Path(name).name, "set": folder.name, "threshold": threshold}
    for key, change in (("jpeg", jpeg), ("enlarged", enlarged)):
        copies = encode(encoder, [change(image) for image in images[: count // 10]])
        row[key] = 100 * float((F.cosine_similarity(features[: count // 10], copies) >= threshold).float().mean())
    return row | {"others": 100 * float((cosine_NK[:, 0] >= threshold).float().mean())}


def main() -> None:
    arguments = parser(__doc__, seconds=0)
    arguments.add_argument("encoders", nargs="+", help="names as for evaluate")
    arguments.add_argument("--data", type=Path, default=Path(os.environ.get("HF_SSL_OR_DATA", "data")))
    arguments.add_argument("--sets", nargs="+", default=["imagenette64", "dtd10", "cifar10"])
    args = arguments.parse_args()
    prepare(args)
    torch.set_grad_enabled(False)
    table = Table(COLUMNS)
    for name in args.encoders:
        for folder in args.sets:
            table.add(measure(name, args.data / folder, 100 if args.quick else 1000))
    args.data, args.encoders = args.data.name, [Path(name).name for name in args.encoders]
    write(__file__, args, rows=table.rows)


if __name__ == "__main__":
    main()
