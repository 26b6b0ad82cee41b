"""What streaming costs this machine: decoding and reading per core, memory. The constants of docs/streaming.md.

    python benchmarks/stream.py --machine cpu --threads 2 [--quick]

Writes JPEGs of 500 x 375 pixels (smooth shapes and noise, about 110 kB each) into parquet files in a temporary folder,
and cuts two views of 224 pixels out of each as a run does, without the changes of color that follow. Rates are per
second of processor time, summed over threads, so that other work on the machine counts little. Writes
benchmarks/results/<machine>/stream.json.
"""

from __future__ import annotations

import io
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import parser, prepare, write
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.augmentation_sampling import ViewGroup, ViewPlan
from hf_ssl_or.data.image_dataset import crop_file
from hf_ssl_or.data.loading import load_images
from hf_ssl_or.data.stream import BlockBuffer, StreamingImageSet
from hf_ssl_or.structures import ViewSpec

DISTINCT = 64  # pictures; the rows of a file repeat them


class Pictures:
    """Encoded pictures that are opened by number."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def read(self, i: int) -> Image.Image:
        """Opens picture i."""
        return Image.open(io.BytesIO(self.contents[i]))

    def describe(self, i: int) -> str:
        """Names picture i."""
        return f"picture {i}"


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.float32) + rng.normal(0, 20, (375, 500, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_files(folder: Path, pictures: list[bytes], files: int, rows: int) -> None:
    for number in range(files):
        cells = [{"bytes": pictures[i % len(pictures)], "path": None} for i in range(rows)]
        options = {"row_group_size": 100, "compression": "none", "use_dictionary": False}
        pq.write_table(pa.table({"image": cells}), folder / f"train-{number:05d}.parquet", **options)


def plan(index_B: np.ndarray, side: int) -> ViewPlan:
    return ViewPlan(index_B, (ViewGroup(specs=(ViewSpec(), ViewSpec()), size=side, seed=0, epoch=0),))


def decoding(pictures: list[bytes], images: StreamingImageSet) -> float:
    """Returns images per core-second."""
    source, start = Pictures(pictures), time.process_time()
    for i in range(len(pictures)):
        crops = crop_file(i, source, images.job, plan(np.array([i]), images.image_size))
        assert not isinstance(crops, str), crops
    return len(pictures) / (time.process_time() - start)


def reading(images: StreamingImageSet, window: int) -> float:
    """Returns MB per core-second of blocks that are opened and not decoded."""
    firsts = images.shards.first_K
    buffer = BlockBuffer(images.shards, (np.array([first]) for first in firsts), 2 * window)
    start = time.process_time()
    while (taken := buffer.take()) is not None:
        for reader in taken[1].values():
            reader.result()
        buffer.release(taken[1])
    buffer.close()
    return images.shards.nbytes_K.sum() / (time.process_time() - start) / 1e6


def streaming(images: StreamingImageSet, batch_size: int) -> tuple[float, int]:
    """Returns images per core-second of an epoch, reading and decoding, and by how many bytes the process grew."""
    order, before, most, count = images.order(batch_size, 0), resident(), 0, 0
    start = time.process_time()
    steps = (order.indices(step, 0, batch_size) for step in range(order.steps_per_epoch))
    plans = (plan(index_B, images.image_size) for index_B in steps)
    for _, index_B in images._crops(plans, torch.device("cpu")):
        most, count = max(most, resident()), count + len(index_B)
    return count / (time.process_time() - start), most - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    args = parser(__doc__, seconds=0)
    args.add_argument("--rows", type=int, default=3200, help="images of the set")
    args.add_argument("--window-mib", type=int, default=96)
    args = args.parse_args()
    if args.quick:
        args.rows = 800
    prepare(args)
    pictures = [picture(number) for number in range(DISTINCT)]
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), pictures, 4, args.rows // 4)
        settings = {"image_size": 224, "mean": [0.5] * 3, "std": [0.25] * 3, "stream_window_mib": args.window_mib}
        images = load_images(
            DataArguments(
                dataset=folder, streaming=True, cache_dir=f"{folder}/cache", num_workers=args.threads, **settings
            ),
            "train",
        )
        assert isinstance(images, StreamingImageSet)
        decoded = statistics.median(decoding(pictures, images) for _ in range(5))
        pa.default_memory_pool().release_unused()
        streamed, grown = streaming(images, 64)
        read = reading(images, args.window_mib * 2**20)
    rows = {
        "kB of an image": round(sum(map(len, pictures)) / len(pictures) / 1000, 1),
        "side of a view": images.image_size,
        "images decoded per core-second": round(decoded),
        "images streamed per core-second": round(streamed),
        "MB of local parquet read per core-second": round(float(read)),
        "MiB of the set": round(int(images.shards.nbytes_K.sum()) / 2**20),
        "MiB of a window": args.window_mib,
        "MiB of encoded images held at most": round(images.peak_bytes / 2**20),
        "MiB that the process grew by": round(grown / 2**20),
    }
    for name, value in rows.items():
        print(f"{name:42}{value:>10,}")
    write(__file__, args, rows=rows)


if __name__ == "__main__":
    main()
